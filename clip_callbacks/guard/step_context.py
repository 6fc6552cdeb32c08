"""An optimizer step whose gradients may be bad: where, when, and what a look at it finds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from clip_callbacks.core.diagnosis import Findings, examine, examine_on_all_ranks
from clip_callbacks.core.nonfinite import all_finite
from clip_callbacks.core.reduction import gathered
from clip_callbacks.trainer.grad_scaler import grad_scaler, has_overflowed, mark_overflow
from clip_callbacks.trainer.optimizer_context import Lane, MicroBatch
from clip_callbacks.trainer.trace_forward import trace_forward


@dataclass
class Incident:
    """Where and when an optimizer step is.

    It has happened once the guard was asked about it, and the step is undone if that is the verdict.

    Args:
        trainer: The Trainer, for step, epoch, batch and rank.
        lane: The optimizer.
        window: Its micro-batches.
        is_new: Whether the optimizer's step is new, not another closure call of the last one.
        loss_scale: Where the scaler has left unscaling to us, its scale at this step, 0-dim.
        norms: Of the gradients, on the host, if the step is over and nothing else is left of them.
        traces: Whether a batch with a bad loss is run again to find the module.
    """

    trainer: Trainer
    lane: Lane
    window: list[MicroBatch]
    is_new: bool
    loss_scale: Tensor | None = None
    norms: Tensor | None = None
    traces: bool = False
    happened: bool = False
    is_undone: bool = False

    def _losses(self) -> list[Tensor]:
        return [loss for loss, _ in self.window]

    @cached_property
    def leaves_to_scaler(self) -> bool:
        """Whether the scaler skips this bad step itself, on all ranks if on any: not each may hold what is not finite."""
        scaler = grad_scaler(self.trainer)
        if scaler is None or self.loss_scale is not None:
            return self.loss_scale is not None
        on_any = self._on_any_rank(has_overflowed(scaler, self.lane.optimizer))
        if on_any:
            mark_overflow(scaler, self.lane.optimizer)
        return on_any

    def _on_any_rank(self, flag: bool) -> bool:
        """Whether it holds on any rank; asked on bad steps, by all of them."""
        return any(gathered(flag)) if self.trainer.world_size > 1 and not self._is_alone else flag

    def is_overflow(self) -> bool:
        """Whether a lower loss scale may cure it: the scaler has found it, the scale is above 1, and no loss is bad by itself.

        With several optimizers the losses have no say, since nobody knows whose gradients a loss has reached; nor on several ranks
        where the verdict was deferred, since they do not learn of it together.
        """
        scaler = grad_scaler(self.trainer)
        if scaler is None or not self.leaves_to_scaler:
            return False
        if (scaler.get_scale() if self.loss_scale is None else float(self.loss_scale)) <= 1.0:
            return False
        if len(self.trainer.optimizers) > 1 or (self._is_alone and self.trainer.world_size > 1):
            return True
        return not self._on_any_rank(any(_is_bad(loss) for loss in self._losses()))

    def findings(self, *, after_good_step: bool) -> Findings:
        """Walk over the parameters; on bad steps only."""
        findings = examine(self.lane.table, self._losses(), after_good_step=after_good_step, norms=self.norms)
        findings = replace(findings, traced=self._trace())
        if self.trainer.world_size == 1:
            return findings
        if not self._is_alone:
            return examine_on_all_ranks(self.lane.table, findings)
        return replace(findings, loss_is_finite=None) if findings.loss_is_finite else findings  # another rank's may not be

    def is_guilty(self, findings: Findings) -> bool:
        """Whether the step may be this rank's fault: it is one of those where it began, or nobody knows where."""
        return not findings.guilty_ranks or self.trainer.global_rank in findings.guilty_ranks

    @property
    def _is_alone(self) -> bool:
        """Whether this rank learns of the step when it likes: a deferred one, after it is over."""
        return self.norms is not None

    def _trace(self) -> str | None:
        """Run the first batch with a non-finite loss again; in manual optimization that would step the optimizers."""
        module = self.trainer.lightning_module
        if not module.automatic_optimization:
            return None
        for loss, kept in self.window if self.traces else ():
            if kept and not all_finite([loss]):
                return trace_forward(self.trainer, module, kept.batch, kept.batch_idx)
        return None

    @cached_property
    def place(self) -> dict[str, int | str]:
        """Step, epoch, batch, rank, and with several of them the optimizer."""
        trainer = self.trainer
        place: dict[str, int | str] = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        place |= {"batch": trainer.fit_loop.batch_idx, "rank": trainer.global_rank}
        return place | {"optimizer": self.lane.suffix[1:]} if self.lane.suffix else place

    def __str__(self) -> str:
        """The place in words."""
        return ", ".join(f"{what} {where}" for what, where in self.place.items())


def _is_bad(scaled_loss: Tensor) -> bool:
    """Whether a loss is no number whatever the loss scale; an infinite one in float16 may be the scale's doing."""
    return bool(scaled_loss.isnan().any()) or (scaled_loss.dtype is not torch.float16 and bool(scaled_loss.isinf().any()))
