"""Heat maps of a metric of each block over optimizer steps."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from clip_callbacks.html_report.axes import label_log_axis, label_step_axis, natural_order, shorten, without_common_parts
from clip_callbacks.html_report.downsampling import MAX_COLUMNS, column_maxima
from clip_callbacks.html_report.rendering import Chart, Theme
from clip_callbacks.html_report.series import Series

MAX_BLOCKS = 40
"""The number of rows of a heat map."""


def heat_map(blocks: dict[str, Series], key: str, metric: str, run: str) -> Chart:
    """Make a plot with one row per block; of more than forty blocks those with the largest values are shown.

    Args:
        blocks: The metric of each block, with at least one point.
        key: Identifier of the plot.
        metric: Name of the metric, for the title and the color bar.
        run: Name of the run, for the title.
    """
    largest = sorted(blocks, key=lambda name: -float(np.quantile(blocks[name].values, 0.99)))[:MAX_BLOCKS]
    names = sorted(largest, key=natural_order)
    first = min(int(blocks[name].steps[0]) for name in names)
    last = max(int(blocks[name].steps[-1]) for name in names)
    columns = max(1, min(MAX_COLUMNS // 2, max(len(blocks[name]) for name in names)))
    cells = np.array([column_maxima(blocks[name], first, last, columns) for name in names])
    positive = np.isfinite(cells) & (cells > 0)
    cells[~positive] = np.nan
    bottom, top = (float(np.nanquantile(cells, 0.01)), float(np.nanmax(cells))) if positive.any() else (0.1, 1.0)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        image = axes.imshow(
            cells,
            aspect="auto",
            interpolation="nearest",
            norm=LogNorm(min(bottom, top / 2), top),
            cmap="viridis",
            extent=(first - 0.5, last + 0.5, len(names) - 0.5, -0.5),
            gid=f"{key}-image",
        )
        axes.grid(visible=False)
        labels = [shorten(name, 22 if theme.narrow else 44) for name in without_common_parts(names)]
        axes.set_yticks(range(len(names)), labels, fontsize=8)
        bar = figure.colorbar(image, ax=axes, pad=0.01, location="bottom" if theme.narrow else "right", shrink=0.9, aspect=30)
        bar.set_label(f"{metric}{' ' if theme.narrow else chr(10)}(log scale)", fontsize=8)
        label_log_axis(bar.ax.xaxis if theme.narrow else bar.ax.yaxis)
        bar.outline.set_edgecolor(theme.faint)
        label_step_axis(axes)

    caption = (
        "One row per block. The color is the largest value in each column of the plot; a gap means that nothing or 0 was logged."
    )
    if without_common_parts(names) != names:
        caption += " Parts that all block names begin or end with are left out."
    if len(blocks) > MAX_BLOCKS:
        caption += f" The {MAX_BLOCKS} of {len(blocks)} blocks with the largest values are shown."
    medians = ", ".join(f"{name} {np.median(blocks[name].values):.3g}" for name in names[:8])
    height = 1.1 + 0.22 * len(names)
    return Chart(
        key,
        f"{metric[0].upper()}{metric[1:]} of each block: {run}",
        caption,
        f"Heat map of the {metric} of each block over optimizer steps. Medians: {medians}.",
        draw,
        (max(height, 1.8), max(height + 0.5, 2.2)),
    )
