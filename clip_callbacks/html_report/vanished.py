"""Blocks that did not learn for a while: named by the monitor at the end of an epoch, or with a norm of exactly 0 throughout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from clip_callbacks.core.metric_names import PERCENTILES, VANISHED
from clip_callbacks.html_report.axes import label_step_axis, natural_order, shorten, without_common_parts
from clip_callbacks.html_report.rendering import Chart, Theme
from clip_callbacks.html_report.runs import OptimizerLog
from clip_callbacks.html_report.series import Series
from clip_callbacks.stats.vanishing import MAX_STEPS, MIN_STEPS

MIN_NORMS_FOR_SILENCE = 10
"""A norm of exactly 0 at fewer logged steps says little about a block."""
MAX_ROWS = 40
"""The number of blocks in the plot."""
MAX_SPANS = 3
"""The number of stretches of a block that its description names."""
VANISHED_COLOR, SILENT_COLOR = "#d1495b", "#7f8b99"
"""Colors of epochs at whose end a block was named, and of norms that are 0 throughout; legible on either page."""
BAR_HEIGHT = 0.7
"""Height of a bar, as a share of its row."""


@dataclass(frozen=True)
class Vanished:
    """A block that did not learn for a while.

    Args:
        spans: First and last optimizer step of each stretch: an epoch at whose end the monitor named it, or all logged steps. The
            steps that the monitor has judged may be a part of the epoch, or reach back into earlier ones: the log does not tell.
        share: Largest share of its entries that did not learn; 1 for a norm of 0.
        epochs: Number of epochs at whose end the monitor named it; 0 if only its norm tells.
    """

    spans: tuple[tuple[int, int], ...]
    share: float
    epochs: int = 0


def vanished_blocks(log: OptimizerLog) -> dict[str, Vanished]:
    """Find the blocks that did not learn for a while, by name in natural order."""
    named = {name: series for name, series in log.with_prefix(VANISHED).items() if series}
    ends = _epoch_ends(log, named)
    found = {
        name: Vanished(tuple(_epochs(series, ends, log.first_step)), float(series.values.max()), len(series))
        for name, series in named.items()
    }
    blocks = log.blocks()
    for name in silent_blocks(log):
        norms = blocks[name]
        found.setdefault(name, Vanished(((int(norms.steps[0]), int(norms.steps[-1])),), 1.0))
    return {name: found[name] for name in sorted(found, key=natural_order)}


def silent_blocks(log: OptimizerLog) -> list[str]:
    """List the blocks whose norm is exactly 0 at all logged steps, in a run in which others are not."""
    if not log.total_norm:
        return []
    return [name for name, norms in log.blocks().items() if len(norms) >= MIN_NORMS_FOR_SILENCE and not bool(norms.values.any())]


def _epoch_ends(log: OptimizerLog, named: dict[str, Series]) -> np.ndarray:
    """Return the steps at which metrics of epochs were logged."""
    steps = [series.steps for series in (*named.values(), log.metric(PERCENTILES[50]))]
    return np.unique(np.concatenate(steps))


def _epochs(series: Series, ends: np.ndarray, first: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last step of each epoch at whose end a metric was logged."""
    for end in series.steps:
        earlier = ends[ends < end]
        begin = first
        if len(earlier):
            begin = int(earlier[-1]) + 1
        yield begin, int(end)


def vanished_chart(log: OptimizerLog, number: int) -> Chart | None:
    """Make a plot with one row for each block that did not learn for a while; None if there is none.

    Args:
        log: The log of the optimizer.
        number: Number of the optimizer on the page.
    """
    found = vanished_blocks(log)
    if not found:
        return None
    names = list(found)[:MAX_ROWS]
    last = log.run.last_step

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for row, name in enumerate(names):
            block = found[name]
            bars = [(first - 0.5, end - first + 1) for first, end in block.spans]
            color = SILENT_COLOR
            if block.epochs:
                color = VANISHED_COLOR
            axes.broken_barh(bars, (row - BAR_HEIGHT / 2, BAR_HEIGHT), color=color, linewidth=0, gid=f"vanished-{name}")
        labels = [shorten(name, theme.name_length) for name in without_common_parts(names)]
        axes.set_yticks(range(len(names)), labels, fontsize=8)
        axes.set(xlim=(log.first_step - 0.5, last + 0.5), ylim=(len(names) - 0.5, -0.5))
        axes.grid(visible=False, axis="y")
        label_step_axis(axes)

    height = 0.8 + 0.22 * len(names)
    title = f"Blocks that do not learn: {log.name}"
    spans = "; ".join(f"{name} at {_in_words(found[name].spans)}" for name in names[:8])
    return Chart(f"vanished-{number}", title, _caption(found, names), f"{title}. {spans}.", draw, (height, height + 0.2))


def _caption(found: dict[str, Vanished], names: list[str]) -> str:
    caption = ""
    if any(found[name].epochs for name in names):
        caption += (
            "Red: epochs at whose end GradientNormMonitor named the block, because more than half of its entries had a gradient of "
            f"exactly zero, or updates too small to change the weights, for at least {MIN_STEPS} steps. In a long epoch these may "
            f"be {MAX_STEPS:,} of its steps; of epochs that were judged together, with fewer than {MIN_STEPS} steps each, only the "
            "last one is red. "
        )
    if not all(found[name].epochs for name in names):
        caption += (
            "Gray: the norm of the block is exactly 0 at all logged steps. The log does not tell whether its gradient was zero or "
            "whether it had none, as frozen and unused parameters. "
        )
    if without_common_parts(names) != names:
        caption += "Parts that all block names begin or end with are left out. "
    if len(found) > MAX_ROWS:
        caption += f"The first {MAX_ROWS} of {len(found)} blocks are shown. "
    return caption.rstrip()


def _in_words(spans: tuple[tuple[int, int], ...]) -> str:
    named = [f"{first:,} to {last:,}" for first, last in spans]
    if len(named) > MAX_SPANS:
        named[MAX_SPANS:] = ["…"]
    return f"steps {', '.join(named)}"
