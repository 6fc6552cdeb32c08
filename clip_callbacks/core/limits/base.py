"""What a limit is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from clip_callbacks.core.remeasurement import total_norm_in_float64

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
        return total_norm_in_float64(self.norms, self.norm_type)


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


def step_count() -> Tensor:
    """The count of a state before the first step, int64, 0-dim."""
    return torch.zeros((), dtype=torch.int64)


MaxNorm: TypeAlias = float | Literal["inf"] | Limit | None
"""How a user states a limit: a number, ``inf`` or None for no limit, or a :class:`Limit`."""
