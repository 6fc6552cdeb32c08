"""The one pass over the gradients of each optimizer step: rescale, measure, resolve, apply, report.

The engine knows *when*; the parts know *what*. It calls them in an explicit order, and asks none of them whether it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, Optimizer

from clip_callbacks.accumulation.windows import InspectedWindows, Windows
from clip_callbacks.core.actions import Action, StepOutcome
from clip_callbacks.core.apply import drop
from clip_callbacks.core.measurement import FALSE
from clip_callbacks.core.metric_names import AMP_SCALE
from clip_callbacks.core.nonfinite import NonFiniteGradientError, all_finite
from clip_callbacks.core.reduction import shard_of
from clip_callbacks.core.rules import ClipState, Plan
from clip_callbacks.core.step import MeasuredStep, apply_step, measure_step
from clip_callbacks.core.step_record import StepRecord, as_undone
from clip_callbacks.engine.components import Components
from clip_callbacks.engine.deferred import DeferredSteps
from clip_callbacks.engine.optimizers import Optimizers
from clip_callbacks.guard.unguarded import Resolution
from clip_callbacks.publishing.charts import lay_out_charts
from clip_callbacks.publishing.publisher import Publisher
from clip_callbacks.publishing.summary import summary_table
from clip_callbacks.stats.noise_scale import WindowNorms
from clip_callbacks.trainer.bypassing_steps import BypassingSteps
from clip_callbacks.trainer.checks import CallbackFacts, check_micro_batches, check_noise_scale, check_optimizers
from clip_callbacks.trainer.grad_scaler import (
    grad_scaler,
    is_incurable,
    is_still_scaled,
    keep_scale,
    keep_scale_where,
    loss_scale,
    mark_unscaled,
)
from clip_callbacks.trainer.later_hooks import LaterHooks
from clip_callbacks.trainer.messages import is_silent, log_message
from clip_callbacks.trainer.nan_propagation import LossNanPropagator
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.second_clip import SecondClip
from clip_callbacks.trainer.step_context import Discarded, MicroBatch, StepContext, StepMode

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

DISCARD = Resolution(Action.SKIP, holds_scale=True)
"""What is done about gradients that mean nothing."""

NOTHING = Plan((), (), None, by_unit=False)
"""The plan of a step whose gradients mean nothing."""


class StepEngine:
    """Drives all gradient callbacks of one Trainer through one fit.

    Args:
        trainer: The Trainer, its optimizers made.
        module: The module to train.
        components: What takes part.
        callbacks: What the checks need to know of the callbacks.

    Attributes:
        windows: The micro-batches that wait for steps.
        last_report: The report of the last optimizer step; None before the first.

    Raises:
        ValueError: If something asked for cannot be done with this Trainer, module or optimizers.
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
        self._readers = [monitor for monitor in self._monitors if monitor.reads_before_write]
        self._scaler = grad_scaler(trainer)
        self._is_automatic = module.automatic_optimization
        self._has_warned_of_no_gradient = False
        self.last_report: StepRecord | None = None

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
        self._judges_losses = self._guard.judges_losses
        self._last_hook: LaterHooks | None = None
        self._second_clip: SecondClip | None = None
        self._bypassing_steps = BypassingSteps(module)
        # Ranks that hold copies of the parameters must decide alike, and no collective tells them of one another's losses: a bad
        # one makes a gradient NaN there, before gradients are averaged.
        self._propagates_losses = trainer.world_size > 1 and self._judges_losses
        self._nan_propagator = LossNanPropagator()
        self._optimizers = Optimizers(trainer, module, components, self.windows, self._deferred, callbacks)

    @property
    def contexts(self) -> Sequence[OptimizerContext]:
        """What each optimizer has in this fit."""
        return self._optimizers.contexts

    def _make_windows(self) -> Windows:
        drops = self._guard.drops_micro_batches
        if not drops and not self._compares_micro_batches:
            return Windows(self._trainer, self._module, self._rescaler)
        restore_buffers = self._guard.restores_buffers
        return InspectedWindows(self._trainer, self._module, self._rescaler, drops=drops, restore_buffers=restore_buffers)

    @property
    def _compares_micro_batches(self) -> bool:
        return any(monitor.options.noise_scale for monitor in self._monitors)

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
        """Tell loggers which metrics belong together; once for a fit, before the module's own hook."""
        lay_out_charts(self._trainer, {context.suffix: self._charts(context) for context in self.contexts})

    def start_fit(self, later: Sequence[Callback]) -> None:
        """Take hold of where metrics and bad steps go: training starts.

        Args:
            later: The callbacks that come later in the Trainer's list, those of the family left out.
        """
        self._last_hook = LaterHooks(self._module, later, self.step)
        if any(self._clipper.limits_norms_of(context.index) for context in self.contexts):
            self._second_clip = SecondClip(self._module, self._is_clipped)
        self._publisher.start_fit()
        self._guard.start_fit()

    def _is_clipped(self, optimizer: Optimizer) -> bool:
        context = self._optimizers.find(optimizer)
        return context is not None and self._clipper.limits_norms_of(context.index)

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Keep what a skipped step would have to put back, and the batch if it may have to be run again."""
        kept = self._guard.keep_batch(batch, batch_idx)
        if self._optimizers.outdated:
            self._renew()
        self._bypassing_steps.begin_batch(self.contexts)
        self._guard.begin_batch(in_window=self.windows.in_window)
        self.windows.begin_batch(batch, batch_idx, kept)

    def before_backward(self, loss: Tensor) -> None:
        """Remember the loss until the step."""
        self._take_in_shapes()
        if self.windows.looks_at_passes and self._optimizers.outdated:
            self._renew()
        self.windows.before_backward(loss)
        if self._propagates_losses and not self._rescaler.is_silent:
            self._nan_propagator.begin_pass(loss, self.contexts)

    def after_backward(self) -> None:
        """Look at the micro-batch, and drop a bad one, if that is wanted."""
        if self._propagates_losses:
            self._nan_propagator.end_pass()
        if len(self.contexts) > 1:
            self._guard.end_pass(*self.windows.end_pass())
        if self.windows.after_backward(self._report_micro_batch):
            self._guard.count_dropped_micro_batch()

    def _report_micro_batch(self, context: OptimizerContext, newest: tuple[MicroBatch, ...]) -> None:
        self._guard.drop_micro_batch(StepContext(self._trainer, context, StepMode.ON_HOST, newest))

    def before_step(self, optimizer: Optimizer) -> None:
        """Run the pass now, or leave it to the module's own hook, which may change gradients and is called last."""
        last = self._last_hook
        if last is None or not last.runs_after_module:
            self.step(optimizer)
            if last is not None and last.compares_gradients:
                last.record_gradients(self._context(optimizer).table)

    def step(self, optimizer: Optimizer) -> None:
        """Rescale, measure, resolve and apply the gradients of one optimizer; keep the report."""
        with torch.no_grad():  # as a decorator it takes three more calls
            self._step(optimizer)

    def _step(self, optimizer: Optimizer) -> None:
        context = self._context(optimizer)
        self._bypassing_steps.record_step(context)
        if self._deferred.is_in_use:
            self._deferred.collect(context, self._learn)
            self._deferred.raise_errors([context])
        step = self._describe(context)
        if step.mode is StepMode.NOT_TAKEN:
            self._abandon(step)
            return

        self._guard.begin_step(step)
        if step.mode is StepMode.DISCARDED:
            resolution, report = DISCARD, self._discard(step)
        else:
            measured, states = self._measure(step)
            resolution = self._guard.resolve(step, measured)
            report = self._apply(step, measured, states, resolution)
        if self._scaler is not None:  # after the write, and before the scaler's own step
            self._tell_scaler(self._scaler, step, report, resolution)
        if report.outcome.is_skipped:
            self.windows.spoil_others(step, report.outcome)
        self.windows.clear(context)
        if step.mode is StepMode.ON_DEVICE:
            self._defer(step, report)
        else:
            self._finish(step, report, is_called=resolution.is_called)

    def _tell_scaler(self, scaler: GradScaler, step: StepContext, report: StepRecord, resolution: Resolution) -> None:
        """Tell the GradScaler what was found where it has left unscaling to us, and nothing of what no loss scale would cure."""
        optimizer = step.optimizer.optimizer
        if resolution.holds_scale and step.mode is not StepMode.ON_DEVICE:
            keep_scale(scaler, optimizer)
        elif step.loss_scale is not None:
            mark_unscaled(scaler, optimizer, report.finite)
            if resolution.holds_scale:
                keep_scale_where(scaler, optimizer, report.finite.logical_not() & is_incurable(step.losses, step.loss_scale))

    def _describe(self, context: OptimizerContext) -> StepContext:
        """Find out which step this is, and how it is to be decided; nothing is changed."""
        trainer, scale_of_loss = self._trainer, None
        if self._scaler is not None and is_still_scaled(self._scaler, context.optimizer):
            if self._is_automatic and not self.windows.has_backward:
                # 16-mixed, and the window's last training_step returned None: Lightning will not step either
                return StepContext(trainer, context, StepMode.NOT_TAKEN, ())
            scale_of_loss = loss_scale(self._scaler)
        if self._is_automatic and not self.windows.in_window and not context.table.has_gradients:
            # every training_step of the window returned None: the optimizer is called, and has nothing to do
            return StepContext(trainer, context, StepMode.NOT_TAKEN, ())
        is_new = context.begins_step(trainer.global_step)
        scale = self.windows.scale(context)
        discarded = self.windows.discarded(context, scale)
        if is_new and self._guard.is_stale:
            discarded = Discarded.STALE
        mode = StepMode.ON_HOST
        if discarded is not None:
            mode = StepMode.DISCARDED
        elif self._deferred.applies_to(context) and not self._guard.needs_host(context):
            mode = StepMode.ON_DEVICE
        return StepContext(
            trainer,
            context,
            mode,
            self.windows.micro_batches(context),
            is_new,
            1.0 if scale is None else scale,
            scale_of_loss,
            discarded,
        )

    def _abandon(self, step: StepContext) -> None:
        """Forget the window of a step that is none."""
        self.windows.clear(step.optimizer)
        self.windows.end(None)
        # with a GradScaler that has not unscaled, Lightning does not call the optimizer
        self._guard.abandon(step, is_called=self._scaler is None)

    def _discard(self, step: StepContext) -> StepRecord:
        """Skip a window without usable gradients: all micro-batches dropped, all weights 0, or the weights they belong to gone."""
        table = step.optimizer.table
        drop(table)
        self._guard.discard(step)
        measured = measure_step(table, NOTHING, (), self._norm_type)
        report, _ = apply_step(measured, (), Action.SKIP)
        outcome = StepOutcome.OVERFLOWED if step.discarded is Discarded.OVERFLOWED else StepOutcome.SKIPPED
        return replace(report, finite=FALSE, outcome=outcome)

    def _measure(self, step: StepContext) -> tuple[MeasuredStep, ClipState]:
        """Read the gradients; with what was measured, the states of all limits that have a say."""
        context, index = step.optimizer, step.optimizer.index
        if len(context.table) and not context.table.has_gradients and not self._bypassing_steps.is_bypassed(context):
            self._warn_of_no_gradient()
        if self._readers and step.is_new and self._publisher.is_logging_step:
            for monitor in self._readers:
                monitor.before_write(step)
        ceiling = self._guard.ceiling(step)
        plan = Plan.of(context.table, self._clipper.rules_of(index), self._clipper.shadows_of(index), ceiling)
        states = self._clipper.limit_states(index)
        if ceiling is not None:
            states = (*states, *self._guard.limit_states(index))
        measured = measure_step(
            context.table,
            plan,
            states,
            self._norm_type,
            scale=step.scale,
            loss_scale=step.loss_scale,
            deferred=step.mode is StepMode.ON_DEVICE,
            losses=step.losses if self._judges_losses and (not self._propagates_losses or context.table.reduction) else None,
        )
        return measured, states

    def _apply(self, step: StepContext, measured: MeasuredStep, states: ClipState, resolution: Resolution) -> StepRecord:
        """Do what was decided, and keep the states of limits."""
        index, clip_value = step.optimizer.index, self._clipper.clip_value
        report, states = apply_step(measured, states, resolution.action, clip_value=clip_value, fused=step.optimizer.optimizer)
        if resolution.outcome is not None and resolution.outcome is not report.outcome:
            report = as_undone(report, resolution.outcome)
        if step.is_new and measured.plan.remembers:
            count = measured.plan.count_of_clipping
            self._clipper.save_limit_states(index, states[:count])
            self._guard.save_limit_states(index, states[count:])
        return report

    def _defer(self, step: StepContext, report: StepRecord) -> None:
        """Let the host learn of a step when the next one comes, or somebody asks."""
        self._guard.end_deferred_step(step, report)
        if step.loss_scale is not None:
            step = replace(step, loss_scale=step.loss_scale.clone())  # the scaler changes its own in place
        self._deferred.enqueue(step, report)
        self.last_report = report

    def _learn(self, step: StepContext, report: StepRecord) -> None:
        """Take in the report of a deferred step."""
        self._guard.collect(step, report)
        self._keep(step, report, None)

    def _finish(self, step: StepContext, report: StepRecord, *, is_called: bool) -> None:
        """Undo a skipped step, and keep the report."""
        context = step.optimizer
        noise = self.windows.end(report)
        if not step.is_new and context.report is not None and context.report.outcome.is_skipped:
            # LBFGS may find good points after a bad one: its step is undone all the same
            report = as_undone(report, context.report.outcome)
        self._guard.end_step(step, report, is_called=is_called)
        if step.is_new or report.outcome.is_skipped:  # of closure calls the first counts, where the step begins, or a bad one
            self._keep(step, report, noise)
        if isinstance(context.optimizer, LBFGS) and (kept := self.windows.kept):
            # its closure runs the batch again, with other random numbers
            self.windows.keep_anew(self._guard.keep_batch(kept.batch, kept.batch_idx))

    def _keep(self, step: StepContext, report: StepRecord, noise: WindowNorms | None) -> None:
        """Have everybody learn what came of a step."""
        context = step.optimizer
        context.record(report, is_new=step.is_new, is_healthy=report.outcome is StepOutcome.TAKEN)
        self._publisher.note_step(context)
        for monitor in self._monitors:
            monitor.end_step(context, report, noise)
        self.last_report = report

    def end_batch(self, outputs: Any) -> None:
        """Let schedules go on; publish what the batch's steps reported."""
        self._bypassing_steps.end_batch(may_train=self.windows.has_backward or not self._is_automatic)
        if self.windows.is_idle:
            is_bad = self._is_automatic and _is_bad_loss(outputs)
            self._guard.undo_pass(is_bad=is_bad)
        self._guard.end_batch()
        is_logging_step = self._publisher.is_logging_step
        if is_logging_step:
            self._collect_and_raise()
        self._publisher.end_batch(self._module, self.contexts, is_logging_step=is_logging_step)

    def end_epoch(self) -> None:
        """Undo what nobody will step for; publish the metrics of the epoch."""
        self._bypassing_steps.end_epoch()
        self._collect_and_raise()
        self._guard.end_epoch(self.windows.end_epoch())
        self._publisher.end_epoch(self.contexts)

    def end_fit(self) -> None:
        """Say in one table, and in a line each what only words can say, how the training went."""
        self._bypassing_steps.end_epoch()
        self._collect_and_raise()
        if self._summary and not is_silent(self._trainer):
            for text in self._summed_up():
                log_message(self._trainer, text)

    def _summed_up(self) -> list[str]:
        table = summary_table(self.contexts, clips=self._clipper.clips, skipped_steps_of=self._guard.skipped_steps_of)
        texts = [f"Gradients of the run:\n{table}"] if table else []
        texts += self._guard.summary(self.contexts)
        for monitor in self._monitors:
            texts += monitor.summary(self.contexts)
        return texts

    def detach(self) -> None:
        """Let go of the module and its optimizers, and leave no hook on them."""
        for hook in (self._second_clip, self._last_hook):
            if hook is not None:
                hook.detach()
        self._second_clip = self._last_hook = None
        self._bypassing_steps.detach()
        self._guard.detach()
        for monitor in self._monitors:
            monitor.detach()
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
            self._deferred.collect(context, self._learn)

    def _collect_and_raise(self) -> None:
        self.collect_pending()
        self._deferred.raise_errors(self.contexts)

    def collect_after_error(self) -> None:
        """Collect what is pending as far as that can be done: something has raised already."""
        try:
            self._collect_and_raise()
        except (NonFiniteGradientError, RuntimeError) as error:
            self._deferred.detach()  # what has not come by now will not come
            rank_zero_warn(f"The last step's verdict, beside what stopped the run: {error}", stacklevel=2)

    # --- what is remembered

    @property
    def skipped_steps(self) -> int:
        """Skipped optimizer steps so far, over all optimizers."""
        self.collect_pending()
        return sum(self._guard.skipped_steps_of(context.index) or 0 for context in self.contexts)

    def history_state(self) -> dict[int, dict[str, Any]]:
        """What the optimizers' histories hold, by number of the optimizer."""
        self.collect_pending()
        return {context.index: context.history_state() | {"norm_type": self._norm_type} for context in self.contexts}

    # --- optimizers that change in the middle of a fit

    def _context(self, optimizer: Optimizer) -> OptimizerContext:
        """The context of an optimizer, made anew if it holds other parameters, or is another optimizer, than at the last step."""
        self._take_in_shapes()
        context = self._optimizers.find(optimizer)
        if context is None:
            self.collect_pending()
            self._publisher.reset()
            return self._optimizers.take_up(optimizer)
        if context.is_outdated:
            self._renew()
        return context

    def _take_in_shapes(self) -> None:
        """Take up parameters of lazy modules once a forward pass has given them shapes."""
        if self._optimizers.may_grow and self._optimizers.grown:
            self.collect_pending()
            self._optimizers.take_in_shapes()

    def _renew(self) -> None:
        """Take up what optimizers hold now; reports of deferred steps are of what they held before."""
        self.collect_pending()
        self._optimizers.renew()

    def _warn_of_no_gradient(self) -> None:
        if not self._has_warned_of_no_gradient:
            self._has_warned_of_no_gradient = True
            rank_zero_warn("No parameter has a gradient at the optimizer step: total_norm is 0. Was backward called?", stacklevel=2)


def _is_bad_loss(outputs: Any) -> bool:
    """Whether what ``training_step`` returned, as Lightning hands it on, is a loss that is not finite."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else None
    return isinstance(loss, Tensor) and not all_finite([shard_of(loss)])
