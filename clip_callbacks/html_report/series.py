"""One metric over steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Steps = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
LAST_STEP = 2**63 - 1
"""Steps are int64."""
MLFLOW_INFINITY = 1.7976931348623157e308
"""What MLflow stores for infinity."""


@dataclass(frozen=True, eq=False)
class Series:
    """One metric over steps, in the order of the steps.

    Args:
        steps: Of the logger's x-axis, int64 of shape ``(n,)``.
        values: float64 of shape ``(n,)``; what was logged as NaN or inf is among them.
        superseded: How many points were left out because the steps went back behind them.
    """

    steps: Steps
    values: Values
    superseded: int = 0

    @classmethod
    def of(cls, steps: npt.ArrayLike, values: npt.ArrayLike) -> Series:
        """Make a series of points in the order in which they were logged.

        Of several points at one step the last counts. Where the steps go back, as in a run that was resumed from an earlier
        checkpoint, what was logged from there on before is left out: that branch of the run was given up.
        """
        at, what = np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64)
        superseded = 0
        if len(at) > 1 and not bool(np.all(at[1:] > at[:-1])):
            later = np.minimum.accumulate(at[::-1])[::-1]  # the lowest step from each point on
            superseded = int((at[:-1] > later[1:]).sum())
            stays = np.append(at[:-1] < later[1:], True)
            at, what = at[stays], what[stays]
        return cls(at, np.where(np.abs(what) >= MLFLOW_INFINITY, np.copysign(np.inf, what), what), superseded)

    @classmethod
    def empty(cls) -> Series:
        """No point."""
        return cls(np.empty(0, np.int64), np.empty(0, np.float64))

    def __len__(self) -> int:
        """How many points there are."""
        return len(self.steps)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return len(self.steps) > 0

    @cached_property
    def finite(self) -> Series:
        """The finite points."""
        is_finite = np.isfinite(self.values)
        return self if bool(is_finite.all()) else Series(self.steps[is_finite], self.values[is_finite])

    def between(self, first: int | None, last: int | None) -> Series:
        """The points from one step to another, both included."""
        low = 0 if first is None else int(np.searchsorted(self.steps, first, "left"))
        high = len(self) if last is None else int(np.searchsorted(self.steps, last, "right"))
        return Series(self.steps[low:high], self.values[low:high])

    def at(self, steps: Steps) -> Values:
        """The value in force at each of some steps: the last one logged up to there, NaN before the first."""
        if not self:
            return np.full(len(steps), np.nan)
        place = np.searchsorted(self.steps, steps, "right") - 1
        return np.where(place >= 0, self.values[np.maximum(place, 0)], np.nan)

    def agrees_with(self, other: Series) -> bool:
        """Whether the shorter one of two series is the beginning of the other; event files hold seven digits."""
        count = min(len(self), len(other))
        return np.array_equal(self.steps[:count], other.steps[:count]) and np.allclose(
            self.values[:count], other.values[:count], rtol=1e-6, equal_nan=True
        )

    @property
    def first_step(self) -> int:
        """The first step that the log tells of: 0, or one interval before the first point if logging began later."""
        if len(self) < 2:  # noqa: PLR2004
            return int(self.steps[0]) if self else 0
        gap = int(np.median(np.diff(self.steps)))
        return 0 if 0 <= self.steps[0] < 2 * gap else int(self.steps[0]) - gap + 1

    @property
    def interval_edges(self) -> Steps:
        """Before the first point and after each: where the steps that it sums up begin and end, shape ``(n + 1,)``."""
        return np.concatenate([[self.first_step], self.steps + 1]) if self else np.zeros(1, np.int64)

    @property
    def mean(self) -> float:
        """Of values that sum up all steps since the last point, each weighted by how many those are; NaN without one."""
        return float(np.average(self.values, weights=np.diff(self.interval_edges))) if self else float("nan")

    @property
    def last(self) -> float:
        """The last finite value; NaN without one."""
        return float(self.finite.values[-1]) if self.finite else float("nan")
