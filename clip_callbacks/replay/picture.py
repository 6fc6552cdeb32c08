"""The largest activation and gradient along the depth of the network, on a logarithmic axis."""

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
from clip_callbacks.replay.culprits import TITLES, Culprit, find_culprits
from clip_callbacks.replay.investigation import Investigation
from clip_callbacks.replay.ranges import Range
from clip_callbacks.replay.unusable import UnusableReplayError
from clip_callbacks.replay.watch import Call

ACTIVATION, GRADIENT, GUILTY = "#2f6fb3", "#c9751b", "#b3261e"
NAMES = 36
"""So many names of modules stand at the axis."""
SHIFT = 4.0
"""Points to either side of a module, for crosses of activations and of gradients."""
_BOTH = 2


def write_picture(found: Investigation, path: Path) -> None:
    """Draw what was found.

    Args:
        found: The replay.
        path: The file, whose suffix is the format.

    Raises:
        UnusableReplayError: If it cannot be written.
    """
    theme = replace(Theme(), ink=PRINTED[INK], faint=PRINTED[FAINT], paper=PRINTED[PAPER])
    with mpl.rc_context(theme.style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font has not
        figure = Figure(figsize=(9.4, 4.6), layout="constrained")
        _draw(figure, found, theme)
        try:
            figure.savefig(path, dpi=150, facecolor=theme.paper)
        except OSError as error:
            raise UnusableReplayError(f"{path} cannot be written: {error}") from None


def _draw(figure: Figure, found: Investigation, theme: Theme) -> None:
    axes = figure.subplots()
    micro = found.outcome.micro_batches[found.outcome.guilty]
    calls = _leaves(micro.calls)
    lines = [
        ("max |activation|", ACTIVATION, [call.outputs for call in calls], "o"),
        ("max |gradient| at the output", GRADIENT, [call.gradient for call in calls], "s"),
    ]
    known = [height for _, _, spans, _ in lines for span in spans if not math.isnan(height := _height(span))]
    low, high = (min(known) / 3, max(known) * 3) if known else (0.1, 10.0)
    top = high * (high / low) ** 0.1
    axes.set_yscale("log")
    for label, color, spans, marker in lines:
        axes.plot([_height(span) for span in spans], color=color, label=label, marker=marker, markersize=3.5, gid=label)
    for shift, (label, color, spans, _) in zip((-SHIFT, SHIFT), lines, strict=True):
        places = [place for place, span in enumerate(spans) if span and not span.is_finite]
        (crosses,) = axes.plot(
            places,
            [top] * len(places),
            color=color,
            gid=f"{label}: not finite",
            marker="x",
            markersize=6,
            markeredgewidth=1.8,
            linestyle="none",
            clip_on=False,
            transform=axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans),
        )
        crosses.set_in_layout(False)  # where there are none, they would be at the figure's corner
    axes.plot([], [], color=theme.ink, label="not finite", marker="x", markersize=6, markeredgewidth=1.8, linestyle="none")
    axes.set_ylim(low, top)
    axes.margins(x=0.02)
    label_log_axis(axes.yaxis)
    _name_calls(axes, calls)
    _point_out(axes, calls, find_culprits(micro.calls, found.factor), theme)
    axes.set_title(f"{found.bundle}: {found.verdict.text.partition('.')[0].partition(':')[0].lower()}", pad=28)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3, borderaxespad=0.2, handlelength=1.8)


def _leaves(calls: Sequence[Call]) -> list[Call]:
    """The innermost calls, in order of execution."""
    parents = {call.parent for call in calls}
    return [call for call in calls if call not in parents]


def _height(span: Range | None) -> float:
    return span.largest if span and span.largest > 0 else math.nan


def _name_calls(axes: Axes, calls: Sequence[Call]) -> None:
    stride = max(1, math.ceil(len(calls) / NAMES))
    places = range(0, len(calls), stride)
    names = [shorten(calls[place].name or calls[place].kind, 26) for place in places]
    axes.set_xticks(
        list(places), names, rotation=90 if len(names) > NAMES // 2 else 40, ha="center" if len(names) > NAMES // 2 else "right"
    )
    if len(names) <= NAMES // 2:
        for label in axes.get_xticklabels():
            label.set_rotation_mode("anchor")
    axes.set_xlabel("modules in the order of execution")


def _point_out(axes: Axes, calls: Sequence[Call], culprits: Sequence[Culprit], theme: Theme) -> None:
    """A line where it began, with the name; of a module that others are in, where the last of these is."""
    for number, culprit in enumerate(culprits[:_BOTH]):
        inside = [place for place, call in enumerate(calls) if call is culprit.call or culprit.call in call.above()]
        if not inside:
            continue
        place = inside[-1]
        axes.axvline(place, color=GUILTY, linewidth=1.0, linestyle=(0, (4, 2)))
        is_right = place > len(calls) / 2
        note = axes.annotate(
            f"{TITLES[culprit.guilt]}:\n{shorten(culprit.call.label, 44)}",
            (place, 0.06 + 0.16 * number),
            xycoords=("data", "axes fraction"),
            xytext=(-6 if is_right else 6, 0),
            textcoords="offset points",
            ha="right" if is_right else "left",
            color=GUILTY,
            fontsize=8.5,
            bbox={"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        )
        note.set_in_layout(False)
