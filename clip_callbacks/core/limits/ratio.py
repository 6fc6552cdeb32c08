"""Limits that are a fraction of the parameters' own norms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clip_callbacks.core.arguments import as_finite
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitState


@dataclass(frozen=True)
class RatioLimit(Limit):
    r"""Adaptive gradient clipping (AGC): a gradient's norm may be a fraction of its parameter's.

    .. math::
        \ell_b = \text{ratio} \cdot \max(\lVert w_b \rVert_p, \text{floor})

    Meant for ``scope="unit"``, one norm for each output row, and for networks without normalization layers. The floor lets
    parameters that begin at zero move: without it their limit would be 0 for ever. The paper leaves out the last linear
    layer, which a rule does: ``ClipRule(RatioLimit(), "unit", exclude=r"^head\.")``.

    Remembers nothing. Reads the parameters, on each step, as it reads their gradients.

    Source: Brock, De, Smith and Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021
    (arXiv 2102.06171), equation 3. Unlike there, nothing is added to or put under the gradient's norm: a limit is never 0.

    Args:
        ratio: Fraction of the parameters' norm, above 0.
        floor: The norm that parameters are taken to have at least, above 0, in the unit of the parameters.

    Raises:
        ValueError: If an argument is not above 0.

    Example::

        >>> blocks = BlockNorms(torch.ones(2), weights=torch.tensor([5.0, 0.0]))
        >>> RatioLimit(ratio=0.01, floor=1e-3).step(blocks, {})[0]
        tensor([5.0000e-02, 1.0000e-05])
    """

    ratio: float = 0.01
    floor: float = 1e-3

    def __post_init__(self) -> None:
        """Check every argument."""
        for argument in ("ratio", "floor"):
            object.__setattr__(self, argument, as_finite(getattr(self, argument), argument))

    @property
    def uses_weights(self) -> bool:
        """It does."""
        return True

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """A limit for each block; none for one whose parameters are not finite."""
        assert blocks.weights is not None
        return self.ratio * blocks.weights.nan_to_num(nan=float("inf"), posinf=float("inf")).clamp(min=self.floor), state
