"""One optimizer step of a fit: which, where, and how it is to be decided."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from clip_callbacks.trainer.optimizer_context import OptimizerContext

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class KeptBatch(NamedTuple):
    """A batch that may have to be run again.

    Args:
        batch: The batch, by reference.
        batch_idx: Its number.
        rng: The states of random numbers before it, if they are needed.
        versions: Which tensors it consists of and their version counters, if they are needed.
    """

    batch: Any
    batch_idx: int
    rng: dict[str, Any] | None = None
    versions: tuple[tuple[int, int], ...] = ()


class MicroBatch(NamedTuple):
    """The loss of one backward pass, and the batch if it may have to be run again."""

    loss: Tensor
    kept: KeptBatch | None


class StepMode(Enum):
    """How a step is decided, known before it."""

    NOT_TAKEN = "not_taken"
    """There is no step: every ``training_step`` of the window returned None, or under a GradScaler the last one."""
    DISCARDED = "discarded"
    """The gradients mean nothing, whatever they are; :attr:`StepContext.discarded` says why."""
    ON_HOST = "on_host"
    """The host reads the norms, and decides."""
    ON_DEVICE = "on_device"
    """The device decides; the host learns of it one step later."""


class Discarded(Enum):
    """Why the gradients of a window mean nothing."""

    DROPPED = "dropped"
    """Every micro-batch was dropped."""
    WEIGHTLESS = "weightless"
    """Every micro-batch has weight 0, on all ranks."""
    SHARED = "shared"
    """They share parameters with an optimizer whose step was skipped: the gradients of these are gone."""
    OVERFLOWED = "overflowed"
    """They share parameters with an optimizer whose step has overflowed."""
    STALE = "stale"
    """They were computed with weights that a rollback in this batch has replaced."""


_WHY_DISCARDED = {
    Discarded.DROPPED: "Every micro-batch of the window was dropped",
    Discarded.WEIGHTLESS: "Every micro-batch of the window has weight 0",
    Discarded.SHARED: "Parameters are shared with another optimizer, whose step of the same losses was bad,",
    Discarded.OVERFLOWED: "Parameters are shared with another optimizer, whose step of the same losses has overflowed,",
    Discarded.STALE: "The gradients are of weights that a rollback has replaced,",
}


@dataclass(frozen=True, eq=False)
class StepContext:
    """One optimizer step.

    Args:
        trainer: The Trainer.
        optimizer: What the optimizer has in this fit.
        mode: How the step is decided.
        micro_batches: The micro-batches of its window.
        is_new: Whether the step is new, and not another closure call of the last one, as LBFGS makes.
        scale: What makes the window's sum its mean.
        loss_scale: What the gradients are still multiplied by, 0-dim, where the GradScaler has left unscaling to us.
        discarded: Why the gradients mean nothing, if the mode is ``DISCARDED``.
    """

    trainer: Trainer
    optimizer: OptimizerContext
    mode: StepMode
    micro_batches: tuple[MicroBatch, ...]
    is_new: bool = True
    scale: float = 1.0
    loss_scale: Tensor | None = None
    discarded: Discarded | None = None

    @property
    def losses(self) -> list[Tensor]:
        """The losses of the window, 0-dim, multiplied by the loss scale."""
        return [loss for loss, _ in self.micro_batches]

    @property
    def why_discarded(self) -> str:
        """Why the gradients mean nothing, in words."""
        assert self.discarded is not None, "asked of discarded steps only"
        return _WHY_DISCARDED[self.discarded]

    @property
    def batch(self) -> tuple[int, int]:
        """The epoch and the number of the batch."""
        return int(self.place["epoch"]), int(self.place["batch"])

    @property
    def number(self) -> int:
        """The number of this optimizer's step in the run, from 0."""
        return self.optimizer.history.steps - (not self.is_new)

    @cached_property
    def place(self) -> dict[str, int | str]:
        """Step, epoch, batch, rank, and with several of them the optimizer; where the Trainer stood when it was asked first."""
        trainer = self.trainer
        place: dict[str, int | str] = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        place |= {"batch": trainer.fit_loop.batch_idx, "rank": trainer.global_rank}
        if self.optimizer.suffix:
            place["optimizer"] = self.optimizer.suffix[1:]
        return place

    def __str__(self) -> str:
        """The place in words."""
        return ", ".join(f"{what} {where}" for what, where in self.place.items())
