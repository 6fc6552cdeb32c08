"""NonFiniteGuard."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from clip_callbacks.bundle import BundleFolder
from clip_callbacks.callbacks._bundles import Bundles, Weights
from clip_callbacks.callbacks._counters import Counters
from clip_callbacks.callbacks._incident import Incident
from clip_callbacks.callbacks._lane import KeptBatch, Lane
from clip_callbacks.callbacks._member import Member
from clip_callbacks.callbacks._rewind import Rewind
from clip_callbacks.callbacks._states import Held, adopt
from clip_callbacks.findings import Findings, Spike
from clip_callbacks.limits import Limit, as_limit
from clip_callbacks.nonfinite import NonFiniteGradientError, Policy, as_policy
from clip_callbacks.parameters import ParameterTable
from clip_callbacks.report import JOURNAL, StepReport
from clip_callbacks.rules import ClipRule, ClipState

Level: TypeAlias = Literal["window", "microbatch"]


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
            last checkpoint, or them in "full", which is what an exact replay needs; not with sharded parameters.
        max_bundles: How many bundles ``bundle_dir`` may hold, those of earlier runs counted.
        max_bundle_bytes: How much they may take together, in bytes.

    Raises:
        ValueError: If the policy, level or ``weights`` is unknown, ``max_consecutive`` or ``max_bundles`` is below 1,
            ``max_bundle_bytes`` is not above 0, or ``skip_above`` is not above 0 or stands beside another policy; at fit start, if
            ``bundle_dir`` cannot be written to.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[NonFiniteGuard(max_consecutive=3)], logger=False, enable_checkpointing=False)
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
    ) -> None:
        super().__init__()
        self.policy = as_policy(policy, "policy")
        if not isinstance(max_consecutive, int) or max_consecutive < 1:
            raise ValueError(f"`max_consecutive` must be a whole number of at least 1, got {max_consecutive!r}.")
        self.max_consecutive = max_consecutive
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
        self.bundle_dir = None if bundle_dir is None else Path(bundle_dir)
        if weights not in get_args(Weights):
            raise ValueError(f"`weights` must be one of {', '.join(get_args(Weights))}, got {weights!r}.")
        self.weights: Weights = weights
        if not isinstance(max_bundles, int) or max_bundles < 1:
            raise ValueError(f"`max_bundles` must be a whole number of at least 1, got {max_bundles!r}.")
        if not max_bundle_bytes > 0:
            raise ValueError(f"`max_bundle_bytes` must be above 0, got {max_bundle_bytes!r}.")
        self.max_bundles, self.max_bundle_bytes = max_bundles, max_bundle_bytes
        self._bundles: Bundles | None = None
        self._held: dict[int, Held] = {}
        self._counters: dict[int, Counters] = {}
        self._rewind: Rewind | None = None
        self._left_out = (-1, 0, 0)
        self.dropped_micro_batches = 0
        self._last_findings: Findings | None = None
        self._journal: Path | None = None

    @property
    def skipped_steps(self) -> int:
        """How many optimizer steps were skipped so far, over all optimizers."""
        self._settle()
        return sum(counters.skipped for counters in self._counters.values())

    @property
    def zeroed_steps(self) -> int:
        """How many steps were taken after non-finite entries were set to 0."""
        self._settle()
        return sum(counters.zeroed for counters in self._counters.values())

    @property
    def overflowed_steps(self) -> int:
        """How many steps a GradScaler skipped for an overflow."""
        self._settle()
        return sum(counters.overflowed for counters in self._counters.values())

    def _settle(self) -> None:
        if self._pass:
            self._pass.settle()

    def skipped_steps_of(self, index: int) -> int:
        """How many steps of one optimizer were skipped so far."""
        return self._counters[index].skipped

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be done right before anything is trained.

        Raises:
            ValueError: If so.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and (folder := self._folder()):
            try:
                folder.prepare()
            except OSError as error:
                raise ValueError(f"`bundle_dir` must be a folder that can be written to, got {folder.path}: {error}") from error

    def _folder(self) -> BundleFolder | None:
        return BundleFolder(self.bundle_dir, self.max_bundles, self.max_bundle_bytes) if self.bundle_dir else None

    def open_bundles(self, trainer: Trainer) -> None:
        """Be ready to write bundles, unless the folder is full."""
        folder = self._folder()
        if folder and (full := folder.fullness()):
            rank_zero_warn(f"{full}: no more will be written. Clear the folder, or name another.", stacklevel=2)
        elif folder:
            self._bundles = Bundles(folder, self.weights, trainer.lightning_module)

    def remember(self, batch: Any, batch_idx: int) -> KeptBatch | None:
        """What is kept of a batch until its step: a reference, if it may have to be run again."""
        if self._bundles:
            return self._bundles.remember(batch, batch_idx)
        return KeptBatch(batch, batch_idx) if self.trace_forward else None

    def bind(self, lanes: Sequence[Lane], names: Sequence[str], *, renew: bool = False) -> None:
        """Have counters for each optimizer.

        Raises:
            ValueError: If restored counters are those of other optimizers, or weights are to be written that are sharded.
        """
        super().bind(lanes, names, renew=renew)
        if self.bundle_dir and self.weights == "full" and any(lane.table.reduction for lane in lanes):
            raise ValueError(
                '`weights` must be "reference" or "none" with sharded parameters, got "full": a bundle is one rank\'s, and '
                "no rank has all of them. Save checkpoints."
            )
        if not renew and not self._counters.keys() <= {lane.index for lane in lanes}:
            raise ValueError(
                "the checkpoint's state of NonFiniteGuard must fit the optimizers, "
                f"got counters of {len(self._counters)} for {len(lanes)}."
            )
        for lane in lanes:
            self._counters.setdefault(lane.index, Counters())
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
        self.release()
        self._rewind = Rewind(module, lanes, restore_buffers=self.restore_buffers, hold_schedulers=self.hold_schedulers)
        self._rewind.schedules.load_state(self._left_out)
        return self._rewind

    def judge(self, incident: Incident, table: ParameterTable) -> Policy:
        """Decide on a step whose gradients are not finite, before anything is touched.

        Args:
            incident: Where and when.
            table: The parameters of the optimizer.

        Returns:
            The policy to follow.

        Raises:
            NonFiniteGradientError: If the policy is "raise", or this is one bad step too many in a row.
        """
        incident.happened = True
        counters = self._counters[incident.lane.index]
        if incident.is_overflow():
            counters.overflowed += incident.is_new
            incident.is_undone = True
            return "skip"
        if self.policy == "ignore":
            return "ignore"
        policy: Policy = "skip" if incident.leaves_to_scaler else self.policy
        number = incident.lane.history.steps - (not incident.is_new)
        after_good_step = 0 < number != counters.last_bad + 1
        if counters.add(number):
            counters.skipped += policy == "skip"
            counters.zeroed += policy == "zero"
            self._speak(incident, incident.findings(after_good_step=after_good_step), counters.streak)
        incident.is_undone = policy == "skip"
        # in the middle of LBFGS's search a step is undone in the end; until then torch's code gets the numbers it would get
        return "ignore" if incident.is_undone and not incident.is_new else policy

    def judge_spike(self, incident: Incident, report: StepReport) -> None:
        """Count a finite step that is skipped for its norm.

        Raises:
            NonFiniteGradientError: If this is one bad step too many in a row.
        """
        incident.is_undone = True
        assert report.skip_limit is not None
        counters = self._counters[incident.lane.index]
        counters.skipped += counters.add(incident.lane.history.steps)
        spike = Spike.of(incident.lane.table.names, report.parameter_norms, report.total_norm, report.skip_limit)
        facts = {**incident.place, "policy": self.policy, "streak": counters.streak, **spike.facts()}
        bundle = self._bundle(incident, facts)
        self._write(facts)
        what = f"Spike at {incident}: {spike}"
        if counters.streak >= self.max_consecutive:
            raise NonFiniteGradientError(
                f"{what}: bad step {counters.streak} in a row (max_consecutive={self.max_consecutive}).\n{spike.describe()}\n"
                f"Lower the learning rate, or raise skip_above: a level that lasts is no spike.{bundle}"
            )
        rank_zero_warn(
            f"{what}: the step is skipped (bad step {counters.streak} in a row, {self.max_consecutive} stop the run).\n"
            f"{spike.describe()}{bundle}",
            category=RuntimeWarning,
        )

    def judge_lost(self, incident: Incident, *, is_reported: bool) -> None:
        """Count a window of which nothing is left.

        Args:
            incident: Where and when.
            is_reported: Whether every micro-batch was dropped, and reported then; if not, all of them have weight 0.

        Raises:
            NonFiniteGradientError: If this is one bad step too many in a row.
        """
        incident.happened = incident.is_undone = True
        counters = self._counters[incident.lane.index]
        counters.skipped += counters.add(incident.lane.history.steps)
        streak, is_last = counters.streak, counters.streak >= self.max_consecutive and self.policy != "ignore"
        if is_reported:
            if is_last and self._last_findings:
                raise self._streak_error(incident, self._last_findings, streak)
            return
        what = f"Every micro-batch of the window has weight 0 at {incident}"
        self._write({**incident.place, "policy": self.policy, "streak": streak, "stage": "weight", "message": what})
        if is_last:
            raise NonFiniteGradientError(f"{what}: bad step {streak} in a row (max_consecutive={self.max_consecutive}).")
        rank_zero_warn(
            f"{what}: the step is skipped (bad step {streak} in a row, {self.max_consecutive} stop the run).",
            category=RuntimeWarning,
        )

    def forget(self) -> None:
        """Begin a new run."""
        super().forget()
        self._counters = {}
        self._held = {}
        self._left_out = (-1, 0, 0)
        self._last_findings = None
        self.dropped_micro_batches = 0

    def release(self) -> None:
        """Let go of the run; what a checkpoint needs stays."""
        if self._rewind:
            self._left_out, self._rewind = self._rewind.schedules.state(), None

    def close_bundles(self) -> None:
        """Let go of the module and its batches."""
        self._bundles = None

    def report_micro_batch(self, incident: Incident) -> None:
        """Warn of a micro-batch about to be dropped, and write a line of the journal."""
        self._last_findings = findings = incident.findings(after_good_step=False)
        facts = {**incident.place, "policy": "microbatch", **findings.facts()}
        bundle = self._bundle(incident, facts, is_window=False) if incident.is_guilty(findings) else ""
        self._write(facts)
        what = f"Non-finite gradients at {incident}: the micro-batch is dropped from its window."
        rank_zero_warn(f"{what}\n{findings.describe()}{bundle}", category=RuntimeWarning)

    def _speak(self, incident: Incident, findings: Findings, streak: int) -> None:
        """Raise, or warn and write a line of the journal.

        Raises:
            NonFiniteGradientError: As :meth:`judge` says.
        """
        facts = {**incident.place, "policy": self.policy, "streak": streak, **findings.facts()}
        bundle = self._bundle(incident, facts) if incident.is_guilty(findings) else ""
        self._write(facts)
        what, found = f"Non-finite gradients at {incident}", findings.describe() + bundle
        if self.policy == "raise":
            raise NonFiniteGradientError(f"{what}.\n{found}")
        if streak >= self.max_consecutive:
            raise self._streak_error(incident, findings, streak, bundle)
        done = "non-finite entries become 0" if self.policy == "zero" else "the step is skipped"
        rank_zero_warn(
            f"{what}: {done} (bad step {streak} in a row, {self.max_consecutive} stop the run).\n{found}", category=RuntimeWarning
        )

    def _streak_error(self, incident: Incident, findings: Findings, streak: int, bundle: str = "") -> NonFiniteGradientError:
        return NonFiniteGradientError(
            f"Non-finite gradients at {incident}: bad step {streak} in a row (max_consecutive={self.max_consecutive}).\n"
            f"{findings.describe()}\nLower the learning rate, clip harder, or look at the stage named above.{bundle}"
        )

    def _bundle(self, incident: Incident, facts: dict[str, Any], *, is_window: bool = True) -> str:
        """Write a bundle, if that is wanted, and put its place into the facts; lines for a message to tell of it."""
        if not self._bundles:
            return ""
        try:
            bundle = self._bundles.write(incident, facts, self._rewind, is_window=is_window)
        except Exception as error:  # whatever it was: the training must not end for it
            self._bundles = None
            warnings.warn(
                f"The bundle of {incident} cannot be written ({error}): training goes on, and no more bundles will be.",
                stacklevel=2,
            )
            return ""
        facts["bundle"] = str(bundle.path)
        return "\n".join([f"\nBundle: {bundle.path} (see clip-callbacks replay)", *(f"  {note}" for note in bundle.notes)])

    def open_journal(self, trainer: Trainer) -> None:
        """Find the log directory; the file is made at the first bad step."""
        folder = trainer.log_dir if trainer.loggers else None
        self._journal = Path(folder) / JOURNAL if folder and trainer.is_global_zero else None

    def _write(self, facts: dict[str, Any]) -> None:
        if not self._journal:
            return
        try:
            self._journal.parent.mkdir(parents=True, exist_ok=True)
            with self._journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")
        except OSError as error:  # one rank writes: if it stopped, the others would wait for it
            rank_zero_warn(f"{self._journal} cannot be written ({error}): bad steps are reported as warnings only.", stacklevel=2)
            self._journal = None

    def summary(self, lanes: Sequence[Lane]) -> list[str]:
        """One line if the run had bad steps or micro-batches that the table at the end does not tell of."""
        steps = sum(lane.history.steps for lane in lanes)
        parts = [
            f"{count} {word}"
            for count, word in (
                (self.zeroed_steps, "taken with non-finite entries set to 0"),
                (self.overflowed_steps, "left out by the GradScaler"),
                (self.dropped_micro_batches, "micro-batches dropped"),
            )
            if count
        ]
        return [f"NonFiniteGuard: of {steps} optimizer steps, {', '.join(parts)}."] if parts else []

    def state_dict(self) -> dict[str, Any]:
        """The counters, and where held schedules stand in the epoch."""
        state = super().state_dict()
        counters = {index: asdict(counters) for index, counters in self._counters.items()}
        left_out = self._rewind.schedules.state() if self._rewind else self._left_out
        return state | {
            "counters": counters,
            "skip_above": {index: held.dump() for index, held in self._held.items()},
            "left_out": left_out,
            "dropped_micro_batches": self.dropped_micro_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is not one of this callback.
        """
        super().load_state_dict(state_dict)
        self._left_out = tuple(state_dict["left_out"])
        if self._rewind:  # a strategy that loads late
            self._rewind.schedules.load_state(self._left_out)
        self.dropped_micro_batches = state_dict["dropped_micro_batches"]
        self._counters = {int(index): Counters(**counters) for index, counters in state_dict["counters"].items()}
        self._held = {int(index): Held.load(held) for index, held in state_dict["skip_above"].items()}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without what belongs to one Trainer's fit."""
        return super().__getstate__() | {"_rewind": None, "_journal": None, "_bundles": None}
