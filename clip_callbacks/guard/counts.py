"""Counts of bad steps, which checkpoints hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from clip_callbacks.core.metric_names import (
    DROPPED_MICRO_BATCHES,
    OVERFLOWED_STEPS,
    REPORTED_STEPS,
    ROLLBACKS,
    SKIPPED_STEPS,
    SPIKES,
    ZEROED_STEPS,
)

MEMORY = 200
"""Number of steps over which the share of spikes is a running mean."""

MAX_SPIKE_SHARE = 0.1
"""Share of spikes among the last steps above which they are no exceptions."""

MIN_STEPS_FOR_SHARE = 100
"""Smallest number of steps of which the share is judged."""

NO_STEP = -2
"""Step number before the first bad step: neither the number of a step nor the one before it."""


@dataclass
class Counters:
    """Counts of one optimizer.

    Attributes:
        skipped: Number of skipped steps.
        zeroed: Number of steps taken after non-finite entries were set to 0.
        overflowed: Number of steps that a GradScaler skipped.
        spikes: Number of finite steps above a threshold, skipped or not.
        reported: Number of steps that were reported as non-finite under the policy "warn", and taken.
        spike_share: Share of spikes among the last steps, a running mean up to ``last_spike`` that begins at 0.
        has_common_spikes: True once a warning has said that spikes are no exceptions.
        last_spike: Number of the last spike, counted over this optimizer's steps of the run.
        streak: Number of bad batches in a row, up to ``last_bad``.
        steps_in_streak: Number of bad steps in these batches; a batch has many with truncated backpropagation.
        last_bad: Number of the last bad step, counted over this optimizer's steps of the run; ``NO_STEP`` before the first.
        last_batch: Epoch and number of the batch of that step.
    """

    skipped: int = 0
    zeroed: int = 0
    overflowed: int = 0
    spikes: int = 0
    reported: int = 0
    spike_share: float = 0.0
    last_spike: int = 0
    has_common_spikes: bool = False
    streak: int = 0
    steps_in_streak: int = 0
    last_bad: int = NO_STEP
    last_batch: tuple[int, int] = (0, 0)

    def add(self, number: int, batch: tuple[int, int]) -> bool:
        """Count a bad step, but only once if its closure runs several times.

        Args:
            number: Number of the step.
            batch: Epoch and number of the batch.

        Returns:
            True if the step was counted now, False if it had been counted before.
        """
        if number == self.last_bad:
            return False
        # the streak may be 0 although the step before was bad: a rollback has ended it
        if self.last_bad != number - 1 or not self.streak:
            self.end_streak()
        # Batches count and not steps, for truncated backpropagation makes many steps of one bad batch. A state that was loaded may
        # have a list in place of the tuple.
        self.streak += not self.streak or batch != tuple(self.last_batch)
        self.steps_in_streak += 1
        self.last_bad, self.last_batch = number, batch
        return True

    def count(self, *, skipped: bool = False, zeroed: bool = False, overflowed: bool = False, reported: bool = False) -> None:
        """Count what became of a bad step."""
        self.skipped += skipped
        self.zeroed += zeroed
        self.overflowed += overflowed
        self.reported += reported

    def end_streak(self) -> None:
        """Begin a new streak with the next bad step."""
        self.streak = self.steps_in_streak = 0

    def add_spike(self, number: int) -> None:
        """Count a spike.

        Args:
            number: Number of the step.
        """
        self.spikes += 1
        self.spike_share = self.spike_share * (1.0 - 1.0 / MEMORY) ** (number - self.last_spike) + 1.0 / MEMORY
        self.last_spike = number

    def find_common_spikes(self) -> float | None:
        """Return the share of spikes among the last steps if it is too large for exceptions; None if not, or once it was found."""
        # a mean that begins at 0 is too low at first; of few steps it says little
        share = self.spike_share / (1.0 - (1.0 - 1.0 / MEMORY) ** (self.last_spike + 1))
        if self.has_common_spikes or self.last_spike < MIN_STEPS_FOR_SHARE or share <= MAX_SPIKE_SHARE:
            return None
        self.has_common_spikes = True
        return share

    @property
    def in_a_row(self) -> str:
        """The streak, for messages."""
        if self.steps_in_streak == self.streak:
            return f"bad step {self.streak} in a row"
        return f"bad step {self.steps_in_streak} in a row, in bad batch {self.streak} in a row"


class BadStepCounts:
    """Counts of a run, which checkpoints hold.

    Args:
        saved: Return value of :meth:`state_dict`; empty at the beginning of a run.

    Attributes:
        of: Counters of each optimizer, by its index.
        rollbacks: Number of rollbacks to earlier weights.
        dropped_micro_batches: Number of micro-batches dropped from their window.
    """

    def __init__(self, saved: Mapping[str, Any]) -> None:
        self.of = {int(index): Counters(**counters) for index, counters in saved.get("counters", {}).items()}
        self.rollbacks = int(saved.get("rollbacks", 0))
        self.dropped_micro_batches = int(saved.get("dropped_micro_batches", 0))

    def total(self, kind: str) -> int:
        """Return a count of steps over all optimizers.

        Args:
            kind: Name of the attribute of :class:`Counters`.
        """
        return sum(getattr(counters, kind) for counters in self.of.values())

    def metrics(self, index: int) -> dict[str, float]:
        """Return the counts by the names of metrics: steps of one optimizer, and the rest for all optimizers together.

        Args:
            index: Index of the optimizer.
        """
        counters = self.of[index]
        return {
            SKIPPED_STEPS: float(counters.skipped),
            OVERFLOWED_STEPS: float(counters.overflowed),
            ZEROED_STEPS: float(counters.zeroed),
            SPIKES: float(counters.spikes),
            REPORTED_STEPS: float(counters.reported),
            DROPPED_MICRO_BATCHES: float(self.dropped_micro_batches),
            ROLLBACKS: float(self.rollbacks),
        }

    def count_rollback(self) -> int:
        """Count a rollback, which ends the streak of every optimizer; return the number of rollbacks so far."""
        self.rollbacks += 1
        # of every optimizer, because the weights of all are replaced
        for counters in self.of.values():
            counters.end_streak()
        return self.rollbacks

    def count_dropped_micro_batch(self) -> None:
        """Count a dropped micro-batch."""
        self.dropped_micro_batches += 1

    def described(self) -> str:
        """Return the counts that are not 0, over all optimizers, in words."""
        counted = (
            ("taken with non-finite entries set to 0", self.total("zeroed")),
            ("with non-finite gradients or losses, reported", self.total("reported")),
            ("spikes", self.total("spikes")),
            ("skipped by the GradScaler", self.total("overflowed")),
            ("dropped micro-batches", self.dropped_micro_batches),
            ("rollbacks", self.rollbacks),
        )
        return ", ".join(f"{what}: {count}" for what, count in counted if count)

    def state_dict(self) -> dict[str, Any]:
        """Return all counts as plain numbers."""
        return {
            "counters": {index: asdict(counters) for index, counters in self.of.items()},
            "rollbacks": self.rollbacks,
            "dropped_micro_batches": self.dropped_micro_batches,
        }
