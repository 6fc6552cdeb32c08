"""An optimizer step whose gradients may be bad: where, when, and what a look at it finds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning.pytorch import Trainer
from torch import Tensor

from clip_callbacks.callbacks._lane import Lane, MicroBatch
from clip_callbacks.callbacks._scaler import grad_scaler
from clip_callbacks.callbacks._trace import trace_forward
from clip_callbacks.nonfinite import Findings, all_finite, examine


@dataclass
class Incident:
    """Where and when an optimizer step is; it has happened once the guard was asked about it.

    Args:
        trainer: The Trainer, for step, epoch, batch and rank.
        lane: The optimizer.
        window: Its micro-batches.
        is_new: Whether the optimizer's step is new, not another closure call of the last one.
    """

    trainer: Trainer
    lane: Lane
    window: list[MicroBatch]
    is_new: bool
    happened: bool = False

    def _losses(self) -> list[Tensor]:
        return [loss for loss, _ in self.window]

    @property
    def under_scaler(self) -> bool:
        """Whether a GradScaler decides on overflows."""
        return grad_scaler(self.trainer) is not None

    def is_real_under_scaler(self) -> bool:
        """Whether no loss scale can cure it: the loss itself is bad, or the gradients are at a scale of 1 or less."""
        scaler = grad_scaler(self.trainer)
        return scaler is not None and (scaler.get_scale() <= 1.0 or not all_finite(self._losses()))

    def findings(self, *, after_good_step: bool) -> Findings:
        """Walk over the parameters; on bad steps only."""
        findings = examine(self.lane.table, self._losses(), after_good_step=after_good_step)
        return replace(findings, traced=self._trace())

    def _trace(self) -> str | None:
        """Run the first batch with a non-finite loss again; in manual optimization that would step the optimizers."""
        module = self.trainer.lightning_module
        if not module.automatic_optimization:
            return None
        for loss, batch in self.window:
            if batch and not all_finite([loss]):
                return trace_forward(self.trainer, module, *batch)
        return None

    def place(self) -> dict[str, int | str]:
        """Step, epoch, batch, rank, and with several of them the optimizer."""
        trainer = self.trainer
        place: dict[str, int | str] = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        place |= {"batch": trainer.fit_loop.batch_idx, "rank": trainer.global_rank}
        return place | {"optimizer": self.lane.suffix[1:]} if self.lane.suffix else place

    def __str__(self) -> str:
        """The place in words."""
        return ", ".join(f"{what} {where}" for what, where in self.place().items())
