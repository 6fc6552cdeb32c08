"""The same limit at every step."""

from __future__ import annotations

from dataclasses import dataclass

from clip_callbacks.core.arguments import as_max_norm
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitState, MaxNorm


@dataclass(frozen=True)
class FixedLimit(Limit):
    r"""The same limit for every block at every step: :math:`\ell_b = \text{max\_norm}`.

    Clipping by a fixed threshold is that of Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural
    networks", ICML 2013, algorithm 1.

    Args:
        max_norm: The largest norm, above 0, in the unit of the gradients.

    Raises:
        ValueError: If ``max_norm`` is not above 0.

    Example::

        >>> FixedLimit(0.5).step(BlockNorms(torch.tensor([3.0, 4.0])), {})
        (0.5, {})
    """

    max_norm: float

    def __post_init__(self) -> None:
        """Check the threshold."""
        object.__setattr__(self, "max_norm", as_max_norm(self.max_norm))

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[float, LimitState]:
        """One number for all blocks."""
        return self.max_norm, state


def as_limit(max_norm: MaxNorm, argument: str = "max_norm") -> Limit:
    """A limit however it is stated; a number is a fixed one, None is that of inf.

    Raises:
        ValueError: If it is a number that is not above 0.
    """
    if isinstance(max_norm, Limit):
        return max_norm
    return FixedLimit(float("inf") if max_norm is None else as_max_norm(max_norm, argument))
