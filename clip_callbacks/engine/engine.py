"""The engine of one fit, which processes the gradients of each optimizer step: rescale, measure, resolve, apply, report.

The engine decides *when* the parts are called, in an order that can be read here; the parts decide *what* is done. For a part that
no callback brings there is one that does nothing, so that the engine never asks whether a part exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from clip_callbacks.accumulation.inspected_windows import InspectedWindows
from clip_callbacks.accumulation.windows import Windows
from clip_callbacks.core.actions import Action, StepOutcome
from clip_callbacks.core.apply import drop_gradients
from clip_callbacks.core.measurement import FALSE
from clip_callbacks.core.metric_names import AMP_SCALE
from clip_callbacks.core.nonfinite import NonFiniteGradientError, all_finite
from clip_callbacks.core.reduction import shard_of
from clip_callbacks.core.rules import ClipState, Plan
from clip_callbacks.core.step import MeasuredStep, apply_step, measure_step
from clip_callbacks.core.step_record import StepRecord, as_skipped
from clip_callbacks.engine.components import Components
from clip_callbacks.engine.deferred import DeferredSteps
from clip_callbacks.engine.optimizers import Optimizers
from clip_callbacks.engine.scaler_report import report_to_scaler
from clip_callbacks.engine.step_measurer import StepMeasurer
from clip_callbacks.guard.resource import overriding
from clip_callbacks.guard.unguarded import Resolution, Unguarded
from clip_callbacks.publishing.charts import lay_out_charts
from clip_callbacks.publishing.monitor import Monitor
from clip_callbacks.publishing.publisher import Publisher
from clip_callbacks.publishing.summary import summary_table
from clip_callbacks.stats.noise_scale import WindowNorms
from clip_callbacks.trainer.bypassing_steps import BypassingSteps
from clip_callbacks.trainer.checks import CallbackFacts, check_micro_batches, check_noise_scale, check_optimizers
from clip_callbacks.trainer.deepspeed import EngineGradients, uses_deepspeed
from clip_callbacks.trainer.grad_scaler import grad_scaler, is_still_scaled, loss_scale
from clip_callbacks.trainer.later_hooks import LaterHooks
from clip_callbacks.trainer.messages import is_silent, log_message
from clip_callbacks.trainer.nan_propagation import LossNanPropagator
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.run_identity import is_running
from clip_callbacks.trainer.second_clip import SecondClip
from clip_callbacks.trainer.step_context import Discarded, MicroBatch, StepContext, StepMode
from clip_callbacks.trainer.step_counter import step_counter

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

SKIP_DISCARDED = Resolution(Action.SKIP, holds_scale=True)
"""Resolution of a step whose gradients are discarded."""

NO_RULES = Plan((), ())
"""Plan of a step whose gradients are discarded: nothing is measured."""


class StepEngine:
    """Drives all gradient callbacks of one Trainer through one fit.

    Args:
        trainer: The Trainer, its optimizers made.
        module: The module to train.
        components: The parts that take part in the fit.
        callbacks: Facts about the callbacks, for the checks.

    Attributes:
        windows: The micro-batches of accumulation windows that wait for a step.
        last_report: The report of the last optimizer step; None before the first.

    Raises:
        ValueError: If an option cannot work with this Trainer, module or optimizers.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, components: Components, callbacks: Sequence[CallbackFacts]
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._facts = callbacks
        self._clipper, self._guard, self._rescaler = components.clipper, components.guard, components.rescaler
        self._monitors = components.monitors
        self._norm_type = components.norm_type
        self._summary = components.summary
        self._scaler = grad_scaler(trainer)
        self._is_automatic = module.automatic_optimization
        self._uses_deepspeed = uses_deepspeed(trainer)
        self.last_report: StepRecord | None = None
        # the number of the epoch that the histories are in; None if no checkpoint tells
        self._epoch = next((each["epoch"] for each in components.histories.values() if "epoch" in each), None)
        self._is_first_batch = True

        self._check_trainer()
        self.windows = self._make_windows()
        self._deferred = DeferredSteps((self._clipper, self._guard, self.windows, *self._monitors), wanted=self._guard.deferral)
        self._publisher = Publisher(
            trainer,
            (self._clipper, self._guard, self._rescaler),
            self._monitors,
            clips=self._clipper.clips,
            shows=components.shows,
        )
        self._later_hooks: LaterHooks | None = None
        self._second_clip: SecondClip | None = None
        self._bypassing_steps = BypassingSteps(module)
        self._measurer = StepMeasurer(trainer, components, self.windows, self._publisher, self._bypassing_steps)
        # Ranks with copies of the parameters must decide alike, and their losses differ. No collective is added for that: a
        # non-finite loss makes a gradient NaN, and DDP averages it to all ranks. Not if such a step is taken: it would change more
        # than its own gradients do.
        self._propagates_losses = trainer.world_size > 1 and self._guard.checks_losses and not self._guard.takes_bad_steps
        self._nan_propagator = LossNanPropagator()
        self._optimizers = Optimizers(trainer, module, components, self.windows, self._deferred, callbacks, self.collect_pending)
        self._steps = step_counter(trainer, module)
        self._step_numbers: dict[int, int] = {}
        # a part that does nothing at some point is not called there
        guard, monitors = (self._guard,), self._monitors
        self._at_batch = overriding(guard, Unguarded, "begin_batch")
        self._at_step = overriding(guard, Unguarded, "begin_step")
        self._after_step = overriding(guard, Unguarded, "end_step")
        self._after_batch = overriding(guard, Unguarded, "end_batch")
        self._after_window = overriding((self.windows,), Windows, "end")
        self._observe = overriding(monitors, Monitor, "end_step")

    @property
    def ends_passes(self) -> bool:
        """Whether :meth:`after_backward` may have something to do in this fit. In manual optimization optimizers may be added."""
        return self.windows.acts_on_backward or self._propagates_losses or not self._is_automatic

    @property
    def contexts(self) -> Sequence[OptimizerContext]:
        """The contexts of the optimizers in this fit."""
        return self._optimizers.contexts

    @property
    def _engine_gradients(self) -> list[EngineGradients]:
        return [each.engine_gradients for each in self.contexts if each.engine_gradients is not None]

    def _make_windows(self) -> Windows:
        # setting gradients aside for each micro-batch is only done if a part needs it
        drops = self._guard.drops_micro_batches
        if not drops and not self._compares_micro_batches:
            return Windows(self._trainer, self._module, self._rescaler)
        return InspectedWindows(self._trainer, self._module, self._rescaler, drops=drops)

    @property
    def _compares_micro_batches(self) -> bool:
        return any(monitor.measures_micro_batches for monitor in self._monitors)

    def is_in_fit_of_another(self, trainer: Trainer) -> bool:
        """Return whether the fit is one of another Trainer, and still goes on."""
        return self._trainer is not trainer and is_running(self._trainer)

    def _check_trainer(self) -> None:
        check_optimizers(self._trainer.optimizers, self._scaler, self._facts)
        if self._guard.drops_micro_batches:
            check_micro_batches(self._trainer, self._module, self._scaler)
        if self._compares_micro_batches:
            is_weighted = any(callback.is_weighted for callback in self._facts)
            check_noise_scale(self._trainer, self._module, is_weighted=is_weighted)

    def _charts(self, context: OptimizerContext) -> dict[str, list[str]]:
        charts = self._clipper.charts(context)
        for name in (*self._guard.metric_names(), *self._rescaler.metric_names()):
            charts[name.rpartition("/")[2]] = [name]
        if self._scaler:
            charts[AMP_SCALE.rpartition("/")[2]] = [AMP_SCALE]
        return charts

    # --- a fit

    def lay_out_charts(self) -> None:
        """Group metrics into charts on the loggers; once in a fit, before the module's own hook."""
        lay_out_charts(self._trainer, {context.suffix: self._charts(context) for context in self.contexts})

    def start_fit(self, later: Sequence[Callback]) -> None:
        """Extend methods of the module, and look up loggers: training starts.

        Args:
            later: The callbacks of other packages that come later in the Trainer's list.
        """
        self._later_hooks = LaterHooks(self._module, later, self.step)
        if any(self._clipper.limits_norms_of(context.index) for context in self.contexts):
            self._second_clip = SecondClip(self._module, self._is_clipped)
        for held in self._engine_gradients:
            held.check_windows(rescales=self._rescaler.rescales)
        self._publisher.start_fit()
        self._guard.start_fit()

    def _is_clipped(self, optimizer: Optimizer) -> bool:
        return any(self._clipper.limits_norms_of(each.index) for each in self.contexts if each.optimizer is optimizer)

    def _continue_epoch(self) -> None:
        """Close the epoch of a checkpoint, or of an interrupted fit, unless the first batch of this fit continues it.

        From a checkpoint of the last batch of an epoch Lightning goes on with the first batch of the next one, and calls neither
        ``on_train_epoch_end`` nor ``on_train_epoch_start`` in between. After an error an epoch begins again.
        """
        epoch = self._trainer.current_epoch
        if self._trainer.fit_loop.batch_idx == 0 or self._epoch not in {None, epoch}:
            self._publisher.close_epoch(self.contexts)
        self._epoch, self._is_first_batch = epoch, False

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Save the state that a skipped step restores, and the batch if it may be run again."""
        kept = None
        if self._guard.keeps_batches:
            kept = self._guard.keep_batch(batch, batch_idx)
        if self._is_first_batch:
            self._continue_epoch()
        if self.windows.in_window and self.windows.is_zeroed:  # since its last batch: those batches lead to no step
            self._abandon_windows()
        self._optimizers.update()  # BaseFinetuning adds parameters at the start of an epoch
        if self._uses_deepspeed and not self.windows.in_window:
            for held in self._engine_gradients:
                held.begin_window()
        if not self._bypassing_steps.is_over:
            self._bypassing_steps.begin_batch(self._optimizers.contexts)
        for begin in self._at_batch:
            begin(in_window=self.windows.in_window)
        self.windows.begin_batch(batch, batch_idx, kept)

    def _abandon_windows(self) -> None:
        """Discard windows that no step will follow."""
        self._guard.abandon_windows(self.windows.abandon())

    def before_backward(self, loss: Tensor) -> None:
        """Keep the loss until the step."""
        if self._optimizers.may_materialize:  # by the forward pass that has just run
            self._optimizers.update_materialized()
        if self.windows.acts_on_backward or self.windows.looks_at_gradients:
            self._optimizers.update()
        # in this batch, as Lightning does where `accumulate_grad_batches` has changed
        if self.windows.in_window and self.windows.is_zeroed:
            self._abandon_windows()
        self.windows.before_backward(loss)
        if self._propagates_losses and not self._rescaler.has_zero_weight:
            self._nan_propagator.begin_pass(loss, self._optimizers.contexts)

    def after_backward(self) -> None:
        """Inspect the micro-batch, and drop it if it is bad and the guard works on micro-batches."""
        if self._propagates_losses:
            self._nan_propagator.end_pass()
        if not self._is_automatic:  # else every pass belongs to the window of the one optimizer
            reached, begun = self.windows.end_pass()
            if len(self._optimizers.contexts) > 1:
                self._guard.end_pass(reached, begun)
        if self.windows.acts_on_backward and self.windows.after_backward(self._report_micro_batch):
            self._guard.count_dropped_micro_batch()

    def _report_micro_batch(self, context: OptimizerContext, newest: tuple[MicroBatch, ...]) -> None:
        self._guard.drop_micro_batch(StepContext(self._trainer, context, StepMode.ON_HOST, newest))

    def before_step(self, optimizer: Optimizer) -> None:
        """Run the step now, or leave it to :class:`LaterHooks` if the module's own hook may change gradients after this one."""
        later = self._later_hooks
        if later is not None and later.runs_after_module:
            return
        is_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # as torch.no_grad() does, which takes four calls of Python
        try:
            self.step(optimizer)
        finally:
            torch._C._set_grad_enabled(is_enabled)
        if later is not None and later.compares_gradients:
            later.record_gradients(self._optimizers.context_of(optimizer).table)

    def step(self, optimizer: Optimizer) -> None:
        """Rescale, measure, clip or skip the gradients of one optimizer; record the report. Call it under ``torch.no_grad()``."""
        context = self._optimizers.context_of(optimizer)
        if context.engine_gradients is not None and not context.engine_gradients.collect():
            return  # DeepSpeed has this hook called at every micro-batch
        if not self._bypassing_steps.is_over:
            self._bypassing_steps.record_step(context)
        if self._deferred.is_in_use:
            # the report of the step before; here all ranks come by, so that an error may be raised
            self._deferred.collect(context, self._receive)
            self._deferred.raise_errors([context])
        step = self._describe(context)
        if step.mode is StepMode.NOT_TAKEN:
            self._abandon(step)
            return

        for begin in self._at_step:
            begin(step)
        # measure | resolve | apply: gradients are read once, then the guard decides, and one function writes
        if step.mode is StepMode.DISCARDED:
            resolution, report = SKIP_DISCARDED, self._discard(step)
        else:
            measured, states = self._measurer.measure(step)
            resolution = self._guard.resolve(step, measured)
            report = self._apply(step, measured, states, resolution)
        if self._scaler is not None:
            # after the write, and before scaler.step, which reads the state set here
            report_to_scaler(self._scaler, step, report, resolution)
        if report.outcome.is_skipped:
            # optimizers that share parameters with this one have lost those gradients
            self.windows.discard_others(step, report.outcome)
        self.windows.clear(context)
        if step.mode is StepMode.ON_DEVICE:
            self._defer(step, report)
        else:
            self._finish(step, report, is_called=resolution.is_called)

    def _describe(self, context: OptimizerContext) -> StepContext:
        """Find out which step this is and how it is decided."""
        trainer, scale_of_loss = self._trainer, None
        if self._scaler is not None and is_still_scaled(self._scaler, context.optimizer):
            if self._is_automatic and not self.windows.has_backward:
                # the last training_step of the window returned None: Lightning's MixedPrecision.optimizer_step neither
                # unscales nor steps
                return StepContext(trainer, context, StepMode.NOT_TAKEN, ())
            scale_of_loss = loss_scale(self._scaler)
        if self._is_automatic and not self.windows.in_window and not context.table.has_gradients:
            # every training_step of the window returned None: the optimizer is called without gradients
            return StepContext(trainer, context, StepMode.NOT_TAKEN, ())
        # LBFGS calls its closure, and with it this hook, several times while global_step stays
        step_number = self._steps.completed
        is_new = step_number != self._step_numbers.get(context.index)
        self._step_numbers[context.index] = step_number
        micro_batches, scale, discarded = self.windows.of_step(context)
        if is_new and self._guard.is_stale:
            # another optimizer's step of this batch has led to a rollback
            discarded = Discarded.STALE
        mode = StepMode.ON_HOST
        if discarded is not None:
            mode = StepMode.DISCARDED
        elif (
            context.index in self._deferred.possible and self._deferred.applies_to(context) and not self._guard.needs_host(context)
        ):
            # no host sync: the fused optimizer skips by its found_inf
            mode = StepMode.ON_DEVICE
        return StepContext(trainer, context, mode, micro_batches, is_new, scale, scale_of_loss, discarded)

    def _abandon(self, step: StepContext) -> None:
        """Clear the window of a step that is not taken."""
        self.windows.clear(step.optimizer)
        self.windows.end(None)
        # without a GradScaler Lightning calls the optimizer all the same
        self._guard.abandon(step, is_called=self._scaler is None)

    def _discard(self, step: StepContext) -> StepRecord:
        """Skip an accumulation window without usable gradients.

        All its micro-batches were dropped, all have weight 0, or a rollback has replaced the weights they were computed with.
        """
        table = step.optimizer.table
        drop_gradients(table)  # None, not zero: with zero gradients AdamW still decays weights and moves by its moments
        self._guard.discard(step)
        measured = measure_step(table, NO_RULES, (), self._norm_type)
        report, _ = apply_step(measured, (), Action.SKIP)
        outcome = StepOutcome.SKIPPED
        if step.discarded is Discarded.OVERFLOWED:
            outcome = StepOutcome.OVERFLOWED
        return replace(report, finite=FALSE, outcome=outcome)

    def _apply(self, step: StepContext, measured: MeasuredStep, states: ClipState, resolution: Resolution) -> StepRecord:
        """Carry out the resolution, and save the states of limits."""
        index, clip_value = step.optimizer.index, self._clipper.clip_value
        report, states = apply_step(measured, states, resolution.action, clip_value=clip_value, fused=step.optimizer.optimizer)
        if resolution.outcome is not None and resolution.outcome is not report.outcome:
            # such as an overflow, whose step the GradScaler skips by itself
            report = as_skipped(report, resolution.outcome)
        if step.is_new and measured.plan.remembers:  # of closure calls of LBFGS the first one counts
            count = measured.plan.count_of_clipping
            self._clipper.save_limit_states(index, states[:count])
            self._guard.save_limit_states(index, states[count:])
        return report

    def _defer(self, step: StepContext, report: StepRecord) -> None:
        """Leave the report on the device until the next step, or until it is asked for."""
        self._guard.end_deferred_step(step, report)
        if step.loss_scale is not None:
            step = replace(step, loss_scale=step.loss_scale.clone())  # the scaler changes its scale in place
        self._deferred.enqueue(step, report)
        self.last_report = report

    def _receive(self, step: StepContext, report: StepRecord) -> None:
        """Receive the report of a deferred step."""
        self._guard.collect(step, report)
        self._record(step, report, None)

    def _finish(self, step: StepContext, report: StepRecord, *, is_called: bool) -> None:
        """Restore the state before a skipped step, and record the report."""
        context = step.optimizer
        if context.engine_gradients is not None:
            # its engine does not call the optimizer in a step that it skips
            is_called = False
            if report.outcome.is_skipped:
                context.engine_gradients.skip()
            context.engine_gradients.release()
        noise = None
        for end_window in self._after_window:
            noise = end_window(report)
        if not step.is_new and context.report is not None and context.report.outcome.is_skipped:
            # a later closure call of LBFGS may be good, but the step began with a bad one and is skipped as a whole
            report = as_skipped(report, context.report.outcome)
        for end in self._after_step:
            end(step, report, is_called=is_called)
        if step.is_new or report.outcome.is_skipped:  # of closure calls the first one counts, or a bad one
            self._record(step, report, noise)
        if isinstance(context.optimizer, LBFGS) and (kept := self.windows.kept):
            # its next closure call runs the batch again, with other random numbers
            self.windows.keep_again(self._guard.keep_batch(kept.batch, kept.batch_idx))

    def _record(self, step: StepContext, report: StepRecord, noise: WindowNorms | None) -> None:
        """Record the report of a step in the history and the monitors."""
        context = step.optimizer
        context.record(report, is_new=step.is_new, is_healthy=report.outcome is StepOutcome.TAKEN)
        for observe in self._observe:
            observe(context, report, noise)
        self.last_report = report

    def end_batch(self, outputs: Any) -> None:
        """Advance schedules; publish the metrics of the batch's steps."""
        if not self._bypassing_steps.is_over:
            self._bypassing_steps.end_batch(may_train=self.windows.has_backward or not self._is_automatic)
        if not self.windows.has_backward and self.windows.is_idle:
            # forward passes that no step follows, as when SWA recomputes batch statistics, may still have made buffers non-finite
            is_bad = self._is_automatic and _is_bad_loss(outputs)
            self._guard.restore_pass(is_bad=is_bad)
        for end in self._after_batch:
            end()
        is_logging_step = self._publisher.batches_before_log == 0
        if is_logging_step and self._is_automatic:
            # not before the window has stepped; asked last, since it takes a dozen calls
            is_logging_step = not self._trainer.fit_loop._should_accumulate()
        if is_logging_step:  # all ranks log at the same steps, so that all of them may raise here
            self._collect_and_raise()
        self._publisher.end_batch(self._module, self._optimizers.contexts, is_logging_step=is_logging_step)

    def end_epoch(self) -> None:
        """Discard windows that no step will follow; publish the metrics of the epoch."""
        self._bypassing_steps.end_epoch()
        self._collect_and_raise()
        self._abandon_windows()  # Lightning sets gradients to zero at the first batch of the next epoch
        self._publisher.end_epoch(self.contexts)
        self._epoch = self._trainer.current_epoch + 1

    def end_fit(self) -> None:
        """Log a summary of the run: one table, and single lines for what does not fit into it."""
        self._bypassing_steps.end_epoch()
        self._collect_and_raise()
        if self._summary and not is_silent(self._trainer):
            for text in self._summary_texts():
                log_message(self._trainer, text)

    def _summary_texts(self) -> list[str]:
        table = summary_table(self.contexts, clips=self._clipper.clips, skipped_steps_of=self._guard.skipped_steps_of)
        texts = [f"Gradients of the run:\n{table}"] if table else []
        texts += self._guard.summary(self.contexts)
        for monitor in self._monitors:
            texts += monitor.summary(self.contexts)
        return texts

    def detach(self) -> None:
        """Remove all hooks from the module and its optimizers, and release them."""
        for hook in (self._second_clip, self._later_hooks):
            if hook is not None:
                hook.detach()
        self._second_clip = self._later_hooks = None
        self._bypassing_steps.detach()
        self._guard.detach()
        for monitor in self._monitors:
            monitor.detach()
        for held in self._engine_gradients:
            held.detach()
        self.windows.detach()
        self._nan_propagator.end_pass()
        self._deferred.detach()
        self._optimizers.detach()

    # --- deferred steps

    def collect_pending(self) -> None:
        """Collect the reports of all deferred steps.

        Errors are stored and raised later, at a point that every rank reaches, because a single rank may have called this.
        """
        for context in self.contexts:
            self._deferred.collect(context, self._receive)

    def _collect_and_raise(self) -> None:
        self.collect_pending()
        self._deferred.raise_errors(self.contexts)

    def collect_after_error(self) -> None:
        """Collect the reports of deferred steps after an exception; a further error becomes a warning."""
        try:
            self._collect_and_raise()
        except (NonFiniteGradientError, RuntimeError) as error:
            self._deferred.detach()  # the state is saved next, and after an error of the device every read raises again
            rank_zero_warn(f"The run was stopped by another exception. The report of its last step: {error}", stacklevel=2)
        self._publisher.end_after_error(self.contexts)

    # --- state

    @property
    def skipped_steps(self) -> int:
        """The number of optimizer steps skipped so far, over all optimizers."""
        self.collect_pending()
        return sum(self._guard.skipped_steps_of(context.index) or 0 for context in self.contexts)

    def history_state(self) -> dict[int, dict[str, Any]]:
        """Return the states of the optimizers' histories, by the number of the optimizer."""
        self.collect_pending()
        common = {"norm_type": self._norm_type, "epoch": self._epoch}
        return {context.index: context.history_state() | common for context in self.contexts}


def _is_bad_loss(outputs: Any) -> bool:
    """Return whether the outputs that Lightning passes to ``on_train_batch_end`` hold a non-finite loss."""
    if not isinstance(outputs, dict):
        return False
    loss = outputs.get("loss")
    return isinstance(loss, Tensor) and not all_finite([shard_of(loss)])
