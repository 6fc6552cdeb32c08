"""Bad steps of a run: counted, told of, and what comes of too many in a row."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from clip_callbacks.core.diagnosis import LISTED, Findings, Spike
from clip_callbacks.core.metric_names import DROPPED_MICRO_BATCHES, OVERFLOWED_STEPS, ROLLBACKS, SKIPPED_STEPS, ZEROED_STEPS
from clip_callbacks.core.nonfinite import NonFiniteGradientError
from clip_callbacks.guard.examination import is_guilty
from clip_callbacks.guard.journal import Journal
from clip_callbacks.guard.options import GuardOptions
from clip_callbacks.guard.rollback import NoRollback
from clip_callbacks.trainer.nonfinite_metrics import describe_nonfinite_metrics
from clip_callbacks.trainer.step_context import Discarded, StepContext

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

NEVER = -2
"""Not the number of a step, nor of the one before it."""

_ADVICE = "Lower the learning rate, clip harder, or look at the stage named above."


@dataclass
class Counters:
    """What is counted for one optimizer.

    Attributes:
        skipped: Steps skipped.
        zeroed: Steps taken after non-finite entries were set to 0.
        overflowed: Steps that a GradScaler skipped.
        streak: Batches with bad steps in a row, up to ``last_bad``.
        steps_in_streak: The bad steps in them: a batch may have many, as with truncated backpropagation.
        last_bad: Number of the last bad step, counted over this optimizer's steps of the run; ``NEVER`` before the first.
        last_batch: Epoch and number of the batch of that step.
    """

    skipped: int = 0
    zeroed: int = 0
    overflowed: int = 0
    streak: int = 0
    steps_in_streak: int = 0
    last_bad: int = NEVER
    last_batch: tuple[int, int] = (0, 0)

    def add(self, number: int, batch: tuple[int, int]) -> bool:
        """Count a bad step, once though its closure may run several times; whether it is counted now.

        Args:
            number: Its number.
            batch: Epoch and number of its batch.
        """
        if number == self.last_bad:
            return False
        if self.last_bad != number - 1 or not self.streak:
            self.streak = self.steps_in_streak = 0
        self.streak += not self.streak or batch != tuple(self.last_batch)
        self.steps_in_streak += 1
        self.last_bad, self.last_batch = number, batch
        return True

    @property
    def in_a_row(self) -> str:
        """The streak in words."""
        if self.steps_in_streak == self.streak:
            return f"bad step {self.streak} in a row"
        return f"bad step {self.steps_in_streak} in a row, in bad batch {self.streak} in a row"


class BadStepCounts:
    """What is counted over the run; a value that a checkpoint holds.

    Args:
        saved: What :meth:`state_dict` returned; empty at the beginning of a run.

    Attributes:
        of: The counters of each optimizer, by its number.
        rollbacks: How often the run went back to earlier weights.
        dropped_micro_batches: How many micro-batches were dropped from their window.
    """

    def __init__(self, saved: Mapping[str, Any]) -> None:
        self.of = {int(index): Counters(**counters) for index, counters in saved.get("counters", {}).items()}
        self.rollbacks = int(saved.get("rollbacks", 0))
        self.dropped_micro_batches = int(saved.get("dropped_micro_batches", 0))

    @property
    def skipped(self) -> int:
        """Steps skipped, over all optimizers."""
        return sum(counters.skipped for counters in self.of.values())

    @property
    def zeroed(self) -> int:
        """Steps taken after non-finite entries were set to 0, over all optimizers."""
        return sum(counters.zeroed for counters in self.of.values())

    @property
    def overflowed(self) -> int:
        """Steps that a GradScaler skipped, over all optimizers."""
        return sum(counters.overflowed for counters in self.of.values())

    def metrics(self, index: int) -> dict[str, float]:
        """What is counted, by the names of metrics: steps of one optimizer, the rest for all of them together.

        Args:
            index: The number of the optimizer.
        """
        counters = self.of[index]
        return {
            SKIPPED_STEPS: float(counters.skipped),
            OVERFLOWED_STEPS: float(counters.overflowed),
            ZEROED_STEPS: float(counters.zeroed),
            DROPPED_MICRO_BATCHES: float(self.dropped_micro_batches),
            ROLLBACKS: float(self.rollbacks),
        }

    def end_streaks(self) -> None:
        """Begin every streak anew."""
        for counters in self.of.values():
            counters.streak = counters.steps_in_streak = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything, as numbers."""
        return {
            "counters": {index: asdict(counters) for index, counters in self.of.items()},
            "rollbacks": self.rollbacks,
            "dropped_micro_batches": self.dropped_micro_batches,
        }


