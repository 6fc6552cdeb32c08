"""NonFiniteGuard."""

# mypy: disable-error-code="override"

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher

from clip_callbacks.core.limit_state import Held, adopt
from clip_callbacks.core.limits import Limit, as_limit
from clip_callbacks.core.nonfinite import Policy, as_policy
from clip_callbacks.core.rules import ClipRule, ClipState
from clip_callbacks.engine.base import Member
from clip_callbacks.guard.bad_steps import BadSteps
from clip_callbacks.guard.capture import Weights
from clip_callbacks.guard.counters import Counters
from clip_callbacks.guard.journal import Evidence
from clip_callbacks.guard.restore import Rewind
from clip_callbacks.guard.rollback import Rollback, check_rollback
from clip_callbacks.trainer.compat import is_of
from clip_callbacks.trainer.components import Roles
from clip_callbacks.trainer.optimizer_context import KeptBatch, Lane

Level: TypeAlias = Literal["window", "microbatch"]
OnStreak: TypeAlias = Literal["raise", "rollback"]


class NonFiniteGuard(Member):
    """Keeps NaN and Inf gradients from the weights.

    Under "skip" **a bad step never happened**. Its gradients become None, so that every optimizer of ``torch.optim`` leaves the
    parameters, its own state, step counters and weight decay as they are, bit for bit; running statistics of batch normalization
    are put back to where the window began; step-interval learning-rate schedules stand still (a ReduceLROnPlateau is left to
    Lightning; in manual optimization it is you who steps them: look at ``last_report.skipped``). ``global_step`` and the batch
    counter advance: Lightning owns them. Random numbers that the batch has drawn stay drawn. An optimizer that moves parameters
    without a gradient is found out at the first skip.

    On several ranks all skip together what is bad on one of them, and the report names it.

    Each bad step or dropped micro-batch warns once: where and when, which parameters (with counts of NaN and inf), their nearest
    finite neighbours, and whether the loss or the parameters were non-finite before. The parameters are walked over on bad steps
    only. The same facts go as a line of JSON into ``nonfinite_steps.jsonl`` in the log directory.

    Under a GradScaler (16-mixed) an overflow is the scaler's business: it skips the step and lowers the scale. Such steps are
    counted apart (``overflowed_steps``) and raise nothing. A step that no scale can cure, because the loss itself is not finite or
    the scale is down to 1, counts as a bad one and is skipped whatever the policy, since the scaler skips it.

    Args:
        policy: "skip" the step; "raise" an error; "zero" the non-finite entries and take the step; "ignore" them and take the step.
        max_consecutive: After so many bad steps in a row an error is raised, on all ranks; at least 1.
        on_streak: What comes after so many: "raise" the error, or "rollback" to the last good weights.
        level: What is dropped: the whole "window" of an optimizer step, or under accumulation only the bad "microbatch", and the
            step is taken with the mean of the others. The latter reads the gradients after each backward pass, and needs room for
            those of one micro-batch. On several ranks all drop what is bad on one, at the price of one more average of gradients
            for each window; with plain DDP only.
        restore_buffers: Whether a skipped step puts back the running statistics of batch normalization.
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
    StochasticWeightAveraging. WeightAveraging counts the return as a step like any other, and averages the old weights in. Two
    kinds of buffers stay as they are: those that are new, and non-persistent ones whose shape has changed, as caches that grow.

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

    kind = "guard"

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
    ) -> None:
        super().__init__()
        self.policy = as_policy(policy, "policy")
        if not isinstance(max_consecutive, int) or max_consecutive < 1:
            raise ValueError(f"`max_consecutive` must be a whole number of at least 1, got {max_consecutive!r}.")
        if level not in get_args(Level):
            raise ValueError(f"`level` must be one of {', '.join(get_args(Level))}, got {level!r}.")
        if level == "microbatch" and self.policy != "skip":
            raise ValueError(f'`level` must be "window" for the policy {policy!r}, got "microbatch": only skipping drops anything.')
        self.level: Level = level
        self.restore_buffers = restore_buffers
        self.hold_schedulers = hold_schedulers
        self.trace_forward = trace_forward
        self.deferred = deferred
        if skip_above is not None and self.policy != "skip":
            raise ValueError(f'`skip_above` must be None for the policy {policy!r}, got {skip_above!r}: use the policy "skip".')
        self.skip_above = None if skip_above is None else as_limit(skip_above, "skip_above")
        self.evidence = Evidence(bundle_dir, weights, max_bundles, max_bundle_bytes)
        if on_streak not in get_args(OnStreak):
            raise ValueError(f"`on_streak` must be one of {', '.join(get_args(OnStreak))}, got {on_streak!r}.")
        check_rollback(self.policy, is_on=on_streak == "rollback", every=every, max_rollbacks=max_rollbacks, lr_factor=lr_factor)
        self.on_streak: OnStreak = on_streak
        self.every, self.lr_factor = every, lr_factor
        most = max_rollbacks if on_streak == "rollback" else 0
        self.bad_steps = BadSteps(self.policy, self.evidence, max_consecutive=max_consecutive, max_rollbacks=most)
        self._held: dict[int, Held] = {}
        self._rewind: Rewind | None = None
        self._rollback: Rollback | None = None
        self._left_out = (-1, 0, 0)
        self.dropped_micro_batches = 0

    @property
    def skipped_steps(self) -> int:
        """How many optimizer steps were skipped so far, over all optimizers."""
        self._settle()
        return sum(counters.skipped for counters in self.bad_steps.counters.values())

    @property
    def zeroed_steps(self) -> int:
        """How many steps were taken after non-finite entries were set to 0."""
        self._settle()
        return sum(counters.zeroed for counters in self.bad_steps.counters.values())

    @property
    def overflowed_steps(self) -> int:
        """How many steps a GradScaler skipped for an overflow."""
        self._settle()
        return sum(counters.overflowed for counters in self.bad_steps.counters.values())

    @property
    def rollbacks(self) -> int:
        """How often the run went back to earlier weights."""
        return self.bad_steps.rollbacks

    def _settle(self) -> None:
        if self._pass:
            self._pass.settle()

    def skipped_steps_of(self, index: int) -> int:
        """How many steps of one optimizer were skipped so far."""
        return self.bad_steps.counters[index].skipped

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be done right before anything is trained.

        Raises:
            ValueError: If so.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.evidence.prepare()

    def remember(self, trainer: Trainer, batch: Any, batch_idx: int) -> KeptBatch | None:
        """What is kept of a batch until its step: a reference, if it may have to be run again.

        Nothing of a ``training_step`` that takes the iterator: what hooks are given then is the batch before.
        """
        kept = self.evidence.keep(batch, batch_idx) or (KeptBatch(batch, batch_idx) if self.trace_forward else None)
        return None if kept and is_of(trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher) else kept

    def bind(self, lanes: Sequence[Lane], names: Sequence[str], *, renew: bool = False) -> None:
        """Have counters for each optimizer.

        Raises:
            ValueError: If restored counters are those of other optimizers, or weights are to be written that are sharded.
        """
        super().bind(lanes, names, renew=renew)
        if self.evidence.holds_weights and any(lane.table.reduction for lane in lanes):
            raise ValueError(
                '`weights` must be "reference" or "none" with sharded parameters, got "full": a bundle is one rank\'s, and '
                "no rank has all of them. Save checkpoints."
            )
        counters = self.bad_steps.counters
        if not renew and not counters.keys() <= {lane.index for lane in lanes}:
            raise ValueError(
                "the checkpoint's state of NonFiniteGuard must fit the optimizers, "
                f"got counters of {len(counters)} for {len(lanes)}."
            )
        for lane in lanes:
            counters.setdefault(lane.index, Counters())
            if self.skip_above:
                fresh, known = Held.fresh(ClipRule(self.skip_above), lane.table), self._held.get(lane.index)
                self._held[lane.index] = adopt(fresh, [known], "NonFiniteGuard's skip_above", strict=not renew)

    def limit_state_of(self, index: int) -> ClipState:
        """The state of ``skip_above`` for an optimizer."""
        return (self._held[index].state,)

    def keep_limit(self, index: int, state: ClipState) -> None:
        """Keep it for the next step."""
        (self._held[index].state,) = state

    def rewind(self, module: LightningModule, lanes: Sequence[Lane]) -> Rewind:
        """What puts back the changes of skipped steps."""
        if self._rewind:
            self._left_out = self._rewind.schedules.state()
        self._rewind = Rewind(module, lanes, restore_buffers=self.restore_buffers, hold_schedulers=self.hold_schedulers)
        self._rewind.schedules.load_state(self._left_out)
        self.bad_steps.rewind = self._rewind
        return self._rewind

    def rollback(self, trainer: Trainer, module: LightningModule, lanes: Sequence[Lane], roles: Roles) -> Rollback | None:
        """What goes back to earlier weights, if that is wanted: its copy is made at the next good step, or is one it has."""
        if self.on_streak == "rollback" and self._rewind:
            if self._rollback and self._rollback.is_of(trainer, module):
                self._rollback.renew(lanes, self._rewind)
            else:
                rewind, every, lr_factor = self._rewind, self.every, self.lr_factor
                self._rollback = Rollback(trainer, module, lanes, roles, rewind, every=every, lr_factor=lr_factor)
        self.bad_steps.rollback = self._rollback
        return self._rollback

    def forget(self) -> None:
        """Begin a new run."""
        super().forget()
        self.bad_steps.forget()
        self._held = {}
        self._left_out = (-1, 0, 0)
        self.dropped_micro_batches = 0

    def release(self) -> None:
        """Let go of the run; what a checkpoint needs stays."""
        if self._rewind:
            self._left_out, self._rewind = self._rewind.schedules.state(), None
        self._rollback = None
        self.bad_steps.release()

    def summary(self, lanes: Sequence[Lane]) -> list[str]:
        """One line if the run had bad steps or micro-batches that the table at the end does not tell of."""
        steps = sum(lane.history.steps for lane in lanes)
        parts = [
            f"{count} {word}"
            for count, word in (
                (self.zeroed_steps, "taken with non-finite entries set to 0"),
                (self.overflowed_steps, "left out by the GradScaler"),
                (self.dropped_micro_batches, "micro-batches dropped"),
                (self.rollbacks, "ended in a return to earlier weights"),
            )
            if count
        ]
        return [f"NonFiniteGuard: of {steps} optimizer steps, {', '.join(parts)}."] if parts else []

    def state_dict(self) -> dict[str, Any]:
        """The counters, and where held schedules stand in the epoch."""
        left_out = self._rewind.schedules.state() if self._rewind else self._left_out
        ours = {
            "skip_above": {index: held.dump() for index, held in self._held.items()},
            "left_out": left_out,
            "dropped_micro_batches": self.dropped_micro_batches,
        }
        return super().state_dict() | self.bad_steps.state_dict() | ours

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is not one of this callback.
        """
        super().load_state_dict(state_dict)
        self.bad_steps.load_state_dict(state_dict)
        self._left_out = tuple(state_dict["left_out"])
        if self._rewind:  # a strategy that loads late
            self._rewind.schedules.load_state(self._left_out)
        self.dropped_micro_batches = state_dict["dropped_micro_batches"]
        self._held = {int(index): Held.load(held) for index, held in state_dict["skip_above"].items()}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without what belongs to one Trainer's fit."""
        return super().__getstate__() | {"_rewind": None, "_rollback": None}
