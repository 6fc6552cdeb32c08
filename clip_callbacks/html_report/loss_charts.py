"""The plots of losses, with their spikes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clip_callbacks.core.wording import plural
from clip_callbacks.html_report.axes import (
    DASHED,
    LOG_AXIS_RATIO,
    NO_LEGEND,
    PlottedRun,
    add_legend,
    draw_line,
    heights_with_legend,
    label_log_axis,
    label_step_axis,
    limit_color,
    or_none,
)
from clip_callbacks.html_report.downsampling import MAX_COLUMNS
from clip_callbacks.html_report.losses import is_loss_spike, number_in
from clip_callbacks.html_report.rendering import Chart, Theme
from clip_callbacks.html_report.series import Series, Values

MAX_MARKED_POINTS = 30
"""A loss with fewer points gets a marker at each of them."""
MAX_MARKED_SPIKES = MAX_COLUMNS // 4
"""The number of spikes of a run that are marked: the highest."""
LOSS_LINE_STYLES: tuple[tuple[int, tuple[float, ...]], ...] = ((0, ()), (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1, 1, 1)))
"""Line styles that distinguish the losses of a run."""
NAN_LABEL = "first NaN or inf of {}"
"""Legend entry of the line at the first step at which a loss was not finite."""
SKIPPED, SEEN = "skipped spike", "spike"
"""Legend entries of spikes that the guard skipped, and of others: only reported, or found in hindsight."""
MARKERS = {SKIPPED: "x", SEEN: "o"}


def loss_chart(plotted: Sequence[PlottedRun]) -> Chart:
    """Make the plot of the losses that the modules logged; spikes are marked in runs without ``grad/loss``."""
    runs = list({each.log.run.name: each for each in plotted}.values())  # one loss for all optimizers of a run
    marked = [each for each in runs if each.loss and not each.loss.is_ours]
    lines = [
        (each, key if len(runs) == 1 else f"{each.label}: {key}", series, style)
        for each in runs
        for (key, series), style in zip(each.losses.items(), LOSS_LINE_STYLES * len(each.losses), strict=False)
    ]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for each, label, series, style in lines:
            if finite := series.finite:
                marker = ""
                if len(finite) < MAX_MARKED_POINTS:
                    marker = "o"
                draw_line(axes, finite, each.color, label, f"loss-{label}", linestyle=style, marker=marker, markersize=3)
            if broken := series.not_finite:
                axes.axvline(float(broken.steps[0]), color=each.color, linestyle=":", label=NAN_LABEL.format(label))
        _mark_spikes(axes, marked, theme)
        _scale_losses(axes, np.concatenate([series.finite.values for _, _, series, _ in lines]))
        label_step_axis(axes)
        add_legend(axes, theme)

    final_values = "; ".join(f"{label} {or_none(series.last)} at the end" for _, label, series, _ in lines)
    caption = "Losses as the module logged them."
    if any(series.not_finite for _, _, series, _ in lines):
        caption += " A vertical dotted line marks the first optimizer step at which a loss was NaN or inf."
    names = [label for _, label, _, _ in lines]
    names += [NAN_LABEL.format(label) for _, label, series, _ in lines if series.not_finite]
    heights = heights_with_legend(3.4, 3.2, [*names, *_kinds(marked)])
    summary = f"Loss over optimizer steps. {final_values}.{_spikes_in_words(marked)}"
    return Chart("loss", "Loss", caption + _meaning_of_marks(marked), summary, draw, heights)


def loss_limit_chart(plotted: Sequence[PlottedRun]) -> Chart:
    """Make the plot of the losses that the guard judged, with the limit in force.

    Args:
        plotted: The optimizers for which ``grad/loss`` was logged.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        values = []
        for each in plotted:
            assert each.loss is not None
            draw_line(axes, each.loss.logged, each.color, each.label, f"guarded_loss-{each.log.name}")
            values.append(each.loss.logged.values)
            if each.loss.limit:
                color = limit_color(plotted, each, theme)
                draw_line(axes, each.loss.limit, color, NO_LEGEND, f"loss_limit-{each.log.name}", linestyle=DASHED)
                values.append(each.loss.limit.values)
        if any(each.loss and each.loss.limit for each in plotted):
            axes.plot([], [], color=theme.ink, linestyle=DASHED, label="limit")
        _mark_spikes(axes, plotted, theme)
        _scale_losses(axes, np.concatenate(values))
        label_step_axis(axes)
        add_legend(axes, theme)

    caption = "The loss of the whole window of an optimizer step, which NonFiniteGuard compares with its limit loss_above (dashed)."
    last = "; ".join(
        f"{each.log.name}: loss {or_none(each.loss.logged.last)}, limit {or_none(each.loss.limit.last)} at the end"
        for each in plotted
        if each.loss
    )
    heights = heights_with_legend(3.4, 3.2, [*(each.label for each in plotted), "limit", *_kinds(plotted)])
    summary = f"Loss of optimizer steps and its limit. {last}.{_spikes_in_words(plotted)}"
    return Chart("loss_limit", "Loss and its limit", caption + _meaning_of_marks(plotted), summary, draw, heights)


