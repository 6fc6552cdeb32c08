"""Reports of bad steps, and the end of a streak of them: a rollback or an error."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_warn

from clip_callbacks.core.actions import Action
from clip_callbacks.core.diagnosis import MAX_LISTED, Diagnosis, Spike
from clip_callbacks.core.nonfinite import NonFiniteGradientError
from clip_callbacks.core.wording import listed
from clip_callbacks.guard.counts import BadStepCounts, Counters
from clip_callbacks.guard.examination import may_be_source
from clip_callbacks.guard.journal import Journal
from clip_callbacks.guard.options import GuardOptions
from clip_callbacks.guard.rollback import NoRestorer
from clip_callbacks.trainer.nonfinite_metrics import describe_nonfinite_metrics
from clip_callbacks.trainer.step_context import Discarded, StepContext

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_ADVICE = "Lower the learning rate, clip harder, or look at the stage named above."

_ADVICE_ON_LOSSES = (
    "Look at the batch, which `bundles=…` keeps, and at the first non-finite output, which `trace_forward=True` names; or lower "
    "the learning rate."
)
"""Advice where the loss was not finite: clipping changes nothing in the forward pass."""

_DONE = {
    Action.CLIP: "the step is taken",
    Action.SKIP: "the step is skipped",
    Action.ZERO: "non-finite entries become 0",
}
"""Action on a bad step, in words."""


@dataclass(frozen=True)
class _Message:
    """Message about a bad step.

    Args:
        what: Kind and place of the step.
        diagnosis: Lines with the results of its examination.
        done: Action taken, as long as the streak lasts.
        advice: Advice for the error at the end of a streak.
        bundle: Lines about its bundle, each after a line break.
        lost: Sentences about metrics that a non-finite loss has got into.
    """

    what: str
    diagnosis: str = ""
    done: str = "the step is skipped"
    advice: str = ""
    bundle: str = ""
    lost: Sequence[str] = ()

    def text(self, outcome: str, *more: str) -> str:
        """Return the whole text.

        Args:
            outcome: Outcome of the step, appended to the first line.
            more: Further lines, placed before those about the bundle.
        """
        first = " ".join([f"{self.what}{outcome}", *self.lost])
        return "\n".join(filter(None, [first, self.diagnosis, *more])) + self.bundle


class BadStepLog:
    """Reports bad steps in warnings and in the journal, and ends a streak of them by a rollback or an error.

    Args:
        options: The guard's options.
        counts: Counts of the run.
        journal: Journal that bad steps are written to.
        rollback: Restorer of earlier weights.
    """

    def __init__(self, options: GuardOptions, counts: BadStepCounts, journal: Journal, rollback: NoRestorer) -> None:
        self._options = options
        self._counts = counts
        self._journal = journal
        self._rollback = rollback
        self._last_diagnosis: Diagnosis | None = None
        self._last_lost: tuple[int, list[str]] = (-1, [])

    def nonfinite(self, step: StepContext, diagnosis: Diagnosis, counters: Counters, action: Action) -> None:
        """Report non-finite gradients.

        Args:
            step: The step.
            diagnosis: Results of its examination.
            counters: Counters of the optimizer, which have counted the step.
            action: Action on the step.

        Raises:
            NonFiniteGradientError: Under the policy "raise", or at the end of a streak without a rollback.
        """
        policy = self._options.policy
        lost = self._lost_metrics(step, diagnosis)
        facts = {**step.logged_place, "policy": policy, "streak": counters.streak, **diagnosis.facts(), "lost_metrics": lost}
        # Written before any error below: the step that ends the run is the one to be replayed.
        bundle = self._journal.record(step, facts, may_be_source=may_be_source(step, diagnosis))
        message = _Message(f"Non-finite gradients at {step}", diagnosis.describe(), _DONE[action], _advice(diagnosis), bundle, lost)
        if policy == "raise":
            raise NonFiniteGradientError(message.text("."))
        self._warn_or_end(step, message, counters)

    def spike(self, step: StepContext, spike: Spike, counters: Counters) -> None:
        """Report a finite step whose norm or loss is above a threshold.

        Args:
            step: The step.
            spike: Norms and loss of the step, and the thresholds.
            counters: Counters of the optimizer, which have counted the step.

        Raises:
            NonFiniteGradientError: At the end of a streak without a rollback.
        """
        facts = {**step.logged_place, "policy": self._options.policy, "streak": counters.streak, **spike.facts()}
        action = Action.SKIP
        if self._options.takes_bad_steps:
            action = Action.CLIP
        message = _Message(
            f"Spike at {step}: {spike}",
            spike.describe(),
            _DONE[action],
            advice=f"Lower the learning rate, or raise {' and '.join(spike.exceeded)}: what stays at this level is no spike.",
            bundle=self._journal.record(step, facts),
        )
        self._warn_or_end(step, message, counters)
        share = counters.find_common_spikes()
        if share is not None:
            self._warn(
                f"About {share:.0%} of the last steps were spikes, the last at {step}: these are no exceptions, and "
                f"if they are skipped, a whole kind of batch is left out of training. Raise {' and '.join(spike.exceeded)}, or set "
                "`both=True` with thresholds of the norm and of the loss."
            )

    def discarded(self, step: StepContext, counters: Counters) -> None:
        """Report an accumulation window without usable gradients.

        Raises:
            NonFiniteGradientError: At the end of a streak without a rollback.
        """
        assert step.discarded is not None
        stage = "weight" if step.discarded is Discarded.WEIGHTLESS else step.discarded.value
        what = f"{step.why_discarded} at {step}"
        facts = {"policy": self._options.policy, "streak": counters.streak, "stage": stage, "message": what}
        # no bundle: the gradients were not at fault, or the step that was has one
        self._journal.note({**step.logged_place, **facts})
        self._warn_or_end(step, _Message(what), counters)

    def all_dropped(self, step: StepContext, counters: Counters) -> None:
        """Report a window whose micro-batches were all dropped, if the streak ends with it; each of them was reported already.

        Raises:
            NonFiniteGradientError: At the end of a streak without a rollback.
        """
        if self._ends_streak(counters.streak) and self._last_diagnosis:
            what, diagnosis = f"Non-finite gradients in every micro-batch at {step}", self._last_diagnosis
            self._warn_or_end(step, _Message(what, diagnosis.describe(), advice=_advice(diagnosis)), counters)

    def dropped_micro_batch(self, step: StepContext, diagnosis: Diagnosis) -> None:
        """Report a micro-batch before it is dropped.

        Args:
            step: The step, with only this micro-batch in its window.
            diagnosis: Results of its examination.
        """
        # kept for the error of a window whose micro-batches are all dropped: by then no bad gradient is left to examine
        self._last_diagnosis = diagnosis
        lost = self._lost_metrics(step, diagnosis)
        facts = {**step.logged_place, "policy": "microbatch", **diagnosis.facts(), "lost_metrics": lost}
        bundle = self._journal.record(step, facts, is_window=False, may_be_source=may_be_source(step, diagnosis))
        message = _Message(f"Non-finite gradients at {step}", diagnosis.describe(), bundle=bundle, lost=lost)
        self._warn(message.text(": the micro-batch is dropped from its window."))

    def _lost_metrics(self, step: StepContext, diagnosis: Diagnosis) -> list[str]:
        """Return sentences about metrics that the loss has got into; each set of them is reported once in an epoch."""
        found = step.trainer.current_epoch, describe_nonfinite_metrics(step.trainer)
        if found == self._last_lost:
            return []
        self._last_lost = found
        rank, sentences = step.trainer.global_rank, found[1]
        if rank and sentences and rank == min(diagnosis.loss_ranks, default=0):
            # The warning about the step comes from the first rank, whose own part of the metric is finite.
            warnings.warn(f"On rank {rank}: {' '.join(sentences)}", RuntimeWarning, stacklevel=2)
        return sentences

    def restored_buffers(self, trainer: Trainer, names: Sequence[str], unit: str) -> None:
        """Report buffers that a forward pass without a step has made non-finite, if there are any.

        Args:
            trainer: The Trainer.
            names: Names of the buffers.
            unit: Unit of training to whose beginning they were restored, for the message.
        """
        if names:
            place = f"epoch {trainer.current_epoch}, batch {trainer.fit_loop.batch_idx}, rank {trainer.global_rank}"
            self._warn(
                f"Non-finite buffers after a forward pass that led to no step, at {place}: {listed(names, MAX_LISTED)}. "
                f"They are restored to their values from before {unit}."
            )

    def can_roll_back(self, streak: int) -> bool:
        """Return whether a streak of this length ends in a rollback."""
        options = self._options.rollback
        if options is None or self._counts.rollbacks >= options.max_rollbacks:
            return False
        # the copy is made before the first good step: a run that is bad from the start has none
        return self._ends_streak(streak) and self._rollback.step is not None

    def _warn_or_end(self, step: StepContext, message: _Message, counters: Counters) -> None:
        """Warn of a bad step; at the end of a streak request a rollback, or raise.

        Raises:
            NonFiniteGradientError: At the end of a streak without a rollback.
        """
        number, streak = counters.in_a_row, counters.streak
        if self._options.takes_bad_steps and streak > self._options.max_consecutive:
            return  # a run that has diverged would warn at each step, without an end
        if not self._ends_streak(streak):
            end = f", {self._options.max_consecutive} stop the run"
            if self.can_roll_back(self._options.max_consecutive):
                end = f", {self._options.max_consecutive} roll back"
            if self._options.takes_bad_steps:
                end = ""
                if streak == self._options.max_consecutive:
                    end = ", those that follow are only counted"
            self._warn(message.text(f": {message.done} ({number}{end})."))
        elif self.can_roll_back(streak):
            self._warn(message.text(f": {number}. {self._request_rollback(step)}"))
        else:
            # Streaks are equal on all ranks, so that all of them raise, and none waits in a collective for the others.
            raise NonFiniteGradientError(message.text(f": {number} ({self._limit_reached}).", message.advice))

    def _ends_streak(self, streak: int) -> bool:
        """Return whether a streak ends with this step; never while bad steps are taken or a learning rate is searched for."""
        has_end = not self._options.takes_bad_steps and not self._options.in_search
        return has_end and streak >= self._options.max_consecutive

    def _warn(self, text: str) -> None:
        if not self._options.in_search:
            # ranks decide alike, so that one of them speaks for all
            rank_zero_warn(text, category=RuntimeWarning)

    def _request_rollback(self, step: StepContext) -> str:
        """Request a rollback at the end of this step, write it into the journal, and return a sentence about it."""
        rollback, options = self._rollback, self._options.rollback
        assert options is not None, "can_roll_back has said so"
        count = self._counts.count_rollback()
        facts = {"rollback": count, "back_to": rollback.step, "lr_factor": rollback.factor}
        self._journal.note({**step.logged_place, "policy": "rollback", "stage": f"back to step {rollback.step}", **facts})
        rates = ""
        if rollback.factor != 1.0:
            rates = f", with {rollback.factor:.4g} times the learning rates of that time"
        rollback.request()
        return f"The run returns to its state before step {rollback.step}{rates} (rollback {count} of {options.max_rollbacks})."

    @property
    def _limit_reached(self) -> str:
        """The option that ended the streak, for the error."""
        limit = f"max_consecutive={self._options.max_consecutive}"
        options = self._options.rollback
        if options is None:
            return limit
        if self._counts.rollbacks >= options.max_rollbacks:
            return f"{limit}, max_rollbacks={options.max_rollbacks}, rollbacks so far: {self._counts.rollbacks}"
        return f"{limit}, and no good step to return to{self._rollback.since}"


def _advice(diagnosis: Diagnosis) -> str:
    if diagnosis.stage == "loss":
        return _ADVICE_ON_LOSSES
    return _ADVICE
