"""A million points for a picture a thousand pixels wide: what lies in each column of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from clip_callbacks.dashboard.runs import Series, Values

COLUMNS = 600
"""Columns of a picture; fewer points than twice as many are drawn as they are."""


class Thinned(NamedTuple):
    """A series in columns of equal width in steps: a line, and how far it strays.

    Args:
        steps: The middle of each column that holds a point; or of each point.
        middle: The median there.
        low: The smallest value there.
        high: The largest value there.
        is_whole: Whether every point has a column of its own.
    """

    steps: Values
    middle: Values
    low: Values
    high: Values
    is_whole: bool


def thin(series: Series, columns: int = COLUMNS) -> Thinned:
    """Take a series apart into columns; nothing of its range is lost."""
    if len(series) <= 2 * columns:
        steps = series.steps.astype(np.float64)
        return Thinned(steps, series.values, series.values, series.values, is_whole=True)
    starts, middles = _starts(series, columns)
    middle = np.array([np.median(part) for part in np.split(series.values, starts[1:])])
    low, high = np.minimum.reduceat(series.values, starts), np.maximum.reduceat(series.values, starts)
    return Thinned(middles, middle, low, high, is_whole=False)


def means(series: Series, first: int, last: int, columns: int) -> Values:
    """The mean in each of so many columns from one step to another, shape ``(columns,)``, NaN where nothing was logged."""
    return _reduced(series, first, last, columns, np.add) / np.maximum(_counts(series, first, last, columns), 1)


def peaks(series: Series, first: int, last: int, columns: int) -> Values:
    """The largest value in each column, NaN where nothing was logged."""
    return _reduced(series, first, last, columns, np.maximum)


def _reduced(series: Series, first: int, last: int, columns: int, by: np.ufunc) -> Values:
    place = _places(series, first, last, columns)
    result = np.full(columns, -np.inf if by is np.maximum else 0.0)
    by.at(result, place, series.values)
    result[_counts(series, first, last, columns) == 0] = np.nan
    return result


def _counts(series: Series, first: int, last: int, columns: int) -> Values:
    return np.bincount(_places(series, first, last, columns), minlength=columns).astype(np.float64)


def _places(series: Series, first: int, last: int, columns: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    width = max((last - first + 1) / columns, 1e-9)
    return np.clip(((series.steps - first) / width).astype(np.int64), 0, columns - 1)


def _starts(series: Series, columns: int) -> tuple[np.ndarray[tuple[int], np.dtype[np.intp]], Values]:
    first, last = int(series.steps[0]), int(series.steps[-1])
    place = _places(series, first, last, columns)
    filled, starts = np.unique(place, return_index=True)
    return starts, first + (filled + 0.5) * (last - first + 1) / columns - 0.5
