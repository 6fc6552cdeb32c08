"""The guard of one fit, which a NonFiniteGuard makes, or a GradientClipping in a Trainer without one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import LBFGS
from typing_extensions import override

from clip_callbacks.core.actions import Action, StepOutcome
from clip_callbacks.core.diagnosis import Diagnosis, Spike
from clip_callbacks.core.limit_state import StateMismatch
from clip_callbacks.core.metric_names import (
    DROPPED_MICRO_BATCHES,
    LOSS,
    LOSS_LIMIT,
    OVERFLOWED_STEPS,
    REPORTED_STEPS,
    ROLLBACKS,
    SKIPPED_STEPS,
    SPIKES,
    ZEROED_STEPS,
)
from clip_callbacks.core.nonfinite import all_finite
from clip_callbacks.core.rules import NO_SPIKE_LIMITS, ClipState
from clip_callbacks.core.spikes import Thresholds
from clip_callbacks.core.step import ACTIONS, MeasuredStep
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.guard.bad_steps import BadStepLog
from clip_callbacks.guard.counts import BadStepCounts, Counters
from clip_callbacks.guard.examination import CarriedTensors, ask_scaler, examine_step
from clip_callbacks.guard.journal import Journal
from clip_callbacks.guard.options import GuardOptions
from clip_callbacks.guard.resource import ResourceScope
from clip_callbacks.guard.restore import SkippedStepRestorer
from clip_callbacks.guard.rollback import NoRestorer, RunRestorer
from clip_callbacks.guard.run_state import HasLimitStates
from clip_callbacks.guard.thresholds import SpikeThresholds
from clip_callbacks.guard.unguarded import CLIP, Resolution, Unguarded
from clip_callbacks.trainer.compat import DATALOADER_ITER_FETCHER, is_instance
from clip_callbacks.trainer.grad_scaler import grad_scaler
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.scheduler_hold import SchedulerHold
from clip_callbacks.trainer.step_context import Discarded, KeptBatch, StepContext, StepMode

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def check_saved(saved: Mapping[str, Any]) -> None:
    """Check that a saved state of a guard can be loaded.

    Raises:
        LookupError, TypeError, ValueError: If it is damaged.
    """
    BadStepCounts(saved)
    SpikeThresholds(NO_SPIKE_LIMITS, saved)
    if "skipped_batches" in saved:
        SchedulerHold(is_on=False).load_state(saved["skipped_batches"])


class Guard(Unguarded):
    """Decides on the bad steps of one fit, counts and reports them, and restores what skipped ones have changed.

    Args:
        trainer: The Trainer.
        options: The callback's options.
        saved: Return value of :meth:`state_dict` from a checkpoint; empty at the beginning of a run.

    Attributes:
        counts: Counts of the run.
        rollback: Restorer of earlier weights.
        restorer: Restorer of skipped steps; there is one while the guard decides.
    """

    restorer: SkippedStepRestorer

    def __init__(self, trainer: Trainer, options: GuardOptions, saved: Mapping[str, Any]) -> None:
        self._options = options
        self._trainer = trainer
        self._rolls_back = options.rollback is not None
        self.drops_micro_batches = options.drops_micro_batches
        self.deferral = options.deferred
        self.spike_limits = options.limits
        self.keeps_batches = options.bundles is not None or options.trace_forward
        self.counts = BadStepCounts(saved)
        self.thresholds = SpikeThresholds(options.limits, saved)
        self.schedules = SchedulerHold(options.hold_schedulers)
        if "skipped_batches" in saved:
            self.schedules.load_state(saved["skipped_batches"])
        self.journal = Journal(options.bundles)
        # until `attach`, since a copy of the run needs the optimizers
        self.rollback = NoRestorer()
        self._carried: dict[int, CarriedTensors] = {}
        self._log = BadStepLog(options, self.counts, self.journal, self.rollback)

    @override
    def attach(
        self,
        module: LightningModule,
        contexts: Sequence[OptimizerContext],
        limits: Sequence[HasLimitStates],
    ) -> None:
        if self._options.writes_all_weights and any(context.table.reduction for context in contexts):
            raise ValueError(
                '`weights` must be "reference" or "none" with sharded parameters, got "full": a bundle is one rank\'s, and '
                "no rank has all of them. Save checkpoints."
            )
        renewed = self.is_in_use
        # asked before `setdefault` below: an optimizer that has counts already was in the checkpoint
        resumed = [] if renewed else list(self.counts.of)
        for context in contexts:
            self.counts.of.setdefault(context.index, Counters())
            self._carried.setdefault(context.index, CarriedTensors(module))
        self.thresholds.attach(contexts, renewed=renewed, resumed=resumed)
        # The resources before remove their hooks first, so that no step is watched twice.
        before = self.restorer.hand_over() if renewed else {}
        scope = ResourceScope(self._trainer, module, contexts, self.schedules, self._skipped_steps, before)
        self.restorer = SkippedStepRestorer(scope)
        # One restorer serves the whole fit: where optimizers change, it adapts the copy that it has.
        if self._options.rollback and not renewed:
            all_limits = (*limits, self.thresholds)
            self.rollback = RunRestorer(self._trainer, module, all_limits, self.schedules, self._options.rollback)
            self._log = BadStepLog(self._options, self.counts, self.journal, self.rollback)
        self.rollback.attach(contexts, self.restorer)

    @property
    def is_in_use(self) -> bool:
        """Whether this guard decides in the fit; the one of a GradientClipping does not where there is a NonFiniteGuard."""
        return hasattr(self, "restorer")

    @override
    def mismatch(self) -> StateMismatch:
        return self.thresholds.mismatch

    def _skipped_steps(self) -> int:
        return self.counts.total("skipped") + self.counts.total("overflowed")

    @property
    def checks_losses(self) -> bool:  # type: ignore[override]
        """Whether a loss that is not finite makes a step bad, whatever its gradients are."""
        return self._options.policy != "ignore"

    @property
    def takes_bad_steps(self) -> bool:  # type: ignore[override]
        """Whether steps are taken, whatever their gradients are."""
        return self._options.takes_bad_steps

    @override
    def start_fit(self) -> None:
        self.journal.start_fit(self._trainer, self._state_before)

    def _state_before(self, context: OptimizerContext) -> dict[int, Tensor]:
        return self.restorer.before(context)  # not a method of the restorer, since each `attach` makes a new one

    @override
    def keep_batch(self, batch: Any, batch_idx: int) -> KeptBatch | None:
        """Return a reference to a batch, to be kept until its step, if a bundle or a trace may need it.

        With a ``training_step`` that takes the iterator nothing is kept, because hooks are given the batch before.
        """
        kept = self.journal.keep(batch, batch_idx)
        if kept is None and self._options.trace_forward:
            kept = KeptBatch(batch, batch_idx)
        if kept is not None and is_instance(self._trainer.fit_loop._data_fetcher, DATALOADER_ITER_FETCHER):
            return None
        return kept

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        for begin_batch in self.restorer.at_batch:
            begin_batch(in_window=in_window)
        for carried in self._carried.values():
            if carried.suspects:
                carried.begin_batch()
        # without a rollback, a healthy batch does not even call the stand-in
        if self._rolls_back:
            self.rollback.begin_batch(in_window=in_window)
            self.is_stale = False

    @override
    def end_pass(self, reached: Collection[int], begun: Collection[int]) -> None:
        self.restorer.end_pass(reached, begun)

    @override
    def begin_step(self, step: StepContext) -> None:
        for begin_step in self.restorer.at_step[step.optimizer.index]:
            begin_step(step)
        if self._rolls_back:
            self.rollback.begin_step()

    @override
    def limit_states(self, index: int) -> ClipState:
        return self.thresholds.limit_states(index)

    @override
    def save_limit_states(self, index: int, states: ClipState) -> None:
        self.thresholds.save_limit_states(index, states)

    @override
    def resolve(self, step: StepContext, measured: MeasuredStep) -> Resolution:
        if step.mode is StepMode.ON_DEVICE:
            if not self._options.takes_bad_steps:
                return Resolution(Action.ON_DEVICE, holds_scale=True)
            # Lightning does not call `unscale_` for a fused optimizer, so that nobody else looks for overflows there.
            return CLIP if step.loss_scale is None else Resolution(Action.ON_DEVICE)
        if not measured.norms.is_finite:
            return self._resolve_nonfinite(step)
        if not step.is_new and _is_skipped_already(step):
            return Resolution(Action.SKIP, StepOutcome.SKIPPED, holds_scale=True)
        if self.spike_limits is not NO_SPIKE_LIMITS and measured.is_spike:
            self._count_spike(step, measured.norms.parameter_norms, measured.norms.total, measured.thresholds)
            if not self._options.takes_bad_steps:
                return Resolution(Action.SKIP, StepOutcome.SKIPPED, holds_scale=True)
        return CLIP

    def _resolve_nonfinite(self, step: StepContext, norms: Tensor | None = None) -> Resolution:
        """Decide on a step whose gradients are not finite.

        Args:
            step: The step.
            norms: Norms of the parameters' gradients on the host, if the device has decided on the step already.
        """
        counters = self.counts.of[step.optimizer.index]
        # Asked first, under every policy: the first steps of 16-mixed overflow until the scale has come down, and an error there
        # would be a false alarm (Lightning issue 9799).
        scaler = ask_scaler(step, is_over=norms is not None)
        if scaler.cures:
            counters.count(overflowed=step.is_new)
            return Resolution(Action.SKIP, StepOutcome.OVERFLOWED, is_called=False)
        policy = self._options.policy
        # A scaler that leaves unscaling to us takes no bad step, whatever the policy.
        action = Action.CLIP if step.loss_scale is None else Action.SKIP
        taken = Resolution(action, StepOutcome.IGNORED, is_called=not scaler.skips)
        if policy == "ignore":
            return taken

        if policy != "warn":
            action = ACTIONS.get(policy, Action.SKIP)
        # Setting entries to 0 would not make the scaler call the optimizer: it goes by its flag and not by the gradients.
        if scaler.skips:
            action = Action.SKIP
        number = step.number
        # read before `add`, which overwrites the number of the last bad step
        after_good_step = 0 < number != counters.last_bad + 1
        if counters.add(number, step.batch):
            # under "zero" too: a step with these gradients would move the weights that are restored
            if self._log.can_roll_back(counters.streak):
                action = Action.SKIP
            is_skipped = action is Action.SKIP and (policy != "raise" or scaler.skips)
            counters.count(skipped=is_skipped, zeroed=action is Action.ZERO, reported=policy == "warn" and not scaler.skips)
            # Steps are counted from 0: as many bad batches in a row as there were steps leave none that was good.
            no_good_step = counters.streak > number
            diagnosis = self._examine(step, after_good_step=after_good_step, no_good_step=no_good_step, norms=norms)
            self._log.nonfinite(step, diagnosis, counters, action)
        if policy == "warn":
            return taken
        if action is Action.ZERO:
            return Resolution(action, StepOutcome.ZEROED)
        if _is_in_line_search(step):
            # LBFGS is in the middle of its closure calls: its own code gets the gradients it would get, and the whole step is
            # restored when it returns.
            action = Action.CLIP
        return Resolution(action, StepOutcome.SKIPPED, holds_scale=True)

    def _examine(
        self, step: StepContext, *, after_good_step: bool = False, no_good_step: bool = False, norms: Tensor | None = None
    ) -> Diagnosis:
        """Examine everything that a bad step may come from.

        Args:
            step: The step.
            after_good_step: If True, the step before was taken with finite gradients.
            no_good_step: If True, all steps of the optimizer so far were bad.
            norms: Norms of the parameters' gradients on the host, if the device has decided on the step already.
        """
        return examine_step(
            step,
            after_good_step=after_good_step,
            traces=self._options.trace_forward,
            norms=norms,
            buffers=self.restorer.suspects(step.optimizer, no_good_step=no_good_step),
            carried=self._carried[step.optimizer.index],
            no_good_step=no_good_step,
        )

    def _count_spike(self, step: StepContext, norms: Tensor, total: Tensor, thresholds: Thresholds) -> None:
        counters = self.counts.of[step.optimizer.index]
        number = step.optimizer.history.steps
        if counters.add(number, step.batch):
            counters.add_spike(number)
            counters.count(skipped=not self._options.takes_bad_steps)
        spike = Spike.of(step.optimizer.table.names, norms, total, thresholds)
        self._log.spike(step, spike, counters)

    @override
    def drop_micro_batch(self, step: StepContext) -> None:
        diagnosis = self._examine(step)
        self._log.dropped_micro_batch(step, diagnosis)

    @override
    def count_dropped_micro_batch(self) -> None:
        self.counts.count_dropped_micro_batch()

    @override
    def discard(self, step: StepContext) -> None:
        counters = self.counts.of[step.optimizer.index]
        # Neither an overflow nor a rollback is a fault of this batch, so that no streak grows.
        if step.discarded is Discarded.OVERFLOWED:
            counters.count(overflowed=True)
            return
        if step.discarded is Discarded.STALE:
            counters.count(skipped=True)
            return
        counters.count(skipped=counters.add(step.optimizer.history.steps, step.batch))
        if step.discarded is Discarded.DROPPED:
            self._log.all_dropped(step, counters)
        else:
            self._log.discarded(step, counters)

    @override
    def end_step(self, step: StepContext, report: StepRecord, *, is_called: bool) -> None:
        # First of all, because it makes the weights and buffers of the copy those that `abort` restores.
        index = step.optimizer.index
        if self._rolls_back:
            self.rollback.restore(step)
            self.is_stale = self.rollback.is_fresh
        if report.outcome.is_skipped:
            self.restorer.abort(step, is_called=is_called)
        else:
            for commit in self.restorer.at_commit[index]:
                commit(step)
            if (carried := self._carried[index]).suspects:
                carried.end_good_step()
        if self._rolls_back:
            self.rollback.end_step(step, report)

    @override
    def end_deferred_step(self, step: StepContext, report: StepRecord) -> None:
        # otherwise the device skips nothing, and a copy of every buffer that changes would be selected in vain
        if not self._options.takes_bad_steps or step.loss_scale is not None:
            self.restorer.abort_on_device(step, report.skipped)

    @override
    def abandon(self, step: StepContext, *, is_called: bool) -> None:
        self.restorer.abandon(step, is_called=is_called)

    @override
    def collect(self, step: StepContext, report: StepRecord) -> None:
        # no host sync: the report was copied to the host while the device went on
        if not bool(report.finite):
            self._resolve_nonfinite(step, report.parameter_norms)
        elif report.thresholds.exist and bool(report.thresholds.is_exceeded):
            self._count_spike(step, report.parameter_norms, report.total_norm, report.thresholds)
        if report.outcome is StepOutcome.TAKEN and (carried := self._carried[step.optimizer.index]).suspects:
            carried.end_good_step()

    @override
    def restore_pass(self, *, is_bad: bool) -> None:
        if self._options.takes_bad_steps:
            return
        self._log.restored_buffers(self._trainer, self.restorer.restore_pass(is_bad=is_bad), "the batch")

    @override
    def abandon_windows(self, losses: Sequence[Tensor]) -> None:
        if losses and not self._options.takes_bad_steps:
            restored = self.restorer.restore_window(is_bad=not all_finite(losses))
            self._log.restored_buffers(self._trainer, restored, "a window that led to no step")

    @override
    def end_batch(self) -> None:
        for end_batch in self.restorer.after_batch:
            end_batch()
        if self._rolls_back:
            self.rollback.end_batch()

    @override
    def needs_host(self, context: OptimizerContext) -> bool:
        return self.restorer.needs_host(context)

    @override
    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        options = self._options
        if options.policy not in {"skip", "ignore"} or options.drops_micro_batches:
            return "the guard must know of bad gradients before the step is taken (its policy or its level)"
        if options.rollback is not None:
            return "rollback=Rollback(...), which must know of a good step before it is taken"
        if options.writes_all_weights and len(self._trainer.optimizers) > 1:
            return 'bundles of the weights (Bundles(weights="full")) are written before other optimizers step'
        if options.limits != NO_SPIKE_LIMITS and grad_scaler(self._trainer) is not None:
            return "a GradScaler, which sets the same attributes of the optimizer that skip_above and loss_above need"
        if self._trainer.world_size > 1 and grad_scaler(self._trainer) is not None:
            return "a GradScaler on several ranks, which must all learn whether the loss or the loss scale was the cause"
        return self.restorer.reason_against_deferral(context)

    @override
    def step_metrics(self, context: OptimizerContext, report: StepRecord) -> dict[str, Tensor | float]:
        loss = report.thresholds.loss
        metrics: dict[str, Tensor | float] = {}
        if loss is not None:
            metrics = {LOSS: loss.value, LOSS_LIMIT: loss.limit}
        return metrics | self.count_metrics(context)

    @override
    def count_metrics(self, context: OptimizerContext) -> dict[str, float]:
        counts = self.counts.metrics(context.index)
        return {name: counts[name] for name in self.metric_names()}

    @override
    def metric_names(self) -> list[str]:
        can_be = {
            OVERFLOWED_STEPS: grad_scaler(self._trainer) is not None,
            ZEROED_STEPS: self._options.policy == "zero",
            DROPPED_MICRO_BATCHES: self.drops_micro_batches,
            ROLLBACKS: self._options.rollback is not None,
            SPIKES: self._options.limits != NO_SPIKE_LIMITS,
            REPORTED_STEPS: self._options.policy == "warn",
        }
        return [SKIPPED_STEPS, *(name for name, is_so in can_be.items() if is_so)]

    @override
    def skipped_steps_of(self, index: int) -> int:
        return self.counts.of[index].skipped

    @override
    def summary(self, contexts: Sequence[OptimizerContext]) -> list[str]:
        counted = self.counts.described()
        if not counted:
            return []
        steps = sum(context.history.steps for context in contexts)
        return [f"NonFiniteGuard: optimizer steps: {steps}, {counted}."]

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, the states of both thresholds, and the position of held schedules in the epoch."""
        return self.counts.state_dict() | self.thresholds.state_dict() | {"skipped_batches": self.schedules.state()}

    @override
    def detach(self) -> None:
        if self.is_in_use:
            self.restorer.detach()
            del self.restorer
        self.rollback.detach()
        self.rollback = NoRestorer()  # frees the copy of the weights
        # the log before holds the restorer, and with it the copy
        self._log = BadStepLog(self._options, self.counts, self.journal, self.rollback)
        self.journal.detach()


def _is_in_line_search(step: StepContext) -> bool:
    """Return whether this is a further point of a line search, which is restored as a whole if any point was bad."""
    return not step.is_new and isinstance(step.optimizer.optimizer, LBFGS)


def _is_skipped_already(step: StepContext) -> bool:
    """Return whether the first pass of this step was bad: SAM needs two, and a good second one is of no use then."""
    report = step.optimizer.report
    return not _is_in_line_search(step) and report is not None and report.outcome.is_skipped
