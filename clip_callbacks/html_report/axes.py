"""What the pictures have in common: lines of any length, axes over steps, plain numbers on logarithmic axes, short names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from clip_callbacks.html_report.downsampling import downsample
from clip_callbacks.html_report.rendering import Theme
from clip_callbacks.html_report.runs import OptimizerLog
from clip_callbacks.html_report.series import Series

DASHED = (0, (4, 2))
LOG_AXIS_MAX = 1e300
"""Where a logarithmic axis ends at the latest."""
SHORT_LOG_AXIS_RATIO = 300
"""A logarithmic axis that spans less has 2 and 5 on it too."""


@dataclass(frozen=True)
class PlottedRun:
    """One optimizer of a run, as every picture shows it.

    Args:
        log: The optimizer.
        losses: The run's losses.
        color: Of its lines.
        suggested: The max_norm that is suggested for it; NaN without one.
    """

    log: OptimizerLog
    losses: dict[str, Series]
    color: str
    suggested: float

    @property
    def label(self) -> str:
        """Its name for legends and titles."""
        return shorten(self.log.name, 28)


def draw_line(axes: Axes, series: Series, color: str, label: str, gid: str, **options: object) -> None:
    """A line over steps; of many points their median in each column of the picture, in a shade from the smallest to the largest."""
    reduced = downsample(series)
    axes.plot(reduced.steps, reduced.middle, color=color, label=label, gid=gid, **options)  # type: ignore[arg-type]
    if not reduced.has_all_points:
        axes.fill_between(reduced.steps, reduced.low, reduced.high, color=color, alpha=0.25, linewidth=0)


def label_step_axis(axes: Axes) -> None:
    """Make the horizontal axis one of optimizer steps."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.locator_params(axis="x", nbins=6)
    axes.margins(x=0.01)


def add_legend(axes: Axes, theme: Theme) -> None:
    """A legend above the axes; matplotlib would leave out names that begin with an underscore."""
    handles = [handle for handle in axes.get_lines() if not str(handle.get_label()).startswith(("_child", "_nolegend"))]
    names = [f"\u200a{label}" if (label := str(handle.get_label())).startswith("_") else label for handle in handles]
    if names:
        columns = (46 if theme.narrow else 120) // (max(map(len, names)) + 8)
        axes.legend(
            handles, names, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=max(1, columns), borderaxespad=0.2, handlelength=1.8
        )


def label_log_axis(axis: Axis) -> None:
    """Labels such as 0.01 and 30 on a logarithmic axis instead of powers of ten."""
    low, high = axis.get_view_interval()
    if high > LOG_AXIS_MAX:  # matplotlib cannot divide an axis that ends next to the largest number
        high = LOG_AXIS_MAX
        axis.set_view_interval(low, high, ignore=True)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if 0 < high < SHORT_LOG_AXIS_RATIO * low else (1.0,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if 1e-4 <= value < 1e5 else f"{value:.0e}"))  # noqa: PLR2004
    axis.set_minor_formatter(NullFormatter())


def shorten(name: str, length: int) -> str:
    """A name of at most so many characters: its beginning and its end."""
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[head + 1 - length :]}"


def without_common_parts(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts that all of them begin and end with."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2:  # noqa: PLR2004
        return list(names)
    ahead = _shared(parts)
    behind = _shared([part[:ahead:-1] for part in parts])
    return [".".join(part[min(ahead, len(part) - 1) : max(len(part) - behind, ahead + 1)]) for part in parts]


def _shared(lists: Sequence[Sequence[str]]) -> int:
    """How many items all lists begin with alike."""
    return next((place for place, items in enumerate(zip(*lists, strict=False)) if len(set(items)) > 1), min(map(len, lists)))


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts "layers.2" before "layers.10"."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]