def _scale_losses(axes: Axes, values: Values) -> None:
    axes.set_ylabel("loss")
    if len(values) and values.min() > 0 and values.max() > LOG_AXIS_RATIO * values.min():
        axes.set(yscale="log", ylabel="loss (log scale)")
        label_log_axis(axes.yaxis)


def _spikes(each: PlottedRun) -> dict[str, Series]:
    """Return the steps and losses of the spikes to be marked, by the legend entry of their marks."""
    if each.loss is None:
        return {}
    journal = [(entry["step"], number_in(entry, "loss"), _kind(entry)) for entry in each.log.bad_steps if is_loss_spike(entry)]
    found = each.loss.spikes.highest(MAX_MARKED_SPIKES).points
    points = [*journal, *((step, loss, SEEN) for step, loss in zip(found.steps, found.values, strict=True))]
    marks = {}
    for kind in MARKERS:
        chosen = [(step, loss) for step, loss, other in points if other == kind and np.isfinite(loss)][-MAX_MARKED_SPIKES:]
        if chosen:
            marks[kind] = Series.of(*zip(*sorted(chosen), strict=True))
    return marks


def _kind(entry: Mapping[str, Any]) -> str:
    return SEEN if entry.get("policy") == "warn" else SKIPPED


def _kinds(plotted: Sequence[PlottedRun]) -> list[str]:
    return [kind for kind in MARKERS if any(kind in _spikes(each) for each in plotted)]


def _mark_spikes(axes: Axes, plotted: Sequence[PlottedRun], theme: Theme) -> None:
    for each in plotted:
        for kind, points in _spikes(each).items():
            gid = f"{kind.replace(' ', '_')}s-{each.log.name}"
            axes.plot(points.steps, points.values, MARKERS[kind], color=theme.ink, label=NO_LEGEND, gid=gid, **_MARK)
    for kind in _kinds(plotted):
        axes.plot([], [], MARKERS[kind], color=theme.ink, label=kind, **_MARK)


_MARK: dict[str, Any] = {"markersize": 6, "markeredgewidth": 1.4, "markerfacecolor": "none", "zorder": 4}


def _meaning_of_marks(plotted: Sequence[PlottedRun]) -> str:
    meanings = {
        SKIPPED: " A cross marks a step that NonFiniteGuard skipped as a spike of the loss.",
        SEEN: " A circle marks a spike: a loss far above those of the steps before and after, or one that NonFiniteGuard reported.",
    }
    return "".join(meanings[kind] for kind in _kinds(plotted))


def _spikes_in_words(plotted: Sequence[PlottedRun]) -> str:
    counts = [
        f" {each.log.name}: {len(points)} {plural(len(points), kind, f'{kind}s')}."
        for each in plotted
        for kind, points in _spikes(each).items()
    ]
    return "".join(counts)
