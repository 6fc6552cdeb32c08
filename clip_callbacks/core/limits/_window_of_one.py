"""The window of a single block on the host, whose values are numbers of Python.

Small operations of torch cost microseconds each, whatever their size, and a step on a window needs fifty of them. On the host
the same takes one list. The results are those of :mod:`~clip_callbacks.core.limits._window`, bit for bit.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort

import torch

from clip_callbacks.core.limits.base import LimitState


class WindowOfOne:
    """A window over the last values of one block.

    Args:
        state: State of one block on the CPU, as from :func:`~clip_callbacks.core.limits._window.empty`; not changed.

    Attributes:
        count: Number of values that have entered so far.
        held: Number of values in the window.
    """

    def __init__(self, state: LimitState) -> None:
        self._state = state
        self._ordered: list[float] = state["sorted"].reshape(-1).tolist()
        self.count = int(state["count"])
        self.held = min(self.count, len(self._ordered))

    def median_and_deviation(self) -> tuple[float, float]:
        """Return the median and the median absolute deviation of the values, of which there must be one at least."""
        held, ordered = self.held, self._ordered
        # the places of the middle value, counted from 1: twice the same, or those of the two middle ones of an even number
        first, second = (held + 1) // 2, held // 2 + 1
        lower, upper = ordered[first - 1], ordered[second - 1]
        median = lower + 0.5 * (upper - lower)
        distances = sorted([abs(value - median) for value in ordered[:held]])
        return median, 0.5 * (distances[first - 1] + distances[second - 1])

    def after(self, value: float) -> LimitState:
        """Return the state after a new value; when the window is full, the oldest value leaves it."""
        recent, ordered = self._state["recent"].clone(), self._ordered.copy()
        position = self.count % len(ordered)
        # a place that was never used holds inf, and gives way just as an old value does
        del ordered[bisect_left(ordered, recent[position].item())]
        insort(ordered, value)
        recent[position] = value
        # through an array, because torch would read a list number by number
        by_size = torch.frombuffer(array("d", ordered), dtype=torch.float64).unsqueeze(1)
        return {"recent": recent, "sorted": by_size, "count": self._state["count"] + 1}
