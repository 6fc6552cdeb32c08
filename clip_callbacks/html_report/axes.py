"""Parts that all plots share: lines over steps, axis labels, legends, shortened names."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from clip_callbacks.html_report.downsampling import downsample
from clip_callbacks.html_report.losses import TrainingLoss
from clip_callbacks.html_report.rendering import Theme
from clip_callbacks.html_report.runs import OptimizerLog
from clip_callbacks.html_report.series import Series

DASHED = (0, (4, 2))
LOG_AXIS_RATIO = 10.0
"""An axis whose largest value is more than this many times its smallest is logarithmic."""
LOG_AXIS_MIN, LOG_AXIS_MAX = 1e-280, 1e300
"""Ends of logarithmic scales: matplotlib takes all numbers below 2e-287 for 0, and cannot divide an axis that ends next to the
largest float64."""
LOG_TICKS: tuple[tuple[float, tuple[float, ...]], ...] = ((300, (1.0, 2.0, 5.0)),)
"""Ticks within each decade of a logarithmic axis whose ends have a smaller ratio than the number before them; otherwise 1 alone."""
NARROW_LOG_TICKS: tuple[tuple[float, tuple[float, ...]], ...] = ((20, (1.0, 2.0, 5.0)), (300, (1.0, 3.0)))
"""The same for labels that stand side by side on a narrow screen."""
EVEN_TICKS_RATIO = 6.0
"""A logarithmic axis whose ends have a smaller ratio has evenly spaced ticks: fewer than two of 1, 2 and 5 may lie on it."""
MAX_EVEN_TICKS, NARROW_MAX_EVEN_TICKS = 6, 4
"""The largest number of evenly spaced ticks."""
MIN_LOG_AXIS_RATIO = 1.02
"""The smallest ratio of the ends of a logarithmic axis: on a shorter one, the labels of its ticks would all be equal."""
MAX_DECADES, NARROW_MAX_DECADES = 8, 5
"""About the largest number of decades with a label."""
NO_LEGEND = "_nolegend_"
"""The label of a line that the legend leaves out."""
LEGEND_ROW_INCHES = 0.18
"""Height of one row of a legend."""
LEGEND_CHARACTERS = (120, 46)
"""Characters that fit into a row of a legend on a wide and on a narrow screen."""


@dataclass(frozen=True)
class PlottedRun:
    """The log of one optimizer of a run, as all plots show it.

    Args:
        log: The log of the optimizer.
        losses: The losses of the run, by the names of their metrics.
        color: The color of its lines.
        suggested: The suggested max_norm; NaN if there is none.
        loss: The training loss; None if it is not known.
    """

    log: OptimizerLog
    losses: dict[str, Series]
    color: str
    suggested: float
    loss: TrainingLoss | None = None

    @property
    def label(self) -> str:
        """The name for legends and titles, of at most 28 characters."""
        return shorten(self.log.name, 28)


def limit_color(plotted: Sequence[PlottedRun], each: PlottedRun, theme: Theme) -> str:
    """Return the color of the limit of a run: that of the text if the plot shows one run, else that of the run."""
    return theme.ink if len(plotted) == 1 else each.color


def draw_line(axes: Axes, series: Series, color: str, label: str, gid: str, **options: object) -> None:
    """Draw a line over steps, and a point where it has no length.

    Long series are drawn as the median of each column of the plot, with a band from smallest to largest value.
    """
    if len(series) == 1:
        options = {"marker": ".", **options}
    reduced = downsample(series)
    axes.plot(reduced.steps, reduced.median, color=color, label=label, gid=gid, **options)  # type: ignore[arg-type]
    if not reduced.has_all_points:
        axes.fill_between(reduced.steps, reduced.lowest, reduced.highest, color=color, alpha=0.25, linewidth=0)


def label_step_axis(axes: Axes) -> None:
    """Label the horizontal axis as one of optimizer steps."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=6, integer=True, min_n_ticks=1)
    axes.margins(x=0.01)


