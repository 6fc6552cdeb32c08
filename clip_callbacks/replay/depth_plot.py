"""A plot of the largest activation and gradient of each module along the depth of the network, with a logarithmic axis."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from clip_callbacks.html_report.axes import label_log_axis, shorten
from clip_callbacks.html_report.rendering import FAINT, INK, PAPER, PRINTED, Theme
from clip_callbacks.replay.errors import UnusableReplayError
from clip_callbacks.replay.module_calls import ModuleCall
from clip_callbacks.replay.ranges import ValueRange
from clip_callbacks.replay.report import ReplayReport
from clip_callbacks.replay.suspects import TITLES, SuspectModule, find_suspects

ACTIVATION_COLOR, GRADIENT_COLOR, SUSPECT_COLOR = "#2f6fb3", "#c9751b", "#b3261e"
MAX_MODULE_NAMES = 36
"""Number of modules that are named at the axis."""
MAX_SLANTED_NAMES = 18
"""Number of names up to which they are slanted; more are vertical."""
CROSS_OFFSET = 4.0
"""Distance of a cross from the position of its module, in points: those of activations to the left, of gradients to the right."""
MAX_SUSPECTS = 2
"""Number of suspects that are marked."""


def write_depth_plot(report: ReplayReport, path: Path) -> None:
    """Draw the suspect micro-batch of a replay.

    Args:
        report: The report of the replay.
        path: The file to write, in the format of its suffix.

    Raises:
        UnusableReplayError: If the file cannot be written.
    """
    style = replace(Theme(), ink=PRINTED[INK], faint=PRINTED[FAINT], paper=PRINTED[PAPER]).style
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that the font does not have
        figure = Figure(figsize=(9.4, 4.6), layout="constrained")
        _draw(figure.subplots(), report)
        try:
            figure.savefig(path, dpi=150, facecolor=PRINTED[PAPER])
        except OSError as error:
            raise UnusableReplayError(f"{path} cannot be written: {error}") from None


def _draw(axes: Axes, report: ReplayReport) -> None:
    micro = report.result.micro_batches[report.result.suspect_index]
    parents = {call.parent for call in micro.calls}
    calls = [call for call in micro.calls if call not in parents]
    activations, gradients = [call.outputs for call in calls], [call.grad_output for call in calls]
    heights = [height for values in (*activations, *gradients) if not math.isnan(height := _height(values))]
    low, high = 0.1, 10.0
    if heights:
        low, high = min(heights) / 3, max(heights) * 3
    top = high * (high / low) ** 0.1
    axes.set_yscale("log")
    _draw_values(axes, "max |activation|", activations, top, color=ACTIVATION_COLOR, marker="o", offset=-CROSS_OFFSET)
    _draw_values(axes, "max |gradient| at the output", gradients, top, color=GRADIENT_COLOR, marker="s", offset=CROSS_OFFSET)
    axes.plot([], [], color=PRINTED[INK], label="non-finite", marker="x", markersize=6, markeredgewidth=1.8, linestyle="none")
    axes.set_ylim(low, top)
    axes.margins(x=0.02)
    label_log_axis(axes.yaxis)
    _label_modules(axes, calls)
    _mark_suspects(axes, calls, find_suspects(micro.calls, report.explosion_factor))
    outcome = "reproduced" if report.is_reproduced else "not reproduced"
    axes.set_title(f"{report.bundle}: {outcome}", pad=28)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3, borderaxespad=0.2, handlelength=1.8)


def _draw_values(
    axes: Axes, label: str, ranges: Sequence[ValueRange | None], top: float, *, color: str, marker: str, offset: float
) -> None:
    """Draw the largest values as a line, and a cross at the upper edge for each module with non-finite ones."""
    axes.plot([_height(values) for values in ranges], color=color, label=label, marker=marker, markersize=3.5, gid=label)
    positions = [position for position, values in enumerate(ranges) if values and not values.is_finite]
    (crosses,) = axes.plot(
        positions,
        [top] * len(positions),
        color=color,
        gid=f"{label}: non-finite",
        marker="x",
        markersize=6,
        markeredgewidth=1.8,
        linestyle="none",
        clip_on=False,
        transform=axes.transData + ScaledTranslation(offset / 72, 0, axes.figure.dpi_scale_trans),
    )
    crosses.set_in_layout(False)  # without any module the crosses would stand at the figure's corner


def _height(values: ValueRange | None) -> float:
    return values.largest if values and values.largest > 0 else math.nan


def _label_modules(axes: Axes, calls: Sequence[ModuleCall]) -> None:
    positions = range(0, len(calls), max(1, math.ceil(len(calls) / MAX_MODULE_NAMES)))
    names = [shorten(calls[position].name or calls[position].class_name, 26) for position in positions]
    if len(names) > MAX_SLANTED_NAMES:
        axes.set_xticks(list(positions), names, rotation=90, ha="center")
    else:
        axes.set_xticks(list(positions), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set(xlabel="modules in the order of execution", ylabel="largest absolute value (log scale)")


def _mark_suspects(axes: Axes, calls: Sequence[ModuleCall], suspects: Sequence[SuspectModule]) -> None:
    """Draw a line with a name at each suspect; at one that contains other modules, at the last of these."""
    for number, suspect in enumerate(suspects[:MAX_SUSPECTS]):
        inside = [position for position, call in enumerate(calls) if call is suspect.call or suspect.call in call.ancestors()]
        if not inside:
            continue
        position = inside[-1]
        axes.axvline(position, color=SUSPECT_COLOR, linewidth=1.0, linestyle=(0, (4, 2)))
        side, space = "left", 6
        if position > len(calls) / 2:
            side, space = "right", -6
        note = axes.annotate(
            f"{TITLES[suspect.fault]}:\n{shorten(suspect.call.label, 44)}",
            (position, 0.06 + 0.16 * number),
            xycoords=("data", "axes fraction"),
            xytext=(space, 0),
            textcoords="offset points",
            ha=side,
            color=SUSPECT_COLOR,
            fontsize=8.5,
            bbox={"facecolor": PRINTED[PAPER], "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        )
        note.set_in_layout(False)
