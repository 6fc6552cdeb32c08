"""A limit that is a fraction of the parameters' own norms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clip_callbacks.core.arguments import as_finite
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitState


@dataclass(frozen=True)
class RatioLimit(Limit):
    r"""Adaptive gradient clipping (AGC): a fraction of the norm of the block's parameters.

    .. math::
        \ell_b = \text{ratio} \cdot \max(\lVert w_b \rVert_p, \text{floor})

    with the parameters :math:`w_b` of block b, in their unit, and the order p of the norms. Meant for ``scope="unit"``, one norm
    for each output row, and for networks without normalization layers. The floor lets parameters that are initialized to zero
    move: without it their limit would stay 0. The paper does not clip the last linear layer; a rule leaves it out with
    ``ClipRule(RatioLimit(), "unit", exclude=r"^head\.")``.

    There is no state. Each step reads the parameters once more than other limits do.

    Source: Brock, De, Smith and Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021
    (arXiv 2102.06171), equation 3. Unlike there, nothing is added to the gradient's norm, and it has no lower bound: a limit is
    never 0.

    Args:
        ratio: Fraction of the parameters' norm, above 0.
        floor: Least norm of the parameters that is assumed, above 0, in the unit of the parameters.

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
        """Always True."""
        return True

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """Return the limit of each block, inf for a block with non-finite parameters, and the state, which is empty."""
        assert blocks.weights is not None
        # inf, which is no limit, for weights that are NaN: `amin` of a TightestLimit would let a NaN hide the other members
        return self.ratio * blocks.weights.nan_to_num(nan=float("inf"), posinf=float("inf")).clamp(min=self.floor), state
