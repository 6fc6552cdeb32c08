"""What a limit is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from clip_callbacks.core.norms import number_above_zero, sound_total

LimitState: TypeAlias = dict[str, Tensor]
"""What a limit remembers between steps: tensors under fixed keys, of fixed shapes and dtypes."""


@dataclass(frozen=True, eq=False)
class BlockNorms:
    """What a limit is shown of one step: the same on every rank, on the host or, of a deferred step, on the device and unread.

    Args:
        norms: Of the blocks before clipping, all finite, shape ``(B,)``; 0 where there is no gradient.
        norm_type: The order p of all norms.
        weights: p-norms of the parameters in the blocks, ``(B,)``, on request (:attr:`Limit.uses_weights`).
    """

    norms: Tensor
    norm_type: float = 2.0
    weights: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The p-norm of all blocks together, float64 of shape ``(1,)``."""
        return sound_total(self.norms, self.norm_type)


class Limit(ABC):
    """How large may each block's norm be now?

    A limit is a frozen value of hyper-parameters; what it remembers is a :data:`LimitState` that the caller keeps. It sees
    norms that are the same on every rank, and never a gradient, a parameter or a trainer.

    Four habits of all limits here, and advice for yours: the state takes in a norm as the limit would clip it, so that one spike
    cannot lift it far; a norm of 0 (a block without a gradient) leaves no trace; state tensors keep their shapes, so that a step
    costs the same at any time; and nothing is read on the host (``float()``, ``.item()``, ``if tensor:``), since on a GPU that
    waits for the device.
    """

    @property
    def uses_weights(self) -> bool:
        """Whether it wants to see the norms of the parameters too, a further read."""
        return False

    def init(self, blocks: int) -> LimitState:
        """State before the first step, for B blocks; empty for a limit that remembers nothing.

        A tensor is either 0-dim or has the blocks as its last dimension: so a block keeps what is known of it when an optimizer
        takes on other parameters.
        """
        return {}

    @abstractmethod
    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor | float, LimitState]:
        """Limits for this step, and the state after it.

        The caller asks on every step, also for shadows that clip nothing; of a step that is skipped it keeps the state before.

        Args:
            blocks: Norms of this step.
            state: What :meth:`init` or the last step returned; it is not changed.

        Returns:
            The largest allowed norm of each block, above 0, shape ``(B,)`` or one entry or number for all, inf where there is no
            limit yet; and the state, of the same keys, shapes and dtypes.
        """


def as_max_norm(max_norm: object, argument: str = "max_norm") -> float:
    """Check a threshold given as a number.

    Raises:
        ValueError: If it is not a number above 0.
    """
    if (number := number_above_zero(max_norm)) is not None:
        return number
    advice = ", or None to measure without clipping" if argument == "max_norm" else ""
    typical = " Typical thresholds lie between 0.1 and 10." if argument == "max_norm" else ""
    raise ValueError(f"`{argument}` must be a number above 0, a Limit{advice}, got {max_norm!r}.{typical}")


def as_finite(number: object, argument: str, *, low: float = 0.0, high: float = math.inf, low_too: bool = False) -> float:
    """Check a hyper-parameter: a number in the open interval from ``low`` to ``high``, or with ``low`` in it too.

    Raises:
        ValueError: If it is none.
    """
    try:
        found = math.nan if isinstance(number, bool) else float(number)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = math.nan
    if low < found < high or (low_too and found == low):
        return found
    lower = f"of at least {low:g}" if low_too else f"above {low:g}"
    upper = "finite" if math.isinf(high) else f"below {high:g}"
    raise ValueError(f"`{argument}` must be a number {lower} and {upper}, got {number!r}.")


def as_count(number: object, argument: str, *, least: int) -> int:
    """Check a number of steps.

    Raises:
        ValueError: If it is not a whole number of at least ``least``.
    """
    if isinstance(number, int) and not isinstance(number, bool) and number >= least:
        return number
    raise ValueError(f"`{argument}` must be a whole number of at least {least}, got {number!r}.")


def step_count() -> Tensor:
    """The count of a state before the first step, int64, 0-dim."""
    return torch.zeros((), dtype=torch.int64)


MaxNorm: TypeAlias = float | Literal["inf"] | Limit | None
"""How a user states a limit: a number, ``inf`` or None for no limit, or a :class:`Limit`."""
