"""The guard of one fit: the part that NonFiniteGuard, or a GradientClipping by itself, makes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import LBFGS
from typing_extensions import override

from clip_callbacks.core.actions import Action, StepOutcome
from clip_callbacks.core.diagnosis import Findings, Spike
from clip_callbacks.core.limit_state import Misfits
from clip_callbacks.core.limits import Limit
from clip_callbacks.core.metric_names import DROPPED_MICRO_BATCHES, OVERFLOWED_STEPS, ROLLBACKS, SKIPPED_STEPS, ZEROED_STEPS
from clip_callbacks.core.nonfinite import all_finite
from clip_callbacks.core.rules import ClipState
from clip_callbacks.core.step import ACTIONS, MeasuredStep
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.guard.bad_steps import BadStepCounts, BadStepLog, Counters
from clip_callbacks.guard.examination import CarriedTensors, ask_scaler, look_at
from clip_callbacks.guard.journal import Journal
from clip_callbacks.guard.options import GuardOptions
from clip_callbacks.guard.resource import ResourceScope
from clip_callbacks.guard.restore import SkippedStepRestorer
from clip_callbacks.guard.rollback import NoRollback, Rollback
from clip_callbacks.guard.run_state import HasLimitStates
from clip_callbacks.guard.thresholds import SkipThresholds
from clip_callbacks.guard.unguarded import CLIP, Resolution, Unguarded
from clip_callbacks.trainer.compat import DATALOADER_ITER_FETCHER, is_instance
from clip_callbacks.trainer.grad_scaler import grad_scaler
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.scheduler_hold import SchedulerHold
from clip_callbacks.trainer.step_context import Discarded, KeptBatch, StepContext, StepMode

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def check_saved(saved: Mapping[str, Any]) -> None:
    """Read for trial what :meth:`Guard.state_dict` returned.

    Raises:
        LookupError, TypeError, ValueError: If it is damaged.
    """
    BadStepCounts(saved)
    SkipThresholds(None, saved.get("skip_above", {}))
    if "skipped_batches" in saved:
        SchedulerHold(is_on=False).load_state(saved["skipped_batches"])


class Guard(Unguarded):
    """Decides on bad steps of one fit, counts them and tells of them, and has skipped ones leave no trace.

    Args:
        trainer: The Trainer.
        options: What the guard was told.
        saved: What :meth:`state_dict` returned, in a checkpoint; empty at the beginning of a run.

    Attributes:
        counts: What is counted.
        rollback: What goes back to earlier weights.
    """

    def __init__(self, trainer: Trainer, options: GuardOptions, saved: Mapping[str, Any]) -> None:
        self._options = options
        self._trainer = trainer
        self.restores_buffers = options.restore_buffers
        self.drops_micro_batches = options.drops_micro_batches
        self.deferral = options.deferred
        self.counts = BadStepCounts(saved)
        self.thresholds = SkipThresholds(options.ceiling, saved.get("skip_above", {}))
        self.schedules = SchedulerHold(options.hold_schedulers)
        if "skipped_batches" in saved:
            self.schedules.load_state(saved["skipped_batches"])
        self.journal = Journal(options)
        self.rollback = NoRollback()
        self._restorer: SkippedStepRestorer | None = None
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
        renewed = self._restorer is not None
        resumed = [] if renewed else list(self.counts.of)
        for context in contexts:
            self.counts.of.setdefault(context.index, Counters())
            self._carried.setdefault(context.index, CarriedTensors(module))
        self.thresholds.attach(contexts, renewed=renewed, resumed=resumed)
        before = self._restorer.hand_over() if self._restorer else {}
        restore_buffers, skipped_steps = self._options.restore_buffers, self._skipped_steps
        scope = ResourceScope(self._trainer, module, contexts, restore_buffers, self.schedules, skipped_steps, before)
        self._restorer = SkippedStepRestorer(scope)
        if self._options.rolls_back and not renewed:
            every, lr_factor = self._options.every, self._options.lr_factor
            together = (*limits, self.thresholds)
            self.rollback = Rollback(self._trainer, module, together, self.schedules, every=every, lr_factor=lr_factor)
            self._log = BadStepLog(self._options, self.counts, self.journal, self.rollback)
        self.rollback.attach(contexts, self._restorer)

    @property
    def is_in_use(self) -> bool:
        """Whether it decides in this fit, and no other guard does."""
        return self._restorer is not None

    @override
    def misfits(self) -> Misfits:
        return self.thresholds.misfits

    def _skipped_steps(self) -> int:
        return self.counts.skipped + self.counts.overflowed

    @property
    def restorer(self) -> SkippedStepRestorer:
        """What puts skipped steps back."""
        assert self._restorer is not None, "attached before the first batch"
        return self._restorer

    @property
    def judges_losses(self) -> bool:  # type: ignore[override]
        """Whether a loss that is not finite makes a step bad, whatever its gradients are."""
        return self._options.policy != "ignore"

    @property
    def is_stale(self) -> bool:  # type: ignore[override]
        """Whether the run has gone back in this batch, so that gradients of the batch mean nothing."""
        return self.rollback.is_fresh

    @override
    def start_fit(self) -> None:
        self.journal.start_fit(self._trainer)

    @override
    def keep_batch(self, batch: Any, batch_idx: int) -> KeptBatch | None:
        """What is kept of a batch until its step.

        Nothing of a ``training_step`` that takes the iterator: what hooks are given then is the batch before.
        """
        kept = self.journal.keep(batch, batch_idx)
        if kept is None and self._options.trace_forward:
            kept = KeptBatch(batch, batch_idx)
        if kept is not None and is_instance(self._trainer.fit_loop._data_fetcher, DATALOADER_ITER_FETCHER):
            return None
        return kept

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        self.restorer.begin_batch(in_window=in_window)
        for carried in self._carried.values():
            carried.begin_batch()
        if self._options.rolls_back:
            self.rollback.begin_batch(in_window=in_window)

    @override
    def end_pass(self, reached: Collection[int], begun: Collection[int]) -> None:
        self.restorer.end_pass(reached, begun)

    @override
    def begin_step(self, step: StepContext) -> None:
        self.restorer.begin_step(step)
        if self._options.rolls_back:
            self.rollback.begin_step()

    @override
    def ceiling(self, step: StepContext) -> Limit | None:
        """The norm above which a finite step is skipped, as a limit.

        A line search may come by any point: LBFGS's step is judged by where it begins.
        """
        return self.thresholds.limit if step.is_new else None

    @override
    def limit_states(self, index: int) -> ClipState:
        return self.thresholds.limit_states(index)

    @override
    def save_limit_states(self, index: int, states: ClipState) -> None:
        self.thresholds.save_limit_states(index, states)

    @override
    def resolve(self, step: StepContext, measured: MeasuredStep) -> Resolution:
        if step.mode is StepMode.ON_DEVICE:
            if self._options.policy != "ignore":
                return Resolution(Action.ON_DEVICE, holds_scale=True)
            return CLIP if step.loss_scale is None else Resolution(Action.ON_DEVICE)
        if not measured.norms.is_finite:
            return self._resolve_nonfinite(step)
        if _is_undone(step):
            return Resolution(Action.SKIP, StepOutcome.SKIPPED, holds_scale=True)
        if measured.is_spike:
            assert measured.threshold is not None
            norms = measured.norms
            spike = Spike.of(step.optimizer.table.names, norms.parameter_norms, norms.total, measured.threshold.limit)
            self._count_spike(step, spike)
            return Resolution(Action.SKIP, StepOutcome.SKIPPED, holds_scale=True)
        return CLIP

    def _resolve_nonfinite(self, step: StepContext, norms: Tensor | None = None) -> Resolution:
        """Decide on a step whose gradients are not finite.

        Args:
            step: The step.
            norms: Of a step that is over, the norms of its gradients, on the host.
        """
        counters = self.counts.of[step.optimizer.index]
        scaler = ask_scaler(step, is_over=norms is not None)
        if scaler.cures:
            counters.overflowed += step.is_new
            return Resolution(Action.SKIP, StepOutcome.OVERFLOWED, is_called=False)
        policy = self._options.policy
        if policy == "ignore":
            # where unscaling is left to us the scaler takes no bad step
            action = Action.CLIP if step.loss_scale is None else Action.SKIP
            return Resolution(action, StepOutcome.IGNORED, is_called=not scaler.skips)

        action = ACTIONS.get(policy, Action.SKIP)
        if scaler.skips:
            action = Action.SKIP
        number = step.number
        after_good_step = 0 < number != counters.last_bad + 1
        if counters.add(number, step.batch):
            if self._log.can_go_back(counters.streak):
                action = Action.SKIP
            counters.skipped += action is Action.SKIP and (policy != "raise" or scaler.skips)
            counters.zeroed += action is Action.ZERO
            findings = self._look_at(step, after_good_step=after_good_step, none_was_good=counters.streak > number, norms=norms)
            self._log.nonfinite(step, findings, counters, self.restorer.before(step.optimizer))
        if action is Action.ZERO:
            return Resolution(action, StepOutcome.ZEROED)
        # in the middle of LBFGS's search a step is undone in the end; until then torch's code gets the numbers it would get
        return Resolution(Action.CLIP if _searches(step) else action, StepOutcome.SKIPPED, holds_scale=True)

    def _look_at(
        self, step: StepContext, *, after_good_step: bool = False, none_was_good: bool = False, norms: Tensor | None = None
    ) -> Findings:
        """Look at all that a bad step may come from: arguments as for :func:`look_at`."""
        return look_at(
            step,
            after_good_step=after_good_step,
            traces=self._options.trace_forward,
            norms=norms,
            buffers=self.restorer.suspects(step.optimizer, none_was_good=none_was_good),
            carried=self._carried[step.optimizer.index],
            none_was_good=none_was_good,
        )

    def _count_spike(self, step: StepContext, spike: Spike) -> None:
        counters = self.counts.of[step.optimizer.index]
        counters.skipped += counters.add(step.optimizer.history.steps, step.batch)
        self._log.spike(step, spike, counters, self.restorer.before(step.optimizer))

    @override
    def drop_micro_batch(self, step: StepContext) -> None:
        findings = self._look_at(step)
        self._log.dropped_micro_batch(step, findings, self.restorer.before(step.optimizer))

    @override
    def count_dropped_micro_batch(self) -> None:
        self.counts.dropped_micro_batches += 1

    @override
    def discard(self, step: StepContext) -> None:
        counters = self.counts.of[step.optimizer.index]
        if step.discarded is Discarded.OVERFLOWED:
            counters.overflowed += 1
            return
        if step.discarded is Discarded.STALE:
            counters.skipped += 1
            return
        counters.skipped += counters.add(step.optimizer.history.steps, step.batch)
        if step.discarded is Discarded.DROPPED:
            self._log.all_dropped(step, counters)
        else:
            self._log.discarded(step, counters)

    @override
    def end_step(self, step: StepContext, report: StepRecord, *, is_called: bool) -> None:
        if self._options.rolls_back:
            self.rollback.go_back(step)
        if report.outcome.is_skipped:
            self.restorer.abort(step, is_called=is_called)
        else:
            self.restorer.commit(step)
            self._carried[step.optimizer.index].end_good_step()
        if self._options.rolls_back:
            self.rollback.end_step(step, report)

    @override
    def end_deferred_step(self, step: StepContext, report: StepRecord) -> None:
        if self._options.policy != "ignore" or step.loss_scale is not None:
            self.restorer.abort_on_device(step, report.skipped)

    @override
    def abandon(self, step: StepContext, *, is_called: bool) -> None:
        self.restorer.abandon(step, is_called=is_called)

    @override
    def collect(self, step: StepContext, report: StepRecord) -> None:
        if report.outcome is StepOutcome.TAKEN:
            self._carried[step.optimizer.index].end_good_step()
        elif not bool(report.finite):
            self._resolve_nonfinite(step, report.parameter_norms)
        elif report.outcome.is_skipped:
            assert report.skip_limit is not None
            names = step.optimizer.table.names
            self._count_spike(step, Spike.of(names, report.parameter_norms, report.total_norm, report.skip_limit))

    @override
    def undo_pass(self, *, is_bad: bool) -> None:
        self._log.undone(self._trainer, self.restorer.undo_pass(is_bad=is_bad), "the batch")

    @override
    def end_epoch(self, losses: Sequence[Tensor]) -> None:
        if losses:
            undone = self.restorer.undo_window(is_bad=not all_finite(losses))
            self._log.undone(self._trainer, undone, "the window that the epoch has left")

    @override
    def end_batch(self) -> None:
        self.restorer.end_batch()
        self.rollback.end_batch()

    @override
    def needs_host(self, context: OptimizerContext) -> bool:
        return self.restorer.needs_host(context)

    @override
    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        options = self._options
        if options.policy not in {"skip", "ignore"} or options.drops_micro_batches:
            return "the guard looks at bad gradients before the step is taken (its policy, or its level)"
        if options.rolls_back:
            return 'on_streak="rollback", which must know of a good step before it is taken'
        if options.writes_all_weights and len(self._trainer.optimizers) > 1:
            return 'bundles of the weights (bundle_dir, weights="full") are written before other optimizers step'
        if options.skip_above is not None and grad_scaler(self._trainer) is not None:
            return "a GradScaler, which takes the place of what skip_above tells the optimizer"
        if self._trainer.world_size > 1 and grad_scaler(self._trainer) is not None:
            return "a GradScaler on several ranks, which must all know whether it was the loss or the loss scale"
        return self.restorer.reason_against_deferral(context)

    @override
    def step_metrics(self, context: OptimizerContext, report: StepRecord) -> dict[str, float]:
        return self.count_metrics(context)

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
            ROLLBACKS: self._options.rolls_back,
        }
        return [SKIPPED_STEPS, *(name for name, is_so in can_be.items() if is_so)]

    @override
    def skipped_steps_of(self, index: int) -> int:
        return self.counts.of[index].skipped

    @override
    def summary(self, contexts: Sequence[OptimizerContext]) -> list[str]:
        steps = sum(context.history.steps for context in contexts)
        counted = (
            (self.counts.zeroed, "taken with non-finite entries set to 0"),
            (self.counts.overflowed, "left out by the GradScaler"),
            (self.counts.dropped_micro_batches, "micro-batches dropped"),
            (self.counts.rollbacks, "ended in a return to earlier weights"),
        )
        parts = [f"{count} {word}" for count, word in counted if count]
        return [f"NonFiniteGuard: of {steps} optimizer steps, {', '.join(parts)}."] if parts else []

    def state_dict(self) -> dict[str, Any]:
        """The counters, the limit's states, and where held schedules stand in the epoch."""
        limits = {"skip_above": self.thresholds.state_dict()}
        return self.counts.state_dict() | limits | {"skipped_batches": self.schedules.state()}

    @override
    def detach(self) -> None:
        if self._restorer:
            self._restorer.detach()
        self._restorer = None
        self.rollback.detach()
        self.rollback = NoRollback()  # its memory
        self._log = BadStepLog(self._options, self.counts, self.journal, self.rollback)
        self.journal.detach()


def _searches(step: StepContext) -> bool:
    """Whether this is a further point of a line search, which goes back in the end if any point was bad."""
    return not step.is_new and isinstance(step.optimizer.optimizer, LBFGS)


def _is_undone(step: StepContext) -> bool:
    """Whether an earlier pass of the same step was bad, as of SAM, which needs two: a good one after it has no use."""
    report = step.optimizer.report
    return not step.is_new and not _searches(step) and report is not None and report.outcome.is_skipped