def add_legend(axes: Axes, theme: Theme) -> None:
    """Add a legend above the axes; a thin space keeps labels with a leading underscore, which matplotlib would leave out."""
    handles = [handle for handle in axes.get_lines() if not str(handle.get_label()).startswith(("_child", NO_LEGEND))]
    names = [re.sub("^_", "\u200a_", str(handle.get_label())) for handle in handles]
    if names:
        columns = _legend_columns(names, narrow=theme.narrow)
        axes.legend(handles, names, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2, handlelength=1.8)


def heights_with_legend(wide: float, narrow: float, names: Sequence[str]) -> tuple[float, float]:
    """Return the heights of a plot in inches, enlarged for the rows of its legend beyond the first."""
    rows = [math.ceil(len(names) / _legend_columns(names, narrow=is_narrow)) for is_narrow in (False, True)]
    return wide + LEGEND_ROW_INCHES * (rows[0] - 1), narrow + LEGEND_ROW_INCHES * (rows[1] - 1)


def _legend_columns(names: Sequence[str], *, narrow: bool) -> int:
    return max(1, LEGEND_CHARACTERS[narrow] // (max(map(len, names)) + 8))


def label_log_axis(axis: Axis, *, narrow: bool = False) -> None:
    """Label a logarithmic axis with plain numbers such as 0.01 and 30 instead of powers of ten.

    Args:
        axis: The axis.
        narrow: If True, its labels stand side by side on a narrow screen.
    """
    low, high = axis.get_view_interval()
    if high > LOG_AXIS_MAX:
        high = LOG_AXIS_MAX
        axis.set_view_interval(low, high, ignore=True)
    if high < MIN_LOG_AXIS_RATIO * low:
        low, high = low / math.sqrt(MIN_LOG_AXIS_RATIO), high * math.sqrt(MIN_LOG_AXIS_RATIO)
        axis.set_view_interval(low, high, ignore=True)
    choices, decades, even_ticks = LOG_TICKS, MAX_DECADES, MAX_EVEN_TICKS
    if narrow:
        choices, decades, even_ticks = NARROW_LOG_TICKS, NARROW_MAX_DECADES, NARROW_MAX_EVEN_TICKS
    if high < EVEN_TICKS_RATIO * low:
        axis.set_major_locator(MaxNLocator(even_ticks))
        axis.set_minor_locator(NullLocator())
    else:
        ticks = next((ticks for ratio, ticks in choices if high < ratio * low), (1.0,))
        axis.set_major_locator(LogLocator(subs=ticks, numticks=decades))
    axis.set_major_formatter(FuncFormatter(_tick_label))
    axis.set_minor_formatter(NullFormatter())


def _tick_label(value: float, _: int | None) -> str:
    return f"{value:g}" if 1e-4 <= value < 1e5 else f"{value:.0e}"  # noqa: PLR2004


def shorten(name: str, length: int) -> str:
    """Shorten a name to a number of characters by leaving out its middle."""
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[head + 1 - length :]}"


def or_none(value: float) -> str:
    """Format a number with three digits; "none" if it is not finite."""
    return f"{value:.3g}" if math.isfinite(value) else "none"


def without_common_parts(names: Sequence[str]) -> list[str]:
    """Remove from dotted names the parts that all of them begin or end with."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2:  # noqa: PLR2004
        return list(names)
    ahead = _common_length(parts)
    behind = _common_length([part[:ahead:-1] for part in parts])
    return [".".join(part[min(ahead, len(part) - 1) : max(len(part) - behind, ahead + 1)]) for part in parts]


def _common_length(lists: Sequence[Sequence[str]]) -> int:
    """Count the leading items that all lists have in common."""
    return next((place for place, items in enumerate(zip(*lists, strict=False)) if len(set(items)) > 1), min(map(len, lists)))


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts "layers.2" before "layers.10"."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]
