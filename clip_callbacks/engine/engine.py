"""The one pass: rescale, measure, guard, clip, write, report, for whatever members stand in one Trainer.

The pass knows *when*; :func:`~clip_callbacks.clip_step` knows *what*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from clip_callbacks.accumulation.microbatches import MicroBatches
from clip_callbacks.core.apply import drop
from clip_callbacks.core.fused import take_back
from clip_callbacks.core.measurement import FALSE, TRUE
from clip_callbacks.core.nonfinite import NonFiniteGradientError, Policy
from clip_callbacks.core.parameters import ParameterTable
from clip_callbacks.core.step import Judge, clip_step
from clip_callbacks.core.step_report import StepReport
from clip_callbacks.engine.deferred import Deferral, Verdict
from clip_callbacks.guard.step_context import Incident
from clip_callbacks.publishing.histograms import check_histograms
from clip_callbacks.publishing.publisher import Publisher
from clip_callbacks.publishing.summary import summary_table
from clip_callbacks.stats.noise_scale import WindowNorms
from clip_callbacks.trainer.checks import check_micro_batches, check_noise_scale, check_optimizers
from clip_callbacks.trainer.components import Roles
from clip_callbacks.trainer.grad_scaler import grad_scaler, is_still_scaled, loss_scale, take_over
from clip_callbacks.trainer.optimizer_context import KEPT, KeptBatch, Lane, MicroBatch, make_lanes
from clip_callbacks.trainer.strategies import data_parallel

if TYPE_CHECKING:
    from clip_callbacks.engine.base import Member


class Pass:
    """What the members of one Trainer do together, once for each optimizer step.

    Args:
        trainer: The Trainer, its optimizers made.
        module: The module to train.
        members: The members, at least one; the first drives the pass.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, members: Sequence[Member]) -> None:
        self.leader = members[0]
        self.members = members
        self.roles = Roles.of(members)
        self.clipping, self.guard, self.rescaling = self.roles.clipping, self.roles.guard, self.roles.rescaling
        self.norm_type = next((member.norm_type for member in members if member.norm_type is not None), 2.0)
        self.publisher: Publisher | None = None
        self._batch: KeptBatch | None = None
        self._is_manual = not module.automatic_optimization
        self._warned_empty = self._in_window = self._has_backward = False
        scaler = grad_scaler(trainer)
        check_optimizers(trainer.optimizers, scaler, members)
        if self.guard and self.guard.level == "microbatch":
            check_micro_batches(trainer, module, scaler)
        if any(monitor.noise_scale for monitor in self.roles.monitors):
            check_noise_scale(trainer, module, self.rescaling)
        self._lookers = [monitor for monitor in self.roles.monitors if monitor.looks]
        self.lanes = make_lanes(trainer, module)
        if any(monitor.histograms for monitor in self._lookers):
            check_histograms(trainer, self.lanes)
        for index, history in [entry for member in members for entry in member.take_history().items()]:
            if index < len(self.lanes):
                self.lanes[index].history.load_state_dict(history)
        names = [name for name, _ in module.named_parameters()]
        for member in members:
            member.bind(self.lanes, names)
        self._equip(trainer, module)

    def _equip(self, trainer: Trainer, module: LightningModule) -> None:
        """Have what puts skipped steps back, for the parameters that the optimizers hold now."""
        self.rewind = self.guard.rewind(module, self.lanes) if self.guard else None
        self.micro_batches = self._micro_batches(trainer, module)
        self.rollback = self.guard.rollback(trainer, module, self.lanes, self.roles) if self.guard else None
        self.deferral = Deferral(trainer, module, self.roles, self.rewind)
        for lane in self.lanes:
            self.deferral.meet(lane)

    def _micro_batches(self, trainer: Trainer, module: LightningModule) -> MicroBatches | None:
        """What looks at each micro-batch, if the guard is to drop bad ones, or a monitor compares them with their mean."""
        drops = self.guard is not None and self.guard.level == "microbatch"
        if not drops and not any(monitor.noise_scale for monitor in self.roles.monitors):
            return None
        restore_buffers = self.guard is not None and self.guard.restore_buffers
        parallel = data_parallel(trainer)
        return MicroBatches(module, self.lanes, restore_buffers=restore_buffers, drops=drops, parallel=parallel)

    @property
    def skipped_steps(self) -> int:
        """Skipped optimizer steps so far, over all optimizers."""
        self.settle()
        return self.guard.skipped_steps if self.guard else 0

    def open(self, trainer: Trainer) -> None:
        """Take hold of where metrics go: training starts."""
        self.publisher = Publisher(trainer, self.roles)
        if self.guard:
            self.guard.evidence.open(trainer)

    def begin_batch(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep what a skipped step would have to put back, and the batch if it may have to be run again."""
        self._has_backward = False
        if self.guard:
            self._batch = self.guard.remember(trainer, batch, batch_idx)
        outdated = [lane for lane in self.lanes if lane.is_outdated]
        if outdated:
            self._renew(trainer, module, outdated)
        if self.rewind:
            self.rewind.begin_batch(in_window=self._in_window)
        if self.rollback:
            self.rollback.begin_batch(in_window=self._in_window)
        if self.micro_batches:
            self.micro_batches.begin_batch(batch)

    def before_backward(self, loss: Tensor) -> None:
        """Remember the loss until the step, to be looked at only if the step is bad."""
        self._in_window = self._has_backward = True
        for lane in self.lanes:
            if self._is_manual and not lane.table.has_gradients:
                lane.window.clear()  # zero_grad began another window
            lane.window.append(MicroBatch(loss.detach(), self._batch))
            if self._is_manual and len(lane.window) > KEPT:  # an optimizer that steps seldom, or never
                lane.window[-KEPT - 1] = lane.window[-KEPT - 1]._replace(kept=None)
        if self.micro_batches:
            self.micro_batches.before_backward()

    def after_backward(self, trainer: Trainer) -> None:
        """Look at the micro-batch, and drop a bad one, if that is wanted."""
        is_silent = self.rescaling is not None and self.rescaling.is_silent
        if is_silent and not self.micro_batches:
            for lane in self.lanes:
                lane.window.pop()  # its loss may be NaN, and does not count
        if self.micro_batches:
            guard = self.guard
            (micro_batch, *_) = [lane.window.pop() for lane in self.lanes]
            dropped = self.micro_batches.after_backward(
                [] if is_silent else [micro_batch.loss],
                lambda lane: guard.bad_steps.report_micro_batch(self._incident(trainer, lane, [micro_batch])) if guard else None,
            )
            if not dropped and not is_silent:
                for lane in self.lanes:
                    lane.window.append(micro_batch)
            if guard:
                guard.dropped_micro_batches += dropped
            if dropped and self.rescaling:
                self.rescaling.drop_micro_batch()

    def step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Rescale, measure, guard, clip and write the gradients of one optimizer; keep the report."""
        lane = self._lane(trainer, module, optimizer)
        self._in_window = False
        self._settle(lane)
        _raise_pending([lane])
        scaler = grad_scaler(trainer)
        is_ours = is_still_scaled(scaler, optimizer)
        if is_ours and module.automatic_optimization and not self._has_backward:
            lane.window.clear()
            if self.micro_batches:
                self.micro_batches.end_window()
            if self.rewind:
                self.rewind.schedules.settle(trainer, skipped=False)
            return  # 16-mixed and the window's last training_step returned None: Lightning will not step either
        is_new = lane.begin(trainer.global_step)
        scale = self._scale(trainer, module, lane)
        is_stale = self._begin_step(lane, is_new=is_new)
        is_lost = is_stale or scale is None or (self.micro_batches is not None and self.micro_batches.is_lost)
        lane.scale = 1.0 if scale is None else scale
        deferred = not is_lost and self.deferral.is_on(lane)
        incident = self._incident(trainer, lane, list(lane.window))
        incident.is_new, incident.loss_scale = is_new, loss_scale(scaler) if scaler and is_ours else None
        report = self._lose(lane, incident, is_stale=is_stale) if is_lost else self._clip(lane, incident, deferred=deferred)
        if scaler and is_ours:
            take_over(scaler, optimizer, TRUE if is_lost else report.finite)
        lane.window.clear()
        if deferred:
            self._send(lane, report, incident)
            return
        if self.micro_batches:
            lane.noise = self._noise(trainer, lane, report)
            self.micro_batches.end_window()
        lane.is_skipped = incident.is_undone or (lane.is_skipped and not is_new)
        if lane.is_skipped:  # LBFGS may find good points after a bad one: its step is undone all the same
            report = replace(report, skipped=TRUE)
        self._end_step(lane, incident, report)
        self._keep(lane, report, is_new=is_new)
        if isinstance(optimizer, LBFGS) and self._batch and self.guard:
            # its closure runs the batch again, with other random numbers
            self._batch = self.guard.remember(trainer, self._batch.batch, self._batch.batch_idx)

    def _begin_step(self, lane: Lane, *, is_new: bool) -> bool:
        """Keep what this step may have to put back; whether the run went back in its batch, so that its gradients mean nothing."""
        if self.rewind:
            self.rewind.begin_step(lane, is_new=is_new)
        if self.rollback:
            self.rollback.begin_step()
        return is_new and self.rollback is not None and self.rollback.is_fresh

    def _end_step(self, lane: Lane, incident: Incident, report: StepReport) -> None:
        """Undo a skipped step, and more if bad ones do not end."""
        if self.rollback:
            self.rollback.go_back(lane)
        if self.rewind:
            steps = not (incident.happened and incident.leaves_to_scaler)
            self.rewind.end_step(incident.trainer, lane, skipped=lane.is_skipped, steps=steps)
        if self.rollback:
            self.rollback.end_step(lane, report, is_new=incident.is_new)

    def _incident(self, trainer: Trainer, lane: Lane, window: list[MicroBatch]) -> Incident:
        return Incident(trainer, lane, window, is_new=True, traces=self.guard is not None and self.guard.trace_forward)

    def _look(self, lane: Lane, incident: Incident) -> None:
        """Have monitors keep what the step is about to change, if it will be logged."""
        if self.publisher and self.publisher.is_logging_step(incident.trainer):
            for monitor in self._lookers:
                monitor.look(lane, incident.loss_scale)

    def _send(self, lane: Lane, report: StepReport, incident: Incident) -> None:
        """Let the host learn of a deferred step when the next one comes, or somebody asks."""
        if self.rewind and report.skipped is not FALSE:
            self.rewind.end_deferred_step(incident.trainer, report.skipped)
        if incident.loss_scale is not None:
            incident.loss_scale = incident.loss_scale.clone()
        lane.verdict = Verdict(report, incident)
        for member in self.members:
            member.last_report = report

    def settle(self) -> None:
        """Learn of every deferred step. What is to be raised waits until all ranks come by: one of them may have asked alone."""
        for lane in self.lanes:
            self._settle(lane)

    def _settle(self, lane: Lane) -> None:
        if (verdict := lane.verdict) is None:
            return
        lane.verdict = None
        report, incident = verdict.read(), verdict.incident
        if self.guard and (report.finite is FALSE or report.skipped is TRUE):
            incident.norms = report.parameter_norms
            try:
                if report.finite is FALSE:
                    self.guard.bad_steps.judge(incident)
                else:
                    self.guard.bad_steps.judge_spike(incident, report)
            except NonFiniteGradientError as error:
                lane.error = error
                return
        lane.is_skipped = report.skipped is TRUE
        self._keep(lane, report, is_new=True)

    def _keep(self, lane: Lane, report: StepReport, *, is_new: bool) -> None:
        """Keep the report of a step: of LBFGS's closure calls the first, where the step begins, unless a later one is bad."""
        if not is_new and not lane.is_skipped:
            return
        lane.report, lane.stepped, lane.unlogged = report, True, True
        healthy = report.finite is TRUE and not lane.is_skipped
        lane.history.steps += is_new
        if healthy:
            lane.history.add(report)
        for member in self.members:
            member.observe(lane, report, healthy=healthy)

    def _scale(self, trainer: Trainer, module: LightningModule, lane: Lane) -> float | None:
        if self.rescaling:
            return self.rescaling.scale(trainer, module, lane)
        return self.micro_batches.scale if self.micro_batches and module.automatic_optimization else 1.0

    def _clip(self, lane: Lane, incident: Incident, *, deferred: bool) -> StepReport:
        if not lane.table.has_gradients:
            self._warn_empty()
        if self._lookers and incident.is_new:
            self._look(lane, incident)
        clipping, guard, index = self.clipping, self.guard, lane.index
        # a line search may come by any point: LBFGS's step is judged by where it begins
        skip_above = guard.skip_above if guard and incident.is_new else None
        ours = clipping.state_of(index) if clipping else ()
        report, state = clip_step(
            lane.table,
            (*ours, *(guard.limit_state_of(index) if guard and skip_above else ())),
            rules=clipping.rules_of(index) if clipping else (),
            norm_type=self.norm_type,
            clip_value=clipping.clip_value if clipping else None,
            nonfinite=self._nonfinite(incident, deferred=deferred),
            skip_above=skip_above,
            shadows=clipping.shadows_of(index) if clipping else (),
            scale=lane.scale,
            loss_scale=incident.loss_scale,
            fused=lane.optimizer,
            deferred=deferred,
        )
        if clipping and incident.is_new:
            clipping.keep(index, state[: len(ours)])
        if guard and skip_above:
            guard.keep_limit(index, state[len(ours) :])
            if not deferred and report.finite is TRUE and report.skipped is TRUE:
                guard.bad_steps.judge_spike(incident, report)
        return report

    def _noise(self, trainer: Trainer, lane: Lane, report: StepReport) -> WindowNorms | None:
        """Norms of the window's micro-batches and of their mean, without Lightning's division by N and the loss scale."""
        if self.micro_batches is None or report.finite is not TRUE:
            return None
        scaler = grad_scaler(trainer)
        divisor = self.rescaling.divisor if self.rescaling else trainer.accumulate_grad_batches
        total = report.total.tolist()[0] / lane.scale
        return self.micro_batches.window_norms(total, divisor=divisor, loss_scale=scaler.get_scale() if scaler else 1.0)

    def _lose(self, lane: Lane, incident: Incident, *, is_stale: bool) -> StepReport:
        """Skip a window of which nothing is left: every micro-batch was dropped, or has weight 0, or its weights are gone."""
        drop(lane.table)
        is_dropped = self.micro_batches is not None and self.micro_batches.is_lost
        if self.guard and is_stale:
            self.guard.bad_steps.skip_stale(incident)
        elif self.guard:
            self.guard.bad_steps.judge_lost(incident, is_reported=is_dropped)
        else:
            rank_zero_warn(f"Every micro-batch of the window has weight 0 at {incident}: the step is skipped.", stacklevel=2)
        report, _ = clip_step(lane.table, rules=(), norm_type=self.norm_type)
        return replace(report, finite=FALSE, skipped=TRUE)

    def _nonfinite(self, incident: Incident, *, deferred: bool) -> Policy | Judge:
        """What a bad step meets. One that the scaler leaves to us is dropped in any case: the scaler would not take it."""
        is_ours = incident.loss_scale is not None
        if self.guard is None or deferred:
            return "skip" if is_ours or (self.guard and self.guard.policy == "skip") else "ignore"
        guard = self.guard

        def judge(table: ParameterTable) -> Policy:
            policy = guard.bad_steps.judge(incident)
            return "skip" if is_ours else policy

        return judge

    def _lane(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> Lane:
        """The lane of an optimizer, made anew if it holds other parameters, or is another optimizer, than at the last step."""
        lane = next((lane for lane in self.lanes if lane.optimizer is optimizer), None)
        if lane is not None and not lane.is_outdated:
            return lane
        if lane is None:
            lane = self._adopt(trainer, module, optimizer)
        self._renew(trainer, module, [lane])
        return lane

    def _renew(self, trainer: Trainer, module: LightningModule, lanes: Sequence[Lane]) -> None:
        """Take up what optimizers hold now."""
        for lane in lanes:
            self._settle(lane)
            lane.tabulate(module)
        for member in self.members:
            member.bind(lanes, [name for lane in lanes for name in lane.table.names], renew=True)
        if self.rewind:
            self.rewind.close()
        self._equip(trainer, module)

    def _adopt(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> Lane:
        """Take up an optimizer that was put into the Trainer in mid-run; histories go on by number."""
        self.settle()
        check_optimizers([optimizer], grad_scaler(trainer), self.members)
        for lane in self.lanes:
            take_back(lane.optimizer)
        histories = {lane.index: lane.history for lane in self.lanes}
        if not any(known is optimizer for known in trainer.optimizers):
            raise RuntimeError(
                f"`optimizer` must be one of trainer.optimizers, got a {type(optimizer).__name__} that is not. Return every "
                "optimizer from configure_optimizers."
            )
        self.lanes = make_lanes(trainer, module)
        for lane in self.lanes:
            lane.history = histories.get(lane.index, lane.history)
            for member in self.members:
                member.bind([lane], lane.table.names, renew=True)
        return next(lane for lane in self.lanes if lane.optimizer is optimizer)

    def _warn_empty(self) -> None:
        if not self._warned_empty:
            self._warned_empty = True
            rank_zero_warn("No parameter has a gradient at the optimizer step: total_norm is 0. Was backward called?", stacklevel=2)

    def end_batch(self, trainer: Trainer, module: LightningModule) -> None:
        """Let schedules go on; publish what the batch's steps reported."""
        if self.rewind:
            self.rewind.end_batch()
        if self.rollback:
            self.rollback.end_batch()
        if self.publisher:
            if self.publisher.is_logging_step(trainer):
                self.settle()
                _raise_pending(self.lanes)
            self.publisher.publish(trainer, module, self.lanes)

    def end_epoch(self, trainer: Trainer) -> None:
        """Publish the metrics of the epoch."""
        self.settle()
        _raise_pending(self.lanes)
        if self.publisher:
            self.publisher.end_epoch(trainer, self.lanes)

    def summarize(self) -> None:
        """Say in one table, and in a line each what only words can say, how the training went."""
        self.settle()
        _raise_pending(self.lanes)
        if table := summary_table(self.roles, self.lanes):
            rank_zero_info(f"Gradients of the run:\n{table}")
        for member in (self.guard, *self.roles.monitors):
            for line in member.summary(self.lanes) if member else ():
                rank_zero_info(line)

    def settle_at_last(self) -> None:
        """Learn of what is pending as far as that can be done: something has raised already."""
        try:
            self.settle()
            _raise_pending(self.lanes)
        except (NonFiniteGradientError, RuntimeError) as error:
            rank_zero_warn(f"The last step's verdict, beside what stopped the run: {error}", stacklevel=2)

    def close(self) -> None:
        """Let go of the optimizers."""
        if self.rewind:
            self.rewind.close()
        if self.rollback:
            self.rollback.close()
        self.rollback = None  # its memory
        if self.guard:
            self.guard.release()
            self.guard.evidence.close()
        for monitor in self.roles.monitors:
            monitor.release()
        self._batch = None
        for lane in self.lanes:
            lane.verdict = None
            lane.window.clear()
            take_back(lane.optimizer)

    def history_state(self) -> dict[int, dict[str, Any]]:
        """What the lanes remember, by number of the optimizer."""
        self.settle()
        return {lane.index: lane.history.state_dict() for lane in self.lanes}


def _raise_pending(lanes: Sequence[Lane]) -> None:
    """Raise what verdicts on deferred steps have said, at a place that all ranks reach."""
    for lane in lanes:
        if lane.error is not None:
            error, lane.error = lane.error, None
            raise error
