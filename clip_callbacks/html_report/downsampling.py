"""Downsampling: reduce series of up to millions of points to the columns of a plot."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from clip_callbacks.html_report.series import Series, Values

MAX_COLUMNS = 600
"""The number of columns of a plot. Series of at most twice as many points are drawn point by point."""


class Downsampled(NamedTuple):
    """A series in columns of equal width in steps; columns without a point are left out.

    Args:
        steps: Center of each column, shape ``(n,)``; if nothing was reduced, the step of each point.
        median: Median of the points in each column.
        lowest: Smallest value in each column.
        highest: Largest value in each column.
        has_all_points: True if nothing was reduced.
    """

    steps: Values
    median: Values
    lowest: Values
    highest: Values
    has_all_points: bool


def fits(series: Series, columns: int = MAX_COLUMNS) -> bool:
    """Return whether a plot of so many columns shows a series point by point."""
    return len(series) <= 2 * columns


def downsample(series: Series, columns: int = MAX_COLUMNS) -> Downsampled:
    """Reduce a series of finite values to columns; its smallest and largest values are kept."""
    if fits(series, columns):
        steps = series.steps.astype(np.float64)
        return Downsampled(steps, series.values, series.values, series.values, has_all_points=True)
    first, last = int(series.steps[0]), int(series.steps[-1])
    points = pd.Series(series.values).groupby(_column_numbers(series, first, last, columns))
    medians = points.median()
    centers = first + (medians.index.to_numpy() + 0.5) * (last - first + 1) / columns - 0.5
    return Downsampled(centers, medians.to_numpy(), points.min().to_numpy(), points.max().to_numpy(), has_all_points=False)


def column_means(series: Series, columns: int) -> tuple[Values, Values]:
    """Average over the steps of each column a metric whose points each sum up all steps since the point before.

    Returns:
        The edges of the columns, shape ``(columns + 1,)``, and the means, shape ``(columns,)``.
    """
    interval_edges = series.interval_edges.astype(np.float64)
    summed = np.concatenate([[0.0], np.cumsum(series.values * np.diff(interval_edges))])
    edges = np.linspace(interval_edges[0], interval_edges[-1], columns + 1)
    return edges, np.diff(np.interp(edges, interval_edges, summed)) / np.diff(edges)


def column_maxima(series: Series, first: int, last: int, columns: int) -> Values:
    """Find the largest finite value in each of so many columns between two steps; NaN where nothing was logged."""
    points = pd.Series(series.values).groupby(_column_numbers(series, first, last, columns))
    maxima: Values = points.max().reindex(range(columns)).to_numpy()
    return maxima


def column_extremes(series: Series, first: int, last: int, columns: int) -> Values:
    """Find the finite value furthest from 0 in each of so many columns between two steps; NaN where nothing was logged."""
    highest = column_maxima(series, first, last, columns)
    lowest = -column_maxima(Series(series.steps, -series.values), first, last, columns)
    return np.where(-lowest > highest, lowest, highest)


def _column_numbers(series: Series, first: int, last: int, columns: int) -> npt.NDArray[np.int64]:
    width = max((last - first + 1) / columns, 1e-9)
    return np.clip(((series.steps - first) / width).astype(np.int64), 0, columns - 1)
