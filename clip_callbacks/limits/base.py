"""What a limit is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, TypeAlias

from torch import Tensor

from clip_callbacks.norms import number_above_zero

LimitState: TypeAlias = dict[str, Tensor]
"""What a limit remembers between steps: tensors under fixed keys, of fixed shapes."""


class Limit(ABC):
    """How large may each block's norm be now?

    A limit is a frozen value of hyper-parameters; what it remembers is a :data:`LimitState` that the caller keeps. It sees
    norms that are the same on every rank, and never a gradient, a parameter or a trainer.
    """

    def init(self, blocks: int) -> LimitState:
        """State before the first step, for B blocks; empty for a limit that remembers nothing."""
        return {}

    @abstractmethod
    def limits(self, norms: Tensor, state: LimitState) -> Tensor | float:
        """Largest allowed norm of each block.

        Args:
            norms: The blocks' norms before clipping, all finite, shape ``(B,)``.
            state: What :meth:`init` or :meth:`observe` returned; it is not changed.

        Returns:
            Above 0, shape ``(B,)``, or one number for all blocks.
        """

    def observe(self, norms: Tensor, state: LimitState) -> LimitState:
        """State after a step.

        Args:
            norms: The blocks' norms after clipping, all finite, shape ``(B,)``: a spike counts as what was let through.
            state: The state before; it is not changed.
        """
        return state


def as_max_norm(max_norm: object, argument: str = "max_norm") -> float:
    """Check a threshold given as a number.

    Raises:
        ValueError: If it is not a number above 0.
    """
    if (number := number_above_zero(max_norm)) is not None:
        return number
    raise ValueError(
        f"`{argument}` must be a number above 0, a Limit, or None to measure without clipping, got {max_norm!r}. "
        "Typical thresholds lie between 0.1 and 10."
    )


MaxNorm: TypeAlias = float | Literal["inf"] | Limit | None
"""How a user states a limit: a number, ``inf`` or None for no limit, or a :class:`Limit`."""
