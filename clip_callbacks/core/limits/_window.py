"""A window over the last norms of each block, kept in order of age and in order of size.

So quantiles are exact, and a new norm costs one shift of the sorted column instead of a sort.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from clip_callbacks.core.limits.base import LimitState


def empty(window: int, blocks: int) -> LimitState:
    """Return an empty window for each block.

    Args:
        window: Number of values that it can hold, at least 2; each takes two float64 numbers.
        blocks: Number of blocks, B.
    """
    unused = torch.full((window, blocks), math.inf, dtype=torch.float64, device="cpu")
    # A count for each block: blocks without a gradient take in nothing, and each is carried into another run by itself.
    return {"recent": unused, "sorted": unused.clone(), "count": torch.zeros(blocks, dtype=torch.int64, device="cpu")}


def holding(values: Tensor) -> LimitState:
    """Return a window for each block that holds given values.

    Args:
        values: Values from the oldest to the newest, float64, shape ``(window, B)``; inf at the places before the oldest that were
            never used.
    """
    return {"recent": values, "sorted": values.sort(0).values, "count": values.isfinite().sum(0)}


def add(values: Tensor, is_new: Tensor, state: LimitState) -> LimitState:
    """Return the window after a new value for each block; when the window is full, the oldest value leaves it.

    Args:
        values: New values, float64, shape ``(B,)``.
        is_new: True for blocks that have a new value, bool, shape ``(B,)``; the others keep their window.
        state: Window from :func:`empty` or from the last call; not changed.
    """
    window = len(state["recent"])
    position = (state["count"] % window).unsqueeze(0)
    # A place that was never used holds inf, the last of the sorted column: it gives way just as an old value does.
    oldest = state["recent"].gather(0, position)
    # a block without a new value replaces its oldest one by itself, so that all blocks run the same operations
    newest = torch.where(is_new, values, oldest)
    return {
        "recent": state["recent"].scatter(0, position, newest),
        "sorted": _replaced(state["sorted"], oldest, newest),
        "count": state["count"] + is_new,
    }


def _replaced(ordered: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Return sorted columns after one value of each was replaced: every other value stays, or moves by one place."""
    last = len(ordered) - 1
    lower, upper = ordered.narrow(0, 0, last), ordered.narrow(0, 1, last)
    without = torch.where(lower < old, lower, upper)
    # Inserted at place i, the new value is the middle one of the values that stood at i - 1 and at i.
    previous, following = pad(without, (0, 0, 1, 0), value=-math.inf), pad(without, (0, 0, 0, 1), value=math.inf)
    return torch.minimum(following, torch.maximum(previous, new))


def held(state: LimitState) -> Tensor:
    """Return the number of values in each block's window, int64, shape ``(B,)``."""
    return state["count"].clamp(max=len(state["recent"]))


def quantile(state: LimitState, share: float) -> Tensor:
    """Return a quantile of each block's values, shape ``(B,)``; inf for a block without values.

    Args:
        state: The window.
        share: Share of the values below the quantile, between 0 and 1; between two values it is interpolated linearly.
    """
    last = (held(state) - 1).clamp(min=0)
    position = share * last.double()
    below = position.floor().long()
    lower, upper = state["sorted"].gather(0, torch.stack([below, torch.minimum(below + 1, last)])).unbind()
    # NaN only where both neighbours are inf, in an empty window: then the difference counts as 0
    return torch.where(state["count"] > 0, lower + (upper - lower).nan_to_num(0.0) * (position - below), math.inf)


def largest(state: LimitState) -> Tensor:
    """Return the largest value of each block, shape ``(B,)``; inf for a block without values."""
    return state["sorted"].gather(0, (held(state) - 1).clamp(min=0).unsqueeze(0)).squeeze(0)


def median_and_deviation(state: LimitState) -> tuple[Tensor, Tensor]:
    """Return the median and the median absolute deviation (MAD) of each block's values, each of shape ``(B,)``.

    Both are undefined for a block without values. The h values that are nearest to the median are neighbours in sorted order. So
    the h-th smallest distance is the least, over all runs of h neighbours, of the larger distance that an end of the run has.
    """
    ordered, count = state["sorted"], held(state)
    # the places of the middle value, counted from 1: twice the same, or those of the two middle ones of an even number
    ranks = torch.stack([(count + 1) // 2, count // 2 + 1])
    lower, upper = ordered.gather(0, (ranks - 1).clamp(min=0)).unbind()
    median = lower + 0.5 * (upper - lower)
    # both ranks at once, shape (2, window, B): small operations cost their number, not their size
    starts = torch.arange(len(ordered), dtype=torch.int64, device=ordered.device).unsqueeze(1)
    ends = starts + (ranks - 1).unsqueeze(1)
    ending = ordered.expand(2, *ordered.shape).gather(1, ends.clamp(0, len(ordered) - 1))
    # a run that ends beyond the values held is none
    reach = torch.where(ends < count, ending, math.inf) - median
    return median, 0.5 * torch.maximum(reach, median - ordered).amin(1).sum(0)
