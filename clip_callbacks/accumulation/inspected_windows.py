"""Accumulation windows whose micro-batches are measured one by one, to drop bad ones or to estimate the noise scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from clip_callbacks.accumulation.microbatches import MicroBatches
from clip_callbacks.accumulation.rescaler import NoRescaling
from clip_callbacks.accumulation.windows import ReportMicroBatch, Windows
from clip_callbacks.core.actions import StepOutcome
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.stats.noise_scale import WindowNorms
from clip_callbacks.trainer.grad_scaler import grad_scaler
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import Discarded, KeptBatch, MicroBatch
from clip_callbacks.trainer.strategies import data_parallel

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class InspectedWindows(Windows):
    """Windows whose micro-batches are measured one by one.

    Args:
        trainer: The Trainer.
        module: The module in training.
        rescaler: The part that rescales windows.
        drops: If True, bad micro-batches are dropped; otherwise all are only measured.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, rescaler: NoRescaling, *, drops: bool) -> None:
        super().__init__(trainer, module, rescaler)
        self.acts_on_backward = self._rescales = True
        self._inspected = MicroBatches(module, drops=drops, parallel=data_parallel(trainer))

    @override
    def attach(self, changed: Sequence[OptimizerContext], contexts: Sequence[OptimizerContext]) -> None:
        super().attach(changed, contexts)
        self._inspected.attach(contexts)

    @override
    def begin_batch(self, batch: Any, batch_idx: int, kept: KeptBatch | None) -> None:
        super().begin_batch(batch, batch_idx, kept)
        self._inspected.begin_batch(batch)

    @override
    def before_backward(self, loss: Tensor) -> None:
        # First, so that the fingerprints of the pass are taken when the gradients of earlier passes are set aside.
        self._inspected.before_backward()
        super().before_backward(loss)

    @override
    def after_backward(self, report: ReportMicroBatch) -> bool:
        has_zero_weight = self._rescaler.has_zero_weight
        newest = tuple(window.micro_batches[-1] for window in self._windows.values() if window.micro_batches)[:1]
        losses = [each.loss for each in newest if not has_zero_weight]
        is_dropped = self._inspected.after_backward(losses, lambda context: report(context, newest))
        if has_zero_weight:
            self._remove_newest(is_weightless=True)
        elif is_dropped:
            self._remove_newest()
        if is_dropped:
            self._rescaler.drop_micro_batch()
        self._rescaler.after_backward()
        return is_dropped

    @property
    @override
    def is_zeroed(self) -> bool:
        # a window whose micro-batches were all dropped has no gradients either
        return self._inspected.good > 0 and super().is_zeroed

    @override
    def of_step(self, context: OptimizerContext) -> tuple[tuple[MicroBatch, ...], float, Discarded | None]:
        micro_batches, scale, reason = super().of_step(context)
        if self._inspected.is_lost:
            reason = Discarded.DROPPED
        return micro_batches, scale, reason

    @property
    def _scale_of_kept(self) -> float:  # type: ignore[override]
        return self._inspected.scale

    @override
    def end(self, report: StepRecord | None) -> WindowNorms | None:
        norms = None
        # of a bad step norms say nothing about noise
        if report is not None and report.outcome is StepOutcome.TAKEN:
            norms = self._norms(report)
        self._inspected.end_window()
        return norms

    @override
    def detach(self) -> None:
        super().detach()
        self._inspected.detach()

    def _norms(self, report: StepRecord) -> WindowNorms | None:
        """Return the norms without Lightning's division by N and without the loss scale."""
        scaler = grad_scaler(self._trainer)
        return self._inspected.window_norms(
            float(report.total_norm) / report.accumulation_scale,
            divisor=self._rescaler.divisor,
            loss_scale=scaler.get_scale() if scaler else 1.0,
        )