@dataclass(frozen=True)
class _Message:
    """What is told of a bad step.

    Args:
        what: What it is, where and when.
        found: What a look at it has found.
        done: What is done about it, as long as such steps are few.
        advice: What to do when they do not end.
        bundle: Lines that tell of its bundle, each behind a line break.
        lost: Sentences about metrics that its loss has got into.
    """

    what: str
    found: str = ""
    done: str = "the step is skipped"
    advice: str = ""
    bundle: str = ""
    lost: Sequence[str] = ()

    def text(self, outcome: str, *more: str) -> str:
        """All of it in lines, what came of the step in the first."""
        first = " ".join([f"{self.what}{outcome}", *self.lost])
        return "\n".join(filter(None, [first, self.found, *more])) + self.bundle


class BadStepLog:
    """Tells of bad steps, and ends a streak of them: the run goes back, or an error is raised.

    Args:
        options: What the guard was told.
        counts: What is counted.
        journal: Where bad steps are written down.
        rollback: What goes back to earlier weights.
    """

    def __init__(self, options: GuardOptions, counts: BadStepCounts, journal: Journal, rollback: NoRollback) -> None:
        self._options = options
        self._counts = counts
        self._journal = journal
        self._rollback = rollback
        self._last_findings: Findings | None = None
        self._last_lost: tuple[int, list[str]] = (-1, [])

    def nonfinite(self, step: StepContext, findings: Findings, counters: Counters, before: Mapping[int, Tensor]) -> None:
        """Tell of gradients that are not finite.

        Args:
            step: The step.
            findings: What a look at it has found.
            counters: The optimizer's, which have counted it.
            before: Tensors as a skip puts them back, by the ``id`` of the live ones.

        Raises:
            NonFiniteGradientError: If the policy says so, or the streak ends here and the run cannot go back.
        """
        policy = self._options.policy
        lost = self._lost_metrics(step, findings)
        facts = {**step.place, "policy": policy, "streak": counters.streak, **findings.facts(), "lost_metrics": lost}
        bundle = self._journal.record(step, facts, before, is_guilty=is_guilty(step, findings))
        done = "the step is skipped"
        if policy == "zero":
            done = "non-finite entries become 0"
        message = _Message(f"Non-finite gradients at {step}", findings.describe(), done, _ADVICE, bundle, lost)
        if policy == "raise":
            raise NonFiniteGradientError(message.text("."))
        self._tell(step, message, counters)

    def spike(self, step: StepContext, spike: Spike, counters: Counters, before: Mapping[int, Tensor]) -> None:
        """Tell of a finite step that is skipped for its norm; arguments as for :meth:`nonfinite`.

        Raises:
            NonFiniteGradientError: If the streak ends here, and the run cannot go back.
        """
        facts = {**step.place, "policy": self._options.policy, "streak": counters.streak, **spike.facts()}
        message = _Message(
            f"Spike at {step}: {spike}",
            spike.describe(),
            advice="Lower the learning rate, or raise skip_above: a level that lasts is no spike.",
            bundle=self._journal.record(step, facts, before),
        )
        self._tell(step, message, counters)

    def discarded(self, step: StepContext, counters: Counters) -> None:
        """Tell of a window whose gradients mean nothing.

        Raises:
            NonFiniteGradientError: If the streak ends here, and the run cannot go back.
        """
        assert step.discarded is not None
        stage = "weight" if step.discarded is Discarded.WEIGHTLESS else step.discarded.value
        what = f"{step.why_discarded} at {step}"
        facts = {"policy": self._options.policy, "streak": counters.streak, "stage": stage, "message": what}
        self._journal.note({**step.place, **facts})
        self._tell(step, _Message(what), counters)

    def all_dropped(self, step: StepContext, counters: Counters) -> None:
        """Tell of a window whose micro-batches were all dropped, if the streak ends with it: each has been told of.

        Raises:
            NonFiniteGradientError: If the streak ends here, and the run cannot go back.
        """
        if self._is_over(counters.streak) and self._last_findings:
            what = f"Non-finite gradients in every micro-batch at {step}"
            self._tell(step, _Message(what, self._last_findings.describe(), advice=_ADVICE), counters)

    def dropped_micro_batch(self, step: StepContext, findings: Findings, before: Mapping[int, Tensor]) -> None:
        """Tell of a micro-batch about to be dropped; arguments as for :meth:`nonfinite`."""
        self._last_findings = findings
        lost = self._lost_metrics(step, findings)
        facts = {**step.place, "policy": "microbatch", **findings.facts(), "lost_metrics": lost}
        bundle = self._journal.record(step, facts, before, is_window=False, is_guilty=is_guilty(step, findings))
        message = _Message(f"Non-finite gradients at {step}", findings.describe(), bundle=bundle, lost=lost)
        self._warn(message.text(": the micro-batch is dropped from its window."))

    def _lost_metrics(self, step: StepContext, findings: Findings) -> list[str]:
        """What comes of metrics that the loss has got into, in sentences; an epoch is told of them once."""
        found = step.trainer.current_epoch, describe_nonfinite_metrics(step.trainer)
        if found == self._last_lost:
            return []
        self._last_lost = found
        rank, sentences = step.trainer.global_rank, found[1]
        if rank and sentences and rank == min(findings.loss_ranks, default=0):
            # the report is the first rank's, whose own part of the metric is finite
            warnings.warn(f"On rank {rank}: {' '.join(sentences)}", RuntimeWarning, stacklevel=2)
        return sentences

    def undone(self, trainer: Trainer, names: Sequence[str], since: str) -> None:
        """Tell of buffers that a forward pass without a step has made bad, if there are any.

        Args:
            trainer: The Trainer.
            names: Their names.
            since: What they are put back to the beginning of.
        """
        if names:
            place = f"epoch {trainer.current_epoch}, batch {trainer.fit_loop.batch_idx}, rank {trainer.global_rank}"
            listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
            self._warn(
                f"Non-finite buffers after a forward pass that led to no step, at {place}: {listed}. "
                f"They are put back to what they were before {since}."
            )

    def can_go_back(self, streak: int) -> bool:
        """Whether a streak ends in a rollback."""
        is_last = self._counts.rollbacks >= self._options.max_rollbacks
        return self._is_over(streak) and self._options.rolls_back and not is_last and self._rollback.step is not None

    def _tell(self, step: StepContext, message: _Message, counters: Counters) -> None:
        """Warn of a bad step; at the end of a streak go back, or raise.

        Raises:
            NonFiniteGradientError: If the streak ends here, and the run cannot go back.
        """
        number, streak = counters.in_a_row, counters.streak
        if not self._is_over(streak):
            end = ""
            if self._options.policy != "ignore":
                end = f", {self._options.max_consecutive} stop the run"
            self._warn(message.text(f": {message.done} ({number}{end})."))
        elif self.can_go_back(streak):
            self._warn(message.text(f": {number}. {self._go_back(step)}"))
        else:
            raise NonFiniteGradientError(message.text(f": {number} ({self._cap}).", message.advice))

    def _is_over(self, streak: int) -> bool:
        """Whether a streak ends with this step: what is ignored has no end, nor has a search for the learning rate."""
        has_end = self._options.policy != "ignore" and not self._options.in_search
        return has_end and streak >= self._options.max_consecutive

    def _warn(self, text: str) -> None:
        if not self._options.in_search:
            rank_zero_warn(text, category=RuntimeWarning)

    def _go_back(self, step: StepContext) -> str:
        """Have the run go back to earlier weights at the end of this step; that in a sentence, and in a line of the journal."""
        rollback, counts = self._rollback, self._counts
        counts.rollbacks += 1
        counts.end_streaks()
        facts = {"rollback": counts.rollbacks, "back_to": rollback.step, "lr_factor": rollback.factor}
        self._journal.note({**step.place, "policy": "rollback", "stage": f"back to step {rollback.step}", **facts})
        rates = ""
        if rollback.factor != 1.0:
            rates = f", with {rollback.factor:.4g} times the learning rates of then"
        rollback.ask()
        return (
            f"The run goes back to where it was before step {rollback.step}{rates} "
            f"(rollback {counts.rollbacks} of {self._options.max_rollbacks})."
        )

    @property
    def _cap(self) -> str:
        """For the error at the end of a streak: what allowed no more."""
        cap = f"max_consecutive={self._options.max_consecutive}"
        if not self._options.rolls_back:
            return cap
        if self._counts.rollbacks >= self._options.max_rollbacks:
            return f"{cap}, after {self._counts.rollbacks} rollbacks, max_rollbacks={self._options.max_rollbacks}"
        return f"{cap}, and no good step to go back to{self._rollback.since}"
