"""A million points for a picture a thousand pixels wide: what lies in each column of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from clip_callbacks.html_report.series import Series, Values

MAX_COLUMNS = 600
"""Columns of a picture; fewer points than twice as many are drawn as they are."""


class Downsampled(NamedTuple):
    """A series in columns of equal width in steps: a line, and how far it strays.

    Args:
        steps: The middle of each column that holds a point; or of each point.
        middle: The median there.
        low: The smallest value there.
        high: The largest value there.
        has_all_points: Whether every point has a column of its own.
    """

    steps: Values
    middle: Values
    low: Values
    high: Values
    has_all_points: bool


def downsample(series: Series, columns: int = MAX_COLUMNS) -> Downsampled:
    """Take a series apart into columns; nothing of its range is lost."""
    if len(series) <= 2 * columns:
        steps = series.steps.astype(np.float64)
        return Downsampled(steps, series.values, series.values, series.values, has_all_points=True)
    starts, middles = _starts(series, columns)
    middle = np.array([np.median(part) for part in np.split(series.values, starts[1:])])
    low, high = np.minimum.reduceat(series.values, starts), np.maximum.reduceat(series.values, starts)
    return Downsampled(middles, middle, low, high, has_all_points=False)


def column_means(series: Series, columns: int) -> tuple[Values, Values]:
    """Of values that sum up all steps since the last point: the mean over the steps of each column.

    Returns:
        The edges of the columns, shape ``(columns + 1,)``, and the means, shape ``(columns,)``.
    """
    interval_edges = series.interval_edges.astype(np.float64)
    summed = np.concatenate([[0.0], np.cumsum(series.values * np.diff(interval_edges))])
    edges = np.linspace(interval_edges[0], interval_edges[-1], columns + 1)
    return edges, np.diff(np.interp(edges, interval_edges, summed)) / np.diff(edges)


def column_maxima(series: Series, first: int, last: int, columns: int) -> Values:
    """The largest value in each of so many columns from one step to another, NaN where nothing was logged."""
    result = np.full(columns, -np.inf)
    np.maximum.at(result, _places(series, first, last, columns), series.values)
    result[np.isneginf(result)] = np.nan
    return result


def _places(series: Series, first: int, last: int, columns: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    width = max((last - first + 1) / columns, 1e-9)
    return np.clip(((series.steps - first) / width).astype(np.int64), 0, columns - 1)


def _starts(series: Series, columns: int) -> tuple[np.ndarray[tuple[int], np.dtype[np.intp]], Values]:
    first, last = int(series.steps[0]), int(series.steps[-1])
    place = _places(series, first, last, columns)
    filled, starts = np.unique(place, return_index=True)
    return starts, first + (filled + 0.5) * (last - first + 1) / columns - 0.5
