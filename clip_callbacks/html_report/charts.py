"""Which pictures a report has, and what is drawn in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from clip_callbacks.html_report.axes import DASHED, PlottedRun, add_legend, draw_line, label_log_axis, label_step_axis, shorten
from clip_callbacks.html_report.downsampling import MAX_COLUMNS, column_means, downsample
from clip_callbacks.html_report.heat_map import heat_map
from clip_callbacks.html_report.rendering import Chart, Theme
from clip_callbacks.html_report.series import Series, Steps

RUN_COLORS = ("#3a86c8", "#d97706", "#2f9e6b", "#d1495b", "#9467bd", "#a0714f", "#d670a6", "#7f8b99", "#9a9a2e", "#1b9aaa")
"""Of the runs; each can be told from white and from the dark page."""
MAX_PLOTTED_RUNS = len(RUN_COLORS)
HISTOGRAM_BINS = 60
MAX_MARKED_POINTS = 30
"""Points that are marked, not only joined by a line."""
LOG_AXIS_RATIO = 10.0
"""From this ratio on an axis is logarithmic."""
LOSS_LINE_STYLES: tuple[tuple[int, tuple[float, ...]], ...] = ((0, ()), (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1, 1, 1)))
"""Of several losses of a run."""


def make_charts(plotted: Sequence[PlottedRun]) -> list[Chart]:
    """All pictures for which something was logged."""
    measured = [each for each in plotted if each.log.total_norm]
    charts = [_norm_chart(measured)] if measured else []
    charts += [_loss_chart(plotted)] if any(each.losses for each in plotted) else []
    clipping = [each for each in plotted if each.log.clip_coef]
    charts += [_coefficient_chart(clipping)] if clipping else []
    charts += [_histogram_chart(measured), _what_if_chart(measured)] if measured else []
    for number, each in enumerate(plotted, 1):
        for key, what, blocks in (
            ("blocks", "Norm of each block's gradient", each.log.blocks()),
            ("updates", "Update-to-weight ratio of each block", each.log.update_ratios),
        ):
            if logged := {name: series for name, series in blocks.items() if series}:
                charts.append(heat_map(logged, f"{key}-{number}", f"{what}: {each.log.name}"))
    return charts


def _norm_chart(plotted: list[PlottedRun]) -> Chart:
    clips = any(each.log.clip_fraction for each in plotted)

    def draw(figure: Figure, theme: Theme) -> None:
        grid = figure.subplots(2 if clips else 1, sharex=True, height_ratios=[3.2, 1] if clips else None, squeeze=False)
        norms, *strips = grid[:, 0]
        for each in plotted:
            draw_line(norms, each.log.total_norm, each.color, each.label, f"total_norm-{each.log.name}")
            _mark_steps(norms, each, theme.ink if len(plotted) == 1 else each.color, theme)
            for strip in strips if each.log.clip_fraction else ():
                share = each.log.clip_fraction
                edges, values = column_means(share, min(MAX_COLUMNS // 4, len(share)))
                strip.stairs(values, edges, color=each.color, fill=len(plotted) == 1, gid=f"clip_fraction-{each.log.name}")
        for style, marker, label, is_there in (
            (DASHED, "", "max_norm", any(each.log.max_norm for each in plotted)),
            ("", ".", "clipped", any(len(_clipped(each).steps) for each in plotted)),
            ("", "x", "skipped", any(len(each.log.skips[0]) for each in plotted)),
        ):
            if is_there:
                norms.plot([], [], color=theme.ink, linestyle=style, marker=marker, label=label)
        norms.set(yscale="log", ylabel=_axis(plotted))
        label_log_axis(norms.yaxis)
        for strip in strips:
            strip.set(ylabel="clipped", ylim=(0, 1.02))
            strip.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        label_step_axis((strips or [norms])[-1])
        add_legend(norms, theme)

    spans = "; ".join(
        f"{each.log.name}: from {each.log.total_norm.values.min():.3g} to {each.log.total_norm.values.max():.3g}, "
        f"median {np.median(each.log.total_norm.values):.3g}, last max_norm {_or_none(each.log.max_norm.last)}"
        for each in plotted
    )
    long = "the median of each column of the picture, the shade reaches from its smallest to its largest value"
    ours = (
        "total_norm before clipping, on a logarithmic axis; what lies above the dashed limit is clipped down to it: the dots. A "
        "cross at the top is a skipped step. Below, the share of all steps that were clipped. "
        f"Of long runs the line is {long}, and there are no dots."
    )
    theirs = f"The norm as it was logged, on a logarithmic axis. Of long runs the line is {long}."
    return Chart(
        "norm",
        "Norm of the gradient",
        ours if any(each.log.norm.is_ours for each in plotted) else theirs,
        f"{_axis(plotted)} over steps. {spans}.",
        draw,
        (4.4, 4.4),
    )


def _mark_steps(axes: Axes, each: PlottedRun, limit_color: str, theme: Theme) -> None:
    """The limit, dots on steps that were clipped, crosses above those that were skipped."""
    name = each.log.name
    if each.log.max_norm:
        limit = downsample(each.log.max_norm)
        axes.plot(
            limit.steps,
            limit.middle,
            color=limit_color,
            linestyle=DASHED,
            linewidth=1.4,
            zorder=3,
            gid=f"max_norm-{name}",
            label="_child",
        )
    clipped = _clipped(each)
    if clipped:
        axes.plot(
            clipped.steps, clipped.values, ".", color=theme.ink, markersize=3, zorder=4, gid=f"clipped-{name}", label="_child"
        )
    skips = _spread(each.log.skips[0])
    if len(skips):
        options: dict[str, Any] = {"markersize": 6, "markeredgewidth": 1.6, "transform": axes.get_xaxis_transform(), "zorder": 4}
        axes.plot(skips, np.full(len(skips), 0.97), "x", color=each.color, gid=f"skips-{name}", label="_child", **options)


def _clipped(each: PlottedRun) -> Series:
    """The norms logged at steps that were clipped; none of a run too long to draw each of them."""
    norms = each.log.total_norm
    if not downsample(norms).has_all_points or not each.log.clip_coef:
        return Series.empty()
    is_clipped = np.isin(norms.steps, each.log.clip_coef.steps[each.log.clip_coef.values < 1])
    return Series(norms.steps[is_clipped], norms.values[is_clipped])


def _spread(steps: Steps) -> Steps:
    """Some of the steps, if there are too many to be drawn."""
    if len(steps) <= MAX_COLUMNS // 2:
        return steps
    places = np.linspace(0, len(steps) - 1, MAX_COLUMNS // 2).astype(int)
    return np.asarray(steps[places])


def _loss_chart(plotted: Sequence[PlottedRun]) -> Chart:
    runs = list({each.log.run.name: each for each in plotted}.values())  # one loss for all optimizers of a run
    lines = [
        (each, key if len(runs) == 1 else f"{each.label}: {key}", series, style)
        for each in runs
        for (key, series), style in zip(each.losses.items(), LOSS_LINE_STYLES * len(each.losses), strict=False)
    ]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for each, label, series, style in lines:
            if finite := series.finite:
                marker = "o" if len(finite) < MAX_MARKED_POINTS else None
                draw_line(axes, finite, each.color, label, f"loss-{label}", linestyle=style, marker=marker, markersize=3)
            broken = series.steps[~np.isfinite(series.values)]
            if len(broken):
                axes.axvline(float(broken[0]), color=each.color, linestyle=":", label=f"{label} NaN or inf")
        values = np.concatenate([series.finite.values for _, _, series, _ in lines])
        if len(values) and values.min() > 0 and values.max() > LOG_AXIS_RATIO * values.min():
            axes.set_yscale("log")
            label_log_axis(axes.yaxis)
        axes.set_ylabel("loss")
        label_step_axis(axes)
        add_legend(axes, theme)

    final_values = "; ".join(f"{label} {_or_none(series.last)} at the end" for _, label, series, _ in lines)
    caption = "As the module logged it. A dotted line is where it was NaN or inf first."
    return Chart("loss", "Loss", caption, f"Loss over steps. {final_values}.", draw)


def _coefficient_chart(plotted: list[PlottedRun]) -> Chart:
    smallest = min(float(each.log.clip_coef.values.min()) for each in plotted)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for each in plotted:
            draw_line(axes, each.log.clip_coef, each.color, each.label, f"clip_coef-{each.log.name}")
        if 0 < smallest < 1 / LOG_AXIS_RATIO:
            axes.set_yscale("log")
            label_log_axis(axes.yaxis)
        else:
            axes.set_ylim(0, 1.05)
        axes.set_ylabel("clip_coef")
        label_step_axis(axes)
        add_legend(axes, theme)

    means = "; ".join(
        f"{each.log.name}: smallest {each.log.clip_coef.values.min():.3g}, mean {each.log.clip_coef.values.mean():.3g}"
        for each in plotted
    )
    caption = "What the gradient was multiplied by: clipped_norm / total_norm. 1: left alone. 0.1: a tenth of its length was kept."
    return Chart("coefficient", "Clipping coefficient", caption, f"clip_coef over steps. {means}.", draw, (2.6, 2.6))


def _histogram_chart(plotted: list[PlottedRun]) -> Chart:
    low = min(float(each.log.total_norm.values.min()) for each in plotted)
    high = max(float(each.log.total_norm.values.max()) for each in plotted)
    has_limit = any(each.log.max_norm for each in plotted)

    def draw(figure: Figure, theme: Theme) -> None:
        edges = np.geomspace(low * 0.98, high * 1.02, HISTOGRAM_BINS + 1)
        rows = figure.subplots(len(plotted), sharex=True, squeeze=False)[:, 0]
        for axes, each in zip(rows, plotted, strict=True):
            norms, limit = each.log.total_norm.values, each.log.max_norm.last
            counts, _ = np.histogram(norms, edges)
            axes.stairs(counts, edges, fill=True, color=each.color, alpha=0.75, gid=f"histogram-{each.log.name}")
            top = counts.max() * 1.3
            for percent, height in ((50, 0.98), (90, 0.86), (99, 0.74)):
                value = float(np.percentile(norms, percent))
                axes.plot([value, value], [0, top * height], color=theme.ink, linestyle=":", linewidth=1)
                text = f"p{percent} {value:.3g}"
                axes.annotate(text, (value, top * height), xytext=(3, -8), textcoords="offset points", fontsize=8)
            if low < limit < high:
                axes.axvline(limit, color=theme.ink, linestyle=DASHED, linewidth=1.4)
            axes.set(xscale="log", ylim=(0, top), ylabel="logged steps", title=each.label)
            label_log_axis(axes.xaxis)
        rows[-1].set_xlabel(f"{_axis(plotted)} (dashed: max_norm)" if has_limit else _axis(plotted))

    percentiles = "; ".join(
        f"{each.log.name}: "
        + ", ".join(f"p{percent} {np.percentile(each.log.total_norm.values, percent):.3g}" for percent in (50, 90, 99))
        for each in plotted
    )
    caption = "How often each norm occurred, on a logarithmic axis, with percentiles."
    height = 1.0 + 1.5 * len(plotted)
    return Chart(
        "histogram", "Distribution of norms", caption, f"Histogram of {_axis(plotted)}. {percentiles}.", draw, (height, height)
    )


def _what_if_chart(plotted: list[PlottedRun]) -> Chart:
    has_limit, has_advice = any(each.log.max_norm for each in plotted), any(math.isfinite(each.suggested) for each in plotted)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for each in plotted:
            norms = np.sort(each.log.total_norm.values)
            place = np.unique(np.linspace(0, len(norms) - 1, min(MAX_COLUMNS, len(norms))).astype(int))
            above = 1 - (place + 1) / len(norms)
            axes.plot(
                norms[place], above, color=each.color, label=each.label, drawstyle="steps-post", gid=f"what_if-{each.log.name}"
            )
            for value, marker in ((each.log.max_norm.last, "o"), (each.suggested, "D")):
                if math.isfinite(value):
                    share = float((norms > value).mean())
                    axes.plot([value], [share], marker, color=each.color, markersize=6, markeredgecolor=theme.ink, label="_child")
        for marker, label, is_there in (("o", "max_norm now", has_limit), ("D", "suggested", has_advice)):
            if is_there:
                axes.plot([], [], marker, color=theme.faint, markeredgecolor=theme.ink, label=label)
        axes.set(xscale="log", ylim=(-0.02, 1.02), xlabel="max_norm", ylabel="steps clipped")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        label_log_axis(axes.xaxis)
        add_legend(axes, theme)

    clipped = "; ".join(
        f"{each.log.name}: "
        + ", ".join(f"{share:.0%} at {np.quantile(each.log.total_norm.values, 1 - share):.3g}" for share in (0.5, 0.1, 0.01))
        for each in plotted
    )
    caption = (
        "The share of the logged steps that a fixed global max_norm would clip. A circle is the limit at the end of the run, a "
        "diamond the suggestion. Other clipping would have made other steps: read it as a guide."
    )
    return Chart("what_if", "What if max_norm were another?", caption, f"Share of steps clipped over max_norm. {clipped}.", draw)


def _axis(plotted: Sequence[PlottedRun]) -> str:
    """What an axis of norms is called: as they were logged, if all were logged under one name."""
    names = {shorten(each.log.norm.title, 40) for each in plotted}
    return names.pop() if len(names) == 1 else "norm"


def _or_none(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "none"
