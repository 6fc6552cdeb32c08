"""The values of one metric over steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Steps = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
LAST_STEP = 2**63 - 1
"""The largest step that int64 holds."""
MLFLOW_INFINITY = 1.7976931348623157e308
"""The number that MLflow stores for infinity, the largest of float64."""


@dataclass(frozen=True, eq=False)
class Series:
    """One metric over steps, in ascending order of the steps.

    Args:
        steps: Steps on the logger's x-axis, int64 of shape ``(n,)``.
        values: Logged values, float64 of shape ``(n,)``, NaN and inf included.
        superseded: Number of points that were left out because a later part of the run went back to an earlier step.
        begin: First step that the points may cover, as after a cut.
    """

    steps: Steps
    values: Values
    superseded: int = 0
    begin: int = 0

    @classmethod
    def of(cls, steps: npt.ArrayLike, values: npt.ArrayLike) -> Series:
        """Make a series from points in the order in which they were logged.

        The last of several points at one step counts. A run that was resumed from an earlier checkpoint logs lower steps again:
        the points of the abandoned branch, from that step on, are left out.
        """
        logged_steps, logged = np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64)
        superseded = 0
        if len(logged_steps) > 1 and not bool(np.all(logged_steps[1:] > logged_steps[:-1])):
            lowest_later = np.minimum.accumulate(logged_steps[::-1])[::-1]
            superseded = int((logged_steps[:-1] > lowest_later[1:]).sum())
            stays = np.append(logged_steps[:-1] < lowest_later[1:], True)
            logged_steps, logged = logged_steps[stays], logged[stays]
        return cls(logged_steps, np.where(np.abs(logged) >= MLFLOW_INFINITY, np.copysign(np.inf, logged), logged), superseded)

    @classmethod
    def empty(cls) -> Series:
        """Make a series without points."""
        return cls(np.empty(0, np.int64), np.empty(0, np.float64))

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self.steps)

    def __bool__(self) -> bool:
        """Return whether the series has points."""
        return len(self.steps) > 0

    @cached_property
    def finite(self) -> Series:
        """The points whose value is finite."""
        return self.where(np.isfinite(self.values))

    @property
    def not_finite(self) -> Series:
        """The points whose value is NaN or infinite."""
        return self.where(~np.isfinite(self.values))

    @property
    def not_finite_at_end(self) -> Series:
        """The run of points at the end whose value is NaN or infinite: those after the last finite one."""
        if not self.finite:
            return self
        return self.between(int(self.finite.steps[-1]) + 1, None)

    def where(self, chosen: npt.NDArray[np.bool_]) -> Series:
        """Return the chosen points; the series itself if these are all."""
        if bool(chosen.all()):
            return self
        return Series(self.steps[chosen], self.values[chosen], begin=self.begin)

    def between(self, first: int | None, last: int | None) -> Series:
        """Return the points from one step to another, both included; None leaves that end open."""
        low, high, begin = 0, len(self), self.begin
        if first is not None:
            low, begin = int(np.searchsorted(self.steps, first, "left")), max(begin, first)
        if last is not None:
            high = int(np.searchsorted(self.steps, last, "right"))
        return Series(self.steps[low:high], self.values[low:high], begin=begin)

    def at(self, steps: Steps) -> Values:
        """Return the value in force at each of the given steps: the last one logged up to there, NaN before the first."""
        if not self:
            return np.full(len(steps), np.nan)
        place = np.searchsorted(self.steps, steps, "right") - 1
        return np.where(place >= 0, self.values[np.maximum(place, 0)], np.nan)

    def agrees_with(self, other: Series) -> bool:
        """Return whether the shorter of two series is the beginning of the longer, to the seven digits that event files hold."""
        count = min(len(self), len(other))
        return np.array_equal(self.steps[:count], other.steps[:count]) and np.allclose(
            self.values[:count], other.values[:count], rtol=1e-6, equal_nan=True
        )

    @property
    def first_step(self) -> int:
        """The first step that the points cover: ``begin``, or one logging interval before the first point if that is later."""
        if not self:
            return self.begin
        first = int(self.steps[0])
        if len(self) == 1:
            return first
        gap = int(self.steps_between)
        if 0 <= first < 2 * gap:
            return self.begin
        return max(first - gap + 1, self.begin)

    @property
    def steps_between(self) -> float:
        """Median number of steps from one point to the next; NaN with fewer than two points."""
        if len(self) < 2:  # noqa: PLR2004
            return math.nan
        return float(np.median(np.diff(self.steps)))

    @property
    def interval_edges(self) -> Steps:
        """Edges of the intervals of steps that the points sum up, shape ``(n + 1,)``."""
        return np.concatenate([[self.first_step], self.steps + 1])

    @property
    def mean(self) -> float:
        """Mean over all steps of a metric whose points each sum up the steps since the point before; NaN without a point."""
        if not self:
            return math.nan
        return float(np.average(self.values, weights=np.diff(self.interval_edges)))

    @property
    def median(self) -> float:
        """The median, without the sum of two values in numpy's own median, which may overflow."""
        return float(np.quantile(self.values, 0.5))

    @property
    def last(self) -> float:
        """The last finite value; NaN without one."""
        return float(self.finite.values[-1]) if self.finite else math.nan
