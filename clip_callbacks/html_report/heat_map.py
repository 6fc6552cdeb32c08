"""Heat maps of a metric of each block over optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap, LogNorm, SymLogNorm
from matplotlib.figure import Figure

from clip_callbacks.core.metric_names import GRADIENT_MEAN, GRADIENT_STD, GRADIENT_ZEROS, UPDATE_RATIO, WEIGHT_NORM
from clip_callbacks.html_report.axes import (
    LOG_AXIS_MAX,
    LOG_AXIS_MIN,
    label_log_axis,
    label_step_axis,
    natural_order,
    shorten,
    without_common_parts,
)
from clip_callbacks.html_report.downsampling import MAX_COLUMNS, column_extremes, column_maxima
from clip_callbacks.html_report.rendering import Chart, Theme
from clip_callbacks.html_report.runs import OptimizerLog
from clip_callbacks.html_report.series import Series, Values

MAX_BLOCKS = 40
"""The number of rows of a heat map."""
LINEAR_SHARES = (1e-4, 0.1)
"""Bounds of the part of a scale for either sign that is linear, as shares of the largest value: between them it is the median."""
BELOW_AND_ABOVE_ZERO = LinearSegmentedColormap.from_list(
    "below_and_above_zero", ("#163f73", "#3a86c8", "#eef1f5", "#d97706", "#7a3f00")
)
"""Colors of values of either sign: blue below 0, orange above."""

Scale = Literal["log", "either sign", "share"]


@dataclass(frozen=True)
class BlockMetric:
    """A metric of blocks that has a heat map.

    Args:
        key: Identifier of the plot, without the number of the optimizer.
        name: Name of the metric, for the title.
        label: Name for the color bar, which may be short.
        scale: Scale of the colors: "log" for values above 0, "either sign", or "share" from 0 to 1.
        prefix: Prefix of the metric; empty for the norms of gradients, which other code may have logged.
    """

    key: str
    name: str
    label: str
    scale: Scale
    prefix: str = ""

    def of(self, log: OptimizerLog) -> dict[str, Series]:
        """Return the metric of each block for which it was logged."""
        if self.prefix:
            blocks = log.with_prefix(self.prefix)
        else:
            blocks = log.blocks()
        return {name: series for name, series in blocks.items() if series}


BLOCK_METRICS = (
    BlockMetric("blocks", "gradient norm", "gradient norm", "log"),
    BlockMetric("updates", "update-to-weight ratio", "update ratio", "log", UPDATE_RATIO),
    BlockMetric("weights", "weight norm", "weight norm", "log", WEIGHT_NORM),
    BlockMetric("means", "mean of the gradient", "mean", "either sign", GRADIENT_MEAN),
    BlockMetric("deviations", "standard deviation of the gradient", "deviation", "log", GRADIENT_STD),
    BlockMetric("zeros", "share of zeros in the gradient", "share of zeros", "share", GRADIENT_ZEROS),
)


def heat_map(blocks: dict[str, Series], metric: BlockMetric, number: int, run: str) -> Chart:
    """Make a plot with one row per block; of more than forty blocks those with the largest values are shown.

    Args:
        blocks: The metric of each block, with at least one point.
        metric: The metric.
        number: Number of the optimizer on the page.
        run: Name of the run, for the title.
    """
    blocks = {name: _within_scale(series) for name, series in blocks.items()}
    largest = sorted(blocks, key=lambda name: -float(np.quantile(np.abs(blocks[name].values), 0.99)))[:MAX_BLOCKS]
    names = sorted(largest, key=natural_order)
    first = min(int(blocks[name].steps[0]) for name in names)
    last = max(int(blocks[name].steps[-1]) for name in names)
    columns = max(1, min(MAX_COLUMNS // 2, max(len(blocks[name]) for name in names)))
    cells = np.array([_REDUCTIONS[metric.scale](blocks[name], first, last, columns) for name in names])
    key = f"{metric.key}-{number}"
    colors = _colors(cells, metric.scale)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        image = axes.imshow(
            cells,
            aspect="auto",
            interpolation="nearest",
            extent=(first - 0.5, last + 0.5, len(names) - 0.5, -0.5),
            gid=f"{key}-image",
            **colors,
        )
        axes.grid(visible=False)
        labels = [shorten(name, theme.name_length) for name in without_common_parts(names)]
        axes.set_yticks(range(len(names)), labels, fontsize=8)
        bar = figure.colorbar(image, ax=axes, pad=0.01, location="bottom" if theme.narrow else "right", shrink=0.9, aspect=30)
        _label_colors(bar, metric, theme)
        label_step_axis(axes)

    caption = f"One row per block. {_CAPTIONS[metric.scale]}"
    if without_common_parts(names) != names:
        caption += " Parts that all block names begin or end with are left out."
    if len(blocks) > MAX_BLOCKS:
        caption += f" The {MAX_BLOCKS} of {len(blocks)} blocks with the largest values are shown."
    medians = ", ".join(f"{name} {blocks[name].median:.3g}" for name in names[:8])
    height = 1.1 + 0.22 * len(names)
    return Chart(
        key,
        f"{metric.name[0].upper()}{metric.name[1:]} of each block: {run}",
        caption,
        f"Heat map of the {metric.name} of each block over optimizer steps. Medians: {medians}.",
        draw,
        (max(height, 1.8), max(height + 0.5, 2.2)),
    )


_REDUCTIONS = {"log": column_maxima, "either sign": column_extremes, "share": column_maxima}
_CAPTIONS: dict[Scale, str] = {
    "log": "The color is the largest value in each column of the plot; a gap means that nothing or 0 was logged.",
    "either sign": "The color is the value furthest from 0 in each column of the plot: blue below 0, orange above. The scale is "
    "logarithmic, and linear near 0.",
    "share": "The color is the largest value in each column of the plot: 1 means that all entries were exactly zero.",
}


def _within_scale(series: Series) -> Series:
    """Move values other than 0 that no logarithmic scale can show to the nearest end of the scale."""
    sizes = np.clip(np.abs(series.values), LOG_AXIS_MIN, LOG_AXIS_MAX)
    return replace(series, values=np.where(series.values == 0, 0.0, np.copysign(sizes, series.values)))


def _colors(cells: Values, scale: Scale) -> dict[str, Any]:
    """Return the color map and its scale for ``imshow``; on a logarithmic scale, values that have no logarithm become gaps."""
    if scale == "share":
        return {"cmap": "viridis", "vmin": 0.0, "vmax": 1.0}
    if scale == "either sign":
        sizes = np.abs(cells[np.isfinite(cells) & (cells != 0)])
        if not len(sizes):
            return {"cmap": BELOW_AND_ABOVE_ZERO, "norm": SymLogNorm(LINEAR_SHARES[1], vmin=-1.0, vmax=1.0)}
        top = float(sizes.max())
        # a spike must not leave the means of all other steps without color
        linear = float(np.clip(np.median(sizes), LINEAR_SHARES[0] * top, LINEAR_SHARES[1] * top))
        return {"cmap": BELOW_AND_ABOVE_ZERO, "norm": SymLogNorm(linear, vmin=-top, vmax=top)}
    positive = np.isfinite(cells) & (cells > 0)
    cells[~positive] = np.nan
    bottom, top = 0.1, 1.0
    if positive.any():
        bottom, top = float(np.nanquantile(cells, 0.01)), float(np.nanmax(cells))
    return {"cmap": "viridis", "norm": LogNorm(min(bottom, top / 2), top)}


def _label_colors(bar: Colorbar, metric: BlockMetric, theme: Theme) -> None:
    note = ""
    if metric.scale == "log":
        note = "(log scale)"
        if theme.narrow:
            label_log_axis(bar.ax.xaxis, narrow=True)
        else:
            label_log_axis(bar.ax.yaxis)
    elif metric.scale == "either sign":
        top, linear = float(bar.norm.vmax or 1.0), bar.norm.linthresh  # type: ignore[attr-defined]
        ticks = [-top, -linear, 0.0, linear, top]
        note = "(linear near 0)"
        bar.set_ticks(ticks, labels=[f"{float(f'{tick:.2g}'):g}" for tick in ticks])
        bar.minorticks_off()
    # beside the bar in two lines, below it in one
    separator = " " if theme.narrow else "\n"
    bar.set_label(f"{metric.label}{separator}{note}".rstrip(), fontsize=8)
    bar.outline.set_edgecolor(theme.faint)
