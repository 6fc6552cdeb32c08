"""NonFiniteGuard."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_callbacks.core.arguments import as_flag
from clip_callbacks.core.limits import Limit
from clip_callbacks.engine.base import GradientCallback
from clip_callbacks.engine.components import Parts
from clip_callbacks.engine.resume import State, bad_step_counts
from clip_callbacks.guard.counts import BadStepCounts
from clip_callbacks.guard.guard import Guard, check_saved
from clip_callbacks.guard.journal import check_folder
from clip_callbacks.guard.options import Bundles, GuardOptions, GuardPolicy, Level, Rollback
from clip_callbacks.trainer.checks import CallbackFacts

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class NonFiniteGuard(GradientCallback):
    """Keeps NaN and Inf gradients from the weights: bad steps are skipped, reported, and end the run if they do not stop.

    A step is bad if a gradient or a loss of its window is not finite. With several ranks, all of them skip a step that is bad on
    one, and the report names that rank.

    Under the policy "skip" **a bad step leaves no trace**. Its gradients become None, so that every optimizer of ``torch.optim``
    leaves the parameters, its own state, step counters and weight decay as they are, bit for bit. Besides, the guard restores what
    the window has changed: buffers and parameters that a forward pass has written to, and what an optimizer of another package
    counts in its parameter groups or its state. Step-interval learning-rate schedules do not advance, and Lightning's averages of
    the weights do not count the step. Several optimizers are treated one by one.

    Some things a skip does not undo. ``global_step`` and the batch counter advance, because Lightning owns them, and random numbers
    that the batch has drawn stay drawn. A ReduceLROnPlateau is left to Lightning. In manual optimization you step the schedules:
    look at ``last_report.skipped``. An optimizer's own attributes, and averages that other code keeps, cannot be restored; a
    warning names them at the first skip. If an optimizer moves parameters without a gradient, the first skip raises an error.

    A forward pass that leads to no step, for example because ``training_step`` returned None, leaves no NaN in a buffer either. A
    batch without a step counts in no metric and no streak.

    Each bad step or dropped micro-batch gives one warning: where and when it happened, which parameters have non-finite gradients
    (with counts of NaN and inf), their nearest finite neighbours, and whether the loss, parameters or buffers were non-finite
    before. Parameters are examined one by one only after a bad step. The same facts are appended as a line of JSON to
    ``nonfinite_steps.jsonl`` in the log directory.

    Under a GradScaler (16-mixed) an overflow is left to the scaler, which skips the step and lowers the scale. Such steps are
    counted separately (``overflowed_steps``) and raise nothing. If no lower scale can help, because the loss itself is not finite
    or the scale is already 1, the step is bad: it is skipped whatever the policy, and the scale and its growth counter stay as they
    were.

    Args:
        policy: "skip" the step; "raise" an error; "zero" the non-finite entries and take the step; "ignore" them and take the step;
            "warn" of bad steps, with the same report as under "skip", and take every step as without the guard. Under DDP
            "warn" judges the gradients alone, since losses differ between ranks. After ``max_consecutive`` bad batches in a row it
            only counts those that follow.
        max_consecutive: Number of bad batches in a row at which an error is raised on all ranks, or a rollback begins; at least
            1. Many bad steps in one batch, as with truncated backpropagation, are one bad batch.
        level: Unit that is dropped: the whole "window" of an optimizer step, or under accumulation only the bad "microbatch", so
            that the step is taken with the mean of the others. The latter reads the gradients after each backward pass and needs
            memory for the gradients of one micro-batch. On several ranks it works with plain DDP only, drops on all ranks what is
            bad on one, and costs one more average of gradients for each window.
        skip_above: Number or Limit. A step with finite gradients whose total norm, before clipping, is above it is a spike, and is
            skipped, counted and bounded like a bad one; under the policy "warn" it is reported and taken, under others this must
            be None. The limit treats its norm as clipped. Choose a limit that healthy steps stay under: not EmaLimit or
            QuantileLimit(0.1), which most steps exceed.
        loss_above: Number or Limit. A finite step is a spike, too, if the loss of its window is above it: the mean over the window
            and all ranks that the gradient belongs to, weighted as AccumulationRescaling weights it, without the loss scale. In
            manual optimization it is the sum of the losses since the gradients were None, like the gradient: backward passes have
            to go through ``manual_backward``, and ``zero_grad`` has to set gradients to None, as is its default. The number may
            have any sign; a limit must take losses, as :class:`~clip_callbacks.RobustZScoreLimit` does, which compares with the
            median of the last losses. It takes in a spike as clipped. Not judged in a search for the learning rate. A warning says
            if more than a tenth of the steps are spikes: then a kind of batch is left out, such as those of one of two tasks.
        both: If True, a step is a spike only if it is above both ``skip_above`` and ``loss_above``; else above one of them.
        hold_schedulers: If True, step-interval learning-rate schedules do not advance at a skipped step.
        trace_forward: If True, a batch whose loss is not finite is run again under hooks, to name the first module whose output is
            not finite. This keeps the batches of a window until its step. Not in manual optimization.
        deferred: If True, steps of a fused optimizer are decided on the device without a host sync: a bad one is skipped at once,
            the host learns of it one step later, and its report holds norms of the parameters instead of counts. An error is raised
            where that is impossible. None: wherever the gradients are on a device, the policy is "skip" or "ignore", all gradients
            get one factor, and no step-interval schedule has to be held.
        bundles: Folder in which each bad step is kept, to be run again by ``clip-callbacks replay``, or a
            :class:`~clip_callbacks.Bundles` with a folder and further options.
        rollback: A :class:`~clip_callbacks.Rollback` returns to the last good weights after ``max_consecutive`` bad batches in a
            row. None raises an error then.
        summary: If False, no messages sum up the run when a fit ends, those of the other callbacks of this package included. The
            table among them needs a fit of at least 100 optimizer steps.

    Raises:
        ValueError: If the policy or level is unknown, ``max_consecutive``, ``skip_above`` or ``loss_above`` is out of its range,
            ``both`` is True without these two, or ``level``, ``skip_above``, ``loss_above`` or ``rollback`` does not go with the
            policy; at fit start, if bundles cannot be written.
        TypeError: If ``bundles`` or ``rollback`` is of another class.
        NonFiniteGradientError: In training, at a bad step under the policy "raise", or at the last of ``max_consecutive`` bad
            batches in a row.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[NonFiniteGuard(max_consecutive=3)], logger=False, enable_checkpointing=False)
    """

    _kind = "guard"

    def __init__(
        self,
        policy: GuardPolicy = "skip",
        *,
        max_consecutive: int = 10,
        level: Level = "window",
        skip_above: float | Limit | None = None,
        loss_above: float | Limit | None = None,
        both: bool = False,
        hold_schedulers: bool = True,
        trace_forward: bool = False,
        deferred: bool | None = None,
        bundles: Bundles | str | Path | None = None,  # in this order: jsonargparse would save Bundles as a string
        rollback: Rollback | None = None,
        summary: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(bundles, (str, Path)):
            bundles = Bundles(bundles)
        self._options = GuardOptions(
            policy,
            max_consecutive=max_consecutive,
            level=level,
            skip_above=skip_above,
            loss_above=loss_above,
            both=both,
            hold_schedulers=hold_schedulers,
            trace_forward=trace_forward,
            deferred=deferred,
            bundles=bundles,
            rollback=rollback,
        )
        self.policy, self.max_consecutive, self.level = policy, max_consecutive, level
        self.skip_above, self.loss_above, self.both = self._options.limits
        self.hold_schedulers, self.trace_forward, self.deferred = hold_schedulers, trace_forward, deferred
        self.bundles, self.rollback = bundles, rollback
        self.summary = as_flag(summary, "summary")

    @property
    def skipped_steps(self) -> int:
        """Number of optimizer steps skipped so far, over all optimizers."""
        return self._collected_counts.total("skipped")

    @property
    def zeroed_steps(self) -> int:
        """Number of steps taken after non-finite entries were set to 0."""
        return self._collected_counts.total("zeroed")

    @property
    def overflowed_steps(self) -> int:
        """Number of steps that a GradScaler skipped for an overflow."""
        return self._collected_counts.total("overflowed")

    @property
    def spikes(self) -> int:
        """Number of finite steps above ``skip_above`` or ``loss_above``, skipped or only reported."""
        return self._collected_counts.total("spikes")

    @property
    def reported_steps(self) -> int:
        """Number of steps with non-finite gradients or losses that were taken under the policy "warn"."""
        return self._collected_counts.total("reported")

    @property
    def rollbacks(self) -> int:
        """Number of rollbacks to earlier weights."""
        return self._counts.rollbacks

    @property
    def dropped_micro_batches(self) -> int:
        """Number of micro-batches dropped from their window."""
        return self._counts.dropped_micro_batches

    def skipped_steps_of(self, index: int) -> int:
        """Return the number of steps of one optimizer that were skipped so far.

        Args:
            index: Number of the optimizer.
        """
        return self._counts.of[index].skipped

    @property
    def _counts(self) -> BadStepCounts:
        """The counts of the fit, or of the last one; without deferred steps whose report has not reached the host."""
        if self._part is None or self._is_loaded:
            return BadStepCounts(self._saved)
        counts: BadStepCounts = self._part.counts
        return counts

    @property
    def _collected_counts(self) -> BadStepCounts:
        if self._engine:
            self._engine.collect_pending()
        return self._counts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything is trained, what this Trainer cannot do.

        Raises:
            ValueError: If a combination is refused, or the folder for bundles cannot be written to.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_folder(self._options.bundles)

    def _facts(self) -> CallbackFacts:
        options = {name: getattr(self, name) for name in ("policy", "level", "rollback", "trace_forward", "deferred")}
        if isinstance(self.bundles, Bundles):
            options["weights"] = self.bundles.weights
        return CallbackFacts(self._kind, self._stable_key, options=options)

    def _make_parts(self, trainer: Trainer, module: LightningModule, saved: dict[str, Any]) -> Parts:
        self._part = Guard(trainer, self._options, saved)
        return Parts(guard=self._part, summary=self.summary, histories=saved.get("history", {}))

    def _copy_for_search(self) -> NonFiniteGuard:
        searching = copy(self)
        searching._options = self._options.for_search()
        return searching

    def _empty_state(self) -> dict[str, Any]:
        return {"skip_above": {}, "loss_above": {}, "skipped_batches": (-1, 0, 0), **BadStepCounts({}).state_dict()}

    def _check_state(self, state: State) -> None:
        check_saved(state)

    def _carry_over(self, others: Sequence[State]) -> list[str]:
        counts = bad_step_counts(others)
        if not self._saved and counts:
            self._saved = {"history": {}, **self._empty_state(), **counts}
        return super()._carry_over(others)
