"""The context of one optimizer step: its optimizer, its losses, its place in the run, and how it is decided."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from clip_callbacks.trainer.optimizer_context import OptimizerContext

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class KeptBatch(NamedTuple):
    """A batch that may be run again, for a diagnosis or in a bundle.

    Args:
        batch: The batch itself, not a copy.
        batch_idx: The number of the batch in its epoch.
        rng: States of the random number generators before the batch; None if they are not needed.
        versions: Ids and version counters of the batch's tensors, which tell if it was changed; empty if not needed.
    """

    batch: Any
    batch_idx: int
    rng: dict[str, Any] | None = None
    versions: tuple[tuple[int, int], ...] = ()


class MicroBatch(NamedTuple):
    """The loss of one backward pass, and its batch if it may be run again.

    Args:
        loss: The loss, one entry, detached, multiplied by the loss scale.
        kept: The batch; None if it is not kept.
        weight: The factor for the loss in the sum over the window. It undoes Lightning's division by the number of micro-batches;
            with weights of AccumulationRescaling it is the factor for the gradient.
    """

    loss: Tensor
    kept: KeptBatch | None
    weight: float = 1.0


class StepMode(Enum):
    """The way in which a step is decided, known before the step."""

    NOT_TAKEN = "not_taken"
    """There is no step: all ``training_step`` calls of the window returned None; under a GradScaler, the last one did."""
    DISCARDED = "discarded"
    """The gradients are discarded without being read; :attr:`StepContext.discarded` is the reason."""
    ON_HOST = "on_host"
    """The host reads the norms and decides."""
    ON_DEVICE = "on_device"
    """The device decides; the host reads the report one step later."""


class Discarded(Enum):
    """The reason for which the gradients of a window are discarded."""

    DROPPED = "dropped"
    """Every micro-batch was dropped."""
    WEIGHTLESS = "weightless"
    """Every micro-batch has weight 0, on all ranks."""
    SHARED = "shared"
    """Parameters are shared with an optimizer whose step was skipped, which has set their gradients to None."""
    OVERFLOWED = "overflowed"
    """Parameters are shared with an optimizer whose step has overflowed under the GradScaler."""
    STALE = "stale"
    """The gradients were computed with weights that a rollback in this batch has replaced."""


_LOSS = attrgetter("loss")

_REASONS = {
    Discarded.DROPPED: "Every micro-batch of the window was dropped",
    Discarded.WEIGHTLESS: "Every micro-batch of the window has weight 0",
    Discarded.SHARED: "Parameters are shared with another optimizer, whose step of the same losses was bad,",
    Discarded.OVERFLOWED: "Parameters are shared with another optimizer, whose step of the same losses has overflowed,",
    Discarded.STALE: "The gradients are of weights that a rollback has replaced,",
}


@dataclass(eq=False)  # not frozen: one is made at each step, and a frozen one takes three times as long to make
class StepContext:
    """The context of one optimizer step.

    Args:
        trainer: The Trainer.
        optimizer: The context of the optimizer in this fit.
        mode: The way in which the step is decided.
        micro_batches: The micro-batches of the window.
        is_new: True if the step is new; False if it is a further closure call of the last step, as with LBFGS.
        scale: Factor on the gradients that turns the sum of a short window into its mean.
        loss_scale: Loss scale of the GradScaler, 0-dim, if the gradients are still multiplied by it; else None.
        discarded: Reason for which the gradients are discarded, if the mode is ``DISCARDED``.
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
        """Losses of the window, one entry each, multiplied by the loss scale."""
        return list(map(_LOSS, self.micro_batches))

    @property
    def factor(self) -> float | Tensor:
        """Factor on the gradients as they are in memory, which rescales them and removes the loss scale."""
        # a new tensor, because the GradScaler changes its scale in place
        return self.scale if self.loss_scale is None else self.scale / self.loss_scale

    @property
    def why_discarded(self) -> str:
        """The reason for which the gradients are discarded, as the beginning of a message."""
        assert self.discarded is not None, "asked of discarded steps only"
        return _REASONS[self.discarded]

    @property
    def batch(self) -> tuple[int, int]:
        """The epoch, and the number of the batch in it."""
        return int(self.place["epoch"]), int(self.place["batch"])

    @property
    def number(self) -> int:
        """Number of this optimizer's step in the run, counted from 0."""
        return self.optimizer.history.steps - (not self.is_new)

    @cached_property
    def place(self) -> dict[str, int | str]:
        """Step, epoch, batch, rank and, if there are several, the optimizer; as they were when this was first read."""
        trainer = self.trainer
        place: dict[str, int | str] = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        place |= {"batch": trainer.fit_loop.batch_idx, "rank": trainer.global_rank}
        if self.optimizer.suffix:
            place["optimizer"] = self.optimizer.suffix[1:]
        return place

    @cached_property
    def logged_place(self) -> dict[str, int | str]:
        """The place for the journal, with the step under which loggers get the metrics of this batch.

        ``step`` counts the steps of all optimizers. Loggers count batches that may step, so several optimizers share one number.
        """
        return {**self.place, "logged_step": self.trainer.fit_loop.epoch_loop._batches_that_stepped}

    def __str__(self) -> str:
        """Return the place for messages, such as ``step 3, epoch 0, batch 3, rank 0``."""
        return ", ".join(f"{name} {value}" for name, value in self.place.items())
