"""The last norms of each block, by age and by size: exact order statistics at the cost of a shift, not of a sort."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from clip_callbacks.core.limits.base import LimitState


def empty(window: int, blocks: int) -> LimitState:
    """A window of so many values for each block, at least 2, with nothing in it: two float64 numbers each."""
    nothing = torch.full((window, blocks), math.inf, dtype=torch.float64)
    return {"recent": nothing, "sorted": nothing.clone(), "count": torch.zeros(blocks, dtype=torch.int64)}


def add(values: Tensor, is_new: Tensor, state: LimitState) -> LimitState:
    """Take in a value for each block; when the window is full, the oldest one leaves it.

    Args:
        values: Float64, shape ``(B,)``.
        is_new: Which blocks have one, bool, ``(B,)``.
        state: Of :func:`empty` or the last call; it is not changed.
    """
    window = len(state["recent"])
    place = (state["count"] % window).unsqueeze(0)
    oldest = state["recent"].gather(0, place)
    newest = torch.where(is_new, values, oldest)
    return {
        "recent": state["recent"].scatter(0, place, newest),
        "sorted": _replaced(state["sorted"], oldest, newest),
        "count": state["count"] + is_new,
    }


def _replaced(ordered: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Sorted columns in which one value of each gives way to another one."""
    last = len(ordered) - 1
    lower, upper = ordered.narrow(0, 0, last), ordered.narrow(0, 1, last)
    without = torch.where(lower < old, lower, upper)
    before, after = (pad(without, rows, value=end) for rows, end in (((0, 0, 1, 0), -math.inf), ((0, 0, 0, 1), math.inf)))
    return torch.minimum(after, torch.maximum(before, new))


def held(state: LimitState) -> Tensor:
    """How many values there are for each block, int64, ``(B,)``."""
    return state["count"].clamp(max=len(state["recent"]))


def quantile(state: LimitState, share: float) -> Tensor:
    """A quantile of each block's values with linear interpolation, ``(B,)``; inf where there is none."""
    last = (held(state) - 1).clamp(min=0)
    place = share * last.double()
    below = place.floor().long()
    lower, upper = state["sorted"].gather(0, torch.stack([below, torch.minimum(below + 1, last)])).unbind()
    return torch.where(state["count"] > 0, lower + (upper - lower).nan_to_num(0.0) * (place - below), math.inf)


def largest(state: LimitState) -> Tensor:
    """The largest value of each block, ``(B,)``; inf where there is none."""
    return state["sorted"].gather(0, (held(state) - 1).clamp(min=0).unsqueeze(0)).squeeze(0)


def deviation(state: LimitState, median: Tensor) -> Tensor:
    """Median of the distances to the median, ``(B,)``; only where there are values.

    In sorted order those next to the median stand side by side: the h-th smallest distance is the least, over all runs of h
    values, of the larger distance of a run's ends.
    """
    ordered, count = state["sorted"], held(state)
    starts = torch.arange(len(ordered), device=ordered.device).unsqueeze(1)

    def smallest(rank: Tensor) -> Tensor:
        ends = starts + rank - 1
        last = torch.where(ends < count, ordered.gather(0, ends.clamp(0, len(ordered) - 1)), math.inf)
        return torch.maximum(last - median, median - ordered).amin(0)

    return 0.5 * (smallest((count + 1) // 2) + smallest(count // 2 + 1))
