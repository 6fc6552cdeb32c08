"""The window of a single block on the host, whose values are numbers of Python.

The results are those of :mod:`~clip_callbacks.core.limits._window`, bit for bit.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, insort

import torch
from torch import Tensor

from clip_callbacks.core.limits.base import LimitState


class WindowOfOne:
    """A window over the last values of one block. It never changes: with a new value it is another one.

    Args:
        recent: Values in order of age, inf at the places that were never used; not changed.
        ordered: Values in order of size, those of ``recent``; not changed.
        count: Number of values that have entered so far.

    Attributes:
        held: Number of values in the window.
    """

    __slots__ = ("_ordered", "_recent", "count", "held")

    def __init__(self, recent: list[float], ordered: list[float], count: int) -> None:
        self._recent, self._ordered, self.count = recent, ordered, count
        self.held = min(count, len(recent))

    @classmethod
    def of(cls, state: LimitState) -> WindowOfOne:
        """Return the window of one block from its tensors."""
        recent, ordered = (state[key].reshape(-1).tolist() for key in ("recent", "sorted"))
        return cls(recent, ordered, int(state["count"]))

    def state(self) -> LimitState:
        """Return the window as tensors."""
        return {
            "recent": _column(self._recent),
            "sorted": _column(self._ordered),
            "count": torch.tensor([self.count], dtype=torch.int64, device="cpu"),
        }

    def added(self, value: float) -> WindowOfOne:
        """Return the window with a new value; when it is full, the oldest value leaves it."""
        recent, ordered = self._recent.copy(), self._ordered.copy()
        position = self.count % len(recent)
        # a place that was never used holds inf, and gives way just as an old value does
        del ordered[bisect_left(ordered, recent[position])]
        insort(ordered, value)
        recent[position] = value
        return WindowOfOne(recent, ordered, self.count + 1)

    def largest(self) -> float:
        """Return the largest value; inf without values."""
        return self._ordered[max(self.held - 1, 0)]

    def quantile(self, share: float) -> float:
        """Return a quantile of the values, interpolated linearly; inf without values."""
        last = self.held - 1
        if last < 0:
            return math.inf
        position = share * last
        below = int(position)
        lower, upper = self._ordered[below], self._ordered[min(below + 1, last)]
        return lower + (upper - lower) * (position - below)

    def median_and_deviation(self) -> tuple[float, float]:
        """Return the median and the median absolute deviation of the values, of which there must be one at least."""
        ordered, held = self._ordered, self.held
        middle = (held - 1) // 2
        lower, upper = ordered[middle], ordered[held // 2]
        median = lower + 0.5 * (upper - lower)
        # The values nearest to the median are neighbours. Of runs of as many as the middle place counts, the nearest is the first
        # whose upper end is as far from the median as its lower one, or the run before it.
        first, last = 0, held - 1 - middle
        while first < last:
            start = (first + last) // 2
            if ordered[start + middle] - median < median - ordered[start]:
                first = start + 1
            else:
                last = start
        deviation = max(ordered[first + middle] - median, median - ordered[first])
        if first and (before := median - ordered[first - 1]) <= deviation:
            first -= 1
            deviation = before
        if held % 2:
            return median, deviation
        # of an even number, the mean of the two middle distances: the next value is a neighbour of the run
        beyond, following = math.inf, first + middle + 1
        if first:
            beyond = median - ordered[first - 1]
        if following < held:
            beyond = min(beyond, ordered[following] - median)
        return median, 0.5 * (deviation + beyond)


def _column(values: list[float]) -> Tensor:
    # through an array, because torch would read a list number by number
    return torch.frombuffer(array("d", values), dtype=torch.float64).unsqueeze(1)
