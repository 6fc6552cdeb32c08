"""The accumulation windows of a fit: what is in each, and what makes it a mean."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor
from typing_extensions import override

from clip_callbacks.accumulation.microbatches import MicroBatches
from clip_callbacks.accumulation.rescaler import NoRescaling
from clip_callbacks.core.actions import StepOutcome
from clip_callbacks.core.reduction import shard_of
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.stats.noise_scale import WindowNorms
from clip_callbacks.trainer.fingerprints import GradientFingerprints, gradient_fingerprints, gradients_changed
from clip_callbacks.trainer.grad_scaler import grad_scaler
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import Discarded, KeptBatch, MicroBatch, StepContext
from clip_callbacks.trainer.strategies import data_parallel

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

REMEMBERED = 1024
"""How many micro-batches of a window are remembered at most."""

KEPT_IN_MANUAL = 16
"""How many batches are kept in manual optimization, where nobody says how long a window is."""


ReportMicroBatch: TypeAlias = Callable[[OptimizerContext, tuple[MicroBatch, ...]], None]
"""Told of an optimizer with bad gradients, and of the one micro-batch that they are of, unless a step came before."""


class Windows:
    """The micro-batches since each optimizer's last step.

    Args:
        trainer: The Trainer.
        module: The module in training.
        rescaler: What makes a window's sum its mean.

    Attributes:
        kept: The batch as it is kept until its step, if it may have to be run again.
        in_window: Whether there was a backward pass since the last step of any optimizer.
        has_backward: Whether there was one in this batch.
        has_step: Whether a step was decided in this batch.
        looks_at_passes: Whether each backward pass matters, so that optimizers are to be known by then.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, rescaler: NoRescaling) -> None:
        self._trainer = trainer
        self._module = module
        self._rescaler = rescaler
        self._is_manual = not module.automatic_optimization
        self._contexts: Sequence[OptimizerContext] = ()
        self._micro_batches: dict[int, deque[MicroBatch]] = {}
        self._open: set[int] = set()
        self._newest: MicroBatch | None = None
        self._sharing: dict[int, list[int]] = {}
        self._spoilt: dict[int, Discarded] = {}
        self._before_pass: dict[int, GradientFingerprints] = {}
        self._are_several = False
        self.kept: KeptBatch | None = None
        self.looks_at_passes = rescaler.watches_passes
        self.in_window = self.has_backward = self.has_step = False

    def attach(self, changed: Sequence[OptimizerContext], contexts: Sequence[OptimizerContext]) -> None:
        """Meet the optimizers, before the first step or after some of them took on other parameters.

        Args:
            changed: Those that are new, or hold other parameters.
            contexts: All optimizers.
        """
        self._contexts = contexts
        self._are_several = len(contexts) > 1
        self._sharing = _sharing(contexts) if self._are_several else {}
        self._micro_batches = {
            context.index: self._micro_batches.get(context.index, deque(maxlen=REMEMBERED)) for context in contexts
        }
        self._rescaler.attach(changed)

    def begin_batch(self, batch: Any, batch_idx: int, kept: KeptBatch | None) -> None:
        """Take up a batch, before its forward pass.

        Args:
            batch: The batch.
            batch_idx: Its number.
            kept: The batch as it is kept until its step, if it may have to be run again.
        """
        self.kept = kept
        self.has_backward = self.has_step = False

    def keep_anew(self, kept: KeptBatch | None) -> None:
        """Keep the batch anew: LBFGS's closure runs it again, with other random numbers."""
        self.kept = kept

    def before_backward(self, loss: Tensor) -> None:
        """Remember the loss until the step."""
        self.in_window = self.has_backward = True
        self._newest = micro_batch = MicroBatch(shard_of(loss).detach(), self.kept)
        for context in self._contexts:
            window = self._micro_batches[context.index]
            if self._is_manual:
                self._look_for_zero_grad(context, window)
            window.append(micro_batch)
        if self._are_several:
            self._before_pass = {context.index: gradient_fingerprints(context.table) for context in self._contexts}
        if self._rescaler.watches_passes:
            self._rescaler.before_backward(loss)

    def end_pass(self) -> tuple[set[int], set[int]]:
        """Find out, of several optimizers, whose gradients the backward pass has changed: the loss is theirs alone.

        Returns:
            The numbers of these optimizers; and of those among them whose window has begun with it.
        """
        reached = {
            context.index
            for context in self._contexts
            if gradients_changed(context.table, self._before_pass.get(context.index, {}))
        }
        for index, window in self._micro_batches.items():
            if index not in reached and window and window[-1] is self._newest:
                window.pop()
        begun = reached - self._open
        self._open |= begun
        return reached, begun

    def _look_for_zero_grad(self, context: OptimizerContext, window: deque[MicroBatch]) -> None:
        """Begin another window where the gradients are gone: Lightning has no hook for ``zero_grad`` in manual optimization."""
        if not context.table.has_gradients:
            window.clear()
            self._open.discard(context.index)
            self._spoilt.pop(context.index, None)
        if len(window) >= KEPT_IN_MANUAL:  # an optimizer that steps seldom, or never
            window[-KEPT_IN_MANUAL] = window[-KEPT_IN_MANUAL]._replace(kept=None)

    def after_backward(self, report: ReportMicroBatch) -> bool:
        """Look at the micro-batch, and drop a bad one, if that is wanted.

        Args:
            report: Told of each optimizer with bad gradients, before they are dropped.

        Returns:
            Whether the micro-batch was dropped.
        """
        if self._rescaler.watches_passes:
            if self._rescaler.is_silent:
                self._forget_micro_batch()  # its loss may be NaN, and does not count
            self._rescaler.after_backward()
        return False

    def _forget_micro_batch(self) -> None:
        for window in self._micro_batches.values():
            if window and window[-1] is self._newest:  # a callback before us may have stepped already, and not all are reached
                window.pop()

    def scale(self, context: OptimizerContext) -> float | None:
        """What makes an optimizer's window a mean; None if all its weights are 0. On several ranks this may be a collective."""
        if not self._rescaler.watches_passes:
            return 1.0
        return self._rescaler.scale(context, 1.0)

    def discarded(self, context: OptimizerContext, scale: float | None) -> Discarded | None:
        """Why nothing of an optimizer's window is left, if nothing is.

        Args:
            context: The optimizer.
            scale: What :meth:`scale` said.
        """
        if context.index in self._spoilt:
            return self._spoilt[context.index]
        return Discarded.WEIGHTLESS if scale is None else None

    def spoil_others(self, step: StepContext, outcome: StepOutcome) -> None:
        """Discard the windows of optimizers that share parameters with one whose step is skipped, as far as they share losses.

        Args:
            step: The step.
            outcome: What came of it, one of those that are skipped.
        """
        reason = Discarded.OVERFLOWED if outcome is StepOutcome.OVERFLOWED else Discarded.SHARED
        for index in self._sharing.get(step.optimizer.index, ()):
            window = self._micro_batches[index]
            if any(mine is theirs for mine in step.micro_batches for theirs in window):
                self._spoilt[index] = reason

    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        """Why the host must decide on steps of an optimizer, if it must."""
        if self._sharing.get(context.index):
            return "other optimizers hold some of the same parameters, and must know of a skipped step"
        return None

    def micro_batches(self, context: OptimizerContext) -> tuple[MicroBatch, ...]:
        """The micro-batches that wait for an optimizer's step."""
        return tuple(self._micro_batches[context.index])

    def clear(self, context: OptimizerContext) -> None:
        """Close the window of an optimizer: its step is decided."""
        self.in_window, self.has_step = False, True
        self._newest = None
        self._open.discard(context.index)
        self._spoilt.pop(context.index, None)
        self._micro_batches[context.index].clear()

    @property
    def is_idle(self) -> bool:
        """Whether this batch has no part in any step: ``training_step`` returned None, or only its forward pass is wanted.

        In manual optimization a step without a backward pass that Lightning has seen is one of ``loss.backward()``.
        """
        return not self.has_backward and not (self._is_manual and self.has_step)

    def end_epoch(self) -> list[Tensor]:
        """End the windows that the epoch has left in the middle; in manual optimization they may go on in the next one.

        Returns:
            Their losses.
        """
        losses = [loss for window in self._micro_batches.values() for loss, _ in window]
        if not self._is_manual:
            self.in_window = False
            for window in self._micro_batches.values():
                window.clear()
        return losses

    def end(self, report: StepRecord | None) -> WindowNorms | None:
        """Forget what was found out about the window's micro-batches.

        Args:
            report: What came of the step; None if there was none.

        Returns:
            Norms of the micro-batches and of their mean, if they are known.
        """
        return None

    def detach(self) -> None:
        """Let go of batches, losses and hooks."""
        self.kept = self._newest = None
        for window in self._micro_batches.values():
            window.clear()
        self._open.clear()
        self.in_window = False
        self._rescaler.detach()


