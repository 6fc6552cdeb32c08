"""What the guard counts for one optimizer."""

from __future__ import annotations

from dataclasses import dataclass

NEVER = -2
"""Not the number of a step, nor of the one before it."""


@dataclass
class Counters:
    """What the guard counts for one optimizer.

    Attributes:
        skipped: Steps skipped.
        zeroed: Steps taken after non-finite entries were set to 0.
        overflowed: Steps that a GradScaler skipped.
        streak: Bad steps in a row, up to ``last_bad``.
        last_bad: Number of the last bad step, counted over this optimizer's steps of the run; ``NEVER`` before the first.
    """

    skipped: int = 0
    zeroed: int = 0
    overflowed: int = 0
    streak: int = 0
    last_bad: int = NEVER

    def add(self, number: int) -> bool:
        """Count a bad step, once though its closure may run several times; whether it is counted now."""
        if number == self.last_bad:
            return False
        self.streak = self.streak + 1 if self.last_bad == number - 1 else 1
        self.last_bad = number
        return True
