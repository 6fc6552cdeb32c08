"""NonFiniteGuard."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_callbacks.core.limits import Limit
from clip_callbacks.core.nonfinite import Policy
from clip_callbacks.engine.base import GradientCallback
from clip_callbacks.engine.components import Parts
from clip_callbacks.engine.resume import State, bad_step_counts
from clip_callbacks.guard.bad_steps import BadStepCounts
from clip_callbacks.guard.guard import Guard, check_saved
from clip_callbacks.guard.journal import check_folder
from clip_callbacks.guard.options import GuardOptions, Level, OnStreak, Weights

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class NonFiniteGuard(GradientCallback):
    """Keeps NaN and Inf gradients from the weights.

    A step is bad if a gradient or a loss of its window is not finite. Under "skip" **a bad step never happened**. Its gradients
    become None, so that every optimizer of ``torch.optim`` leaves the parameters, its own state, step counters and weight decay as
    they are, bit for bit. Buffers, and parameters, that a forward pass has written to are put back to where the window began; so is
    what an optimizer of another package counts in its parameter groups or its state. Step-interval learning-rate schedules stand
    still (a ReduceLROnPlateau is left to Lightning; in manual optimization it is you who steps them: look at
    ``last_report.skipped``). Lightning's averages of the weights do not count the step. With several optimizers each goes back by
    itself. ``global_step`` and the batch counter advance: Lightning owns them. Random numbers that the batch has drawn stay drawn.
    What cannot be put back is named in a warning at the first skip: attributes of an optimizer's own, averages that somebody else
    keeps. An optimizer that moves parameters without a gradient raises an error there.

    A forward pass that leads to no step, as where ``training_step`` returned None, leaves no NaN in a buffer either. A batch with
    no step counts in no metric and no streak.

    On several ranks all skip together what is bad on one of them, and the report names it.

    Each bad step or dropped micro-batch warns once: where and when, which parameters (with counts of NaN and inf), their nearest
    finite neighbours, and whether the loss, parameters or buffers were non-finite before. The parameters are walked over on bad
    steps only. The same facts go as a line of JSON into ``nonfinite_steps.jsonl`` in the log directory.

    Under a GradScaler (16-mixed) an overflow is the scaler's business: it skips the step and lowers the scale. Such steps are
    counted apart (``overflowed_steps``) and raise nothing. A step that no scale can cure, because the loss itself is not finite or
    the scale is down to 1, counts as a bad one: it is skipped whatever the policy, and leaves the scale and its growth counter as
    they were.

    Args:
        policy: "skip" the step; "raise" an error; "zero" the non-finite entries and take the step; "ignore" them and take the step.
        max_consecutive: After so many bad batches in a row an error is raised, on all ranks; at least 1. Many bad steps in one
            batch, as of truncated backpropagation, are one bad batch.
        on_streak: What comes after so many: "raise" the error, or "rollback" to the last good weights.
        level: What is dropped: the whole "window" of an optimizer step, or under accumulation only the bad "microbatch", and the
            step is taken with the mean of the others. The latter reads the gradients after each backward pass, and needs room for
            those of one micro-batch. On several ranks all drop what is bad on one, at the price of one more average of gradients
            for each window; with plain DDP only.
        restore_buffers: Whether a skipped step puts back the buffers that its forward passes have written to: batch statistics,
            codebooks, power iterations, counters.
        hold_schedulers: Whether step-interval learning-rate schedules stand still for a skipped step.
        trace_forward: Whether a batch whose loss is not finite is run again, under hooks, to name the first module whose output is
            not finite. Keeps the batches of a window until its step. Not in manual optimization.
        deferred: Whether steps of a fused optimizer are decided on the device, with no host sync: a bad one is skipped there and
            then, the host learns of it one step later, and its report knows the norms of the parameters instead of counts. None:
            where the gradients are on a device, the policy is "skip" or "ignore", all of them get one factor, and no
            step-interval schedule is to stand still. True: raise an error where that cannot be.
        skip_above: A number or a Limit: a step with finite gradients whose total norm, before clipping, is above it is a spike, and
            skipped, counted and bounded like a bad one. In the limit's own state it counts as clipped. Needs the policy "skip", and
            a limit that healthy steps stay under: not EmaLimit or QuantileLimit(0.1), which most steps exceed.
        bundle_dir: A folder in which each bad step or dropped micro-batch gets a folder, to be run again by ``clip-callbacks
            replay``: the micro-batches of the window, the states of random numbers before each, the report, versions and the
            configuration. Until a step is over the batches of its window are kept, by reference. Of several ranks each writes where
            it began, all of them if nobody knows. A bundle is written whole or not at all; if it cannot be, one warning says so,
            and training goes on.
        weights: What of the weights and the optimizers' states before the step goes into a bundle: "none", a "reference" to the
            last checkpoint (which ModelCheckpoint deletes when it has a better one, unless save_top_k=-1), or them in "full", which
            is what an exact replay needs; not with sharded parameters.
        max_bundles: How many bundles ``bundle_dir`` may hold, those of earlier runs counted.
        max_bundle_bytes: How much they may take together, in bytes.
        every: Good optimizer steps between copies for a rollback, over all optimizers; at least 1.
        max_rollbacks: After so many rollbacks in a run the next streak raises the error; at least 1.
        lr_factor: What each rollback multiplies learning rates by, above 0 and up to 1.
        summary: False leaves out the messages that sum up the run when a fit ends, those of the other callbacks of this package
            too. The table among them needs a fit of at least 100 optimizer steps.

    Raises:
        ValueError: If the policy, level, ``weights`` or ``on_streak`` is unknown, a number is out of its range, ``skip_above`` or
            "rollback" stands beside a policy that does not go with it, or a number for rollbacks is set without "rollback"; at fit
            start, if ``bundle_dir`` cannot be written to.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[NonFiniteGuard(max_consecutive=3)], logger=False, enable_checkpointing=False)

    **Rollback.** With ``on_streak="rollback"`` one copy of the weights is kept in memory: the parameters and buffers, the
    optimizers' state and parameter groups, the learning-rate schedules, the limits' states, the GradScaler's scale. It is made
    right before a good step is taken, of what gave finite gradients, as things stood when the step's window began; at the first
    good step and then every ``every``. When bad steps do not end all of it is put back in place, the last of them is skipped too,
    and the run is, bit for bit, one that starts from there with the batches that follow. Data, random numbers,
    ``global_step``, epochs, metrics and counts go on. Each rank keeps its own shards. Copies of a GPU's tensors are in pinned host
    memory and do not hold up the host. A scale that was lowered since is forgotten: bad losses halve it for no fault of its own,
    and if it was too high the scaler finds out again.

    Optimizers are known by ``state`` and ``param_groups``, schedules by their ``state_dict``: what a checkpoint would hold of
    them. Schedules by epochs go back too, though the epochs do not. With several optimizers, copies are made before the
    first step of a batch, if the others' last steps were good and the norms of what they hold finite; after a rollback the rest of
    the batch does not count.

    Averages of the weights go back too: an ``AveragedModel`` that a callback holds, as WeightAveraging does, and that of
    StochasticWeightAveraging. Two kinds of buffers stay as they are: those that are new, and non-persistent ones whose shape has
    changed, as caches that grow.

    Where optimizers take up parameters that the module has had all along, as fine-tuning callbacks do, or schedules are swapped, as
    SWA does, the copy still serves: weights and moments go back to it, parameter groups and schedules to where they were at that
    moment. With parameters that are new to the module it is lost, and the next good step makes another.

    ``lr_factor`` adds up: twice 0.5 is 0.25. It holds for the schedules of ``torch.optim``, which afterwards give that factor
    times what they would: ``lr``, ``initial_lr``, ``max_lr``, ``min_lr`` and ``swa_lr`` in parameter groups, and ``base_lrs``,
    ``max_lrs``, ``min_lrs`` and ``eta_min`` in schedules. A schedule of your own that knows rates by other names sets them
    again. The copy is not in checkpoints: after a resume the first good step makes a new one.

    Example::

        >>> guard = NonFiniteGuard(max_consecutive=5, on_streak="rollback", every=100, lr_factor=0.5)
        >>> guard.rollbacks
        0
    """

    _kind = "guard"

    def __init__(
        self,
        policy: Policy = "skip",
        *,
        max_consecutive: int = 10,
        level: Level = "window",
        restore_buffers: bool = True,
        hold_schedulers: bool = True,
        trace_forward: bool = False,
        deferred: bool | None = None,
        skip_above: float | Limit | None = None,
        bundle_dir: str | Path | None = None,
        weights: Weights = "reference",
        max_bundles: int = 20,
        max_bundle_bytes: float = 2e9,
        on_streak: OnStreak = "raise",
        every: int = 100,
        max_rollbacks: int = 3,
        lr_factor: float = 1.0,
        summary: bool = True,
    ) -> None:
        super().__init__()
        folder = None
        if bundle_dir is not None:
            folder = Path(bundle_dir).expanduser().absolute()  # wherever the process goes later
        self._options = GuardOptions(
            policy=policy,
            max_consecutive=max_consecutive,
            level=level,
            restore_buffers=restore_buffers,
            hold_schedulers=hold_schedulers,
            trace_forward=trace_forward,
            deferred=deferred,
            skip_above=skip_above,
            bundle_dir=folder,
            weights=weights,
            max_bundles=max_bundles,
            max_bundle_bytes=max_bundle_bytes,
            on_streak=on_streak,
            every=every,
            max_rollbacks=max_rollbacks,
            lr_factor=lr_factor,
        )
        self.policy, self.level, self.on_streak = self._options.policy, self._options.level, self._options.on_streak
        self.deferred, self.skip_above = self._options.deferred, self._options.ceiling
        self.restore_buffers, self.hold_schedulers, self.trace_forward = restore_buffers, hold_schedulers, trace_forward
        self.every, self.lr_factor = self._options.every, self._options.lr_factor
        self.summary = summary

    @property
    def skipped_steps(self) -> int:
        """How many optimizer steps were skipped so far, over all optimizers."""
        return self._collected_counts.skipped

    @property
    def zeroed_steps(self) -> int:
        """How many steps were taken after non-finite entries were set to 0."""
        return self._collected_counts.zeroed

    @property
    def overflowed_steps(self) -> int:
        """How many steps a GradScaler skipped for an overflow."""
        return self._collected_counts.overflowed

    @property
    def rollbacks(self) -> int:
        """How often the run went back to earlier weights."""
        return self._counts.rollbacks

    @property
    def dropped_micro_batches(self) -> int:
        """How many micro-batches were dropped from their window."""
        return self._counts.dropped_micro_batches

    def skipped_steps_of(self, index: int) -> int:
        """How many steps of one optimizer were skipped so far.

        Args:
            index: The number of the optimizer.
        """
        return self._counts.of[index].skipped

    @property
    def _counts(self) -> BadStepCounts:
        """What is counted, in a fit or after one; a deferred step whose report is on its way is not."""
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
        """Refuse what cannot be done right before anything is trained.

        Raises:
            ValueError: If so.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_folder(self._options)

    def _make_parts(self, trainer: Trainer, module: LightningModule, saved: dict[str, Any]) -> Parts:
        self._part = Guard(trainer, self._options, saved)
        return Parts(guard=self._part, summary=self.summary, histories=saved.get("history", {}))

    def _copy_for_search(self) -> NonFiniteGuard:
        searching = copy(self)
        searching._options = self._options.for_search()
        return searching

    def _empty_state(self) -> dict[str, Any]:
        return {"skip_above": {}, "skipped_batches": (-1, 0, 0), **BadStepCounts({}).state_dict()}

    def _check_state(self, state: State) -> None:
        check_saved(state)

    def _carry_over(self, others: Sequence[State]) -> list[str]:
        counts = bad_step_counts(others)
        if not self._saved and counts:
            self._saved = {"history": {}, **self._empty_state(), **counts}
        return super()._carry_over(others)