def _sharing(contexts: Sequence[OptimizerContext]) -> dict[int, list[int]]:
    """By the number of each optimizer, those of others that hold some of its parameters."""
    held = {context.index: set(map(id, context.table.tensors)) for context in contexts}
    return {index: [other for other in held if other != index and held[other] & held[index]] for index in held}


class InspectedWindows(Windows):
    """Windows whose micro-batches are looked at one by one.

    Args:
        trainer: The Trainer.
        module: The module in training.
        rescaler: What makes a window's sum its mean.
        drops: Whether bad micro-batches are dropped, or all are only measured.
        restore_buffers: Whether a dropped micro-batch's effect on batch statistics is undone.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, rescaler: NoRescaling, *, drops: bool, restore_buffers: bool
    ) -> None:
        super().__init__(trainer, module, rescaler)
        self.looks_at_passes = True
        self._inspected = MicroBatches(module, restore_buffers=restore_buffers, drops=drops, parallel=data_parallel(trainer))

    @override
    def attach(self, changed: Sequence[OptimizerContext], contexts: Sequence[OptimizerContext]) -> None:
        super().attach(changed, contexts)
        self._inspected.meet(contexts)

    @override
    def begin_batch(self, batch: Any, batch_idx: int, kept: KeptBatch | None) -> None:
        super().begin_batch(batch, batch_idx, kept)
        self._inspected.begin_batch(batch)

    @override
    def before_backward(self, loss: Tensor) -> None:
        self._inspected.before_backward()
        super().before_backward(loss)

    @override
    def after_backward(self, report: ReportMicroBatch) -> bool:
        is_silent = self._rescaler.is_silent
        newest = tuple(window[-1] for window in self._micro_batches.values() if window)[:1]
        losses = [loss for loss, _ in newest if not is_silent]
        is_dropped = self._inspected.after_backward(losses, lambda context: report(context, newest))
        if is_dropped or is_silent:
            self._forget_micro_batch()
        if is_dropped:
            self._rescaler.drop_micro_batch()
        self._rescaler.after_backward()
        return is_dropped

    @override
    def scale(self, context: OptimizerContext) -> float | None:
        return self._rescaler.scale(context, self._inspected.scale)

    @override
    def discarded(self, context: OptimizerContext, scale: float | None) -> Discarded | None:
        if self._inspected.is_lost:
            return Discarded.DROPPED
        return super().discarded(context, scale)

    @override
    def end(self, report: StepRecord | None) -> WindowNorms | None:
        norms = None
        if report is not None and report.outcome is StepOutcome.TAKEN:
            norms = self._norms(report)
        self._inspected.end_window()
        return norms

    @override
    def detach(self) -> None:
        super().detach()
        self._inspected.detach()

    def _norms(self, report: StepRecord) -> WindowNorms | None:
        """Norms of the micro-batches and of their mean, without Lightning's division by N and the loss scale."""
        scaler = grad_scaler(self._trainer)
        return self._inspected.window_norms(
            report.total.tolist()[0] / report.accumulation_scale,
            divisor=self._rescaler.divisor,
            loss_scale=scaler.get_scale() if scaler else 1.0,
        )
