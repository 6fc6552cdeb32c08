"""The plots of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

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
    shorten,
)
from clip_callbacks.html_report.downsampling import MAX_COLUMNS, column_means, downsample, fits
from clip_callbacks.html_report.heat_map import BLOCK_METRICS, heat_map
from clip_callbacks.html_report.loss_charts import loss_chart, loss_limit_chart
from clip_callbacks.html_report.rendering import Chart, Theme
from clip_callbacks.html_report.series import Series, Steps
from clip_callbacks.html_report.vanished import vanished_chart

RUN_COLORS = ("#3a86c8", "#d97706", "#2f9e6b", "#d1495b", "#9467bd", "#a0714f", "#d670a6", "#7f8b99", "#9a9a2e", "#1b9aaa")
"""Colors of the runs, each legible on the light and on the dark page."""
MAX_PLOTTED_RUNS = len(RUN_COLORS)
"""The number of runs on a page."""
HISTOGRAM_BINS = 60


def make_charts(plotted: Sequence[PlottedRun]) -> list[Chart]:
    """Make all plots for which something was logged."""
    charts: list[Chart] = []
    measured = [each for each in plotted if each.log.total_norm]
    if measured:
        charts.append(_norm_chart(measured))
    if any(each.losses for each in plotted):
        charts.append(loss_chart(plotted))
    if guarded := [each for each in plotted if each.loss and each.loss.is_ours]:
        charts.append(loss_limit_chart(guarded))
    if clipping := [each for each in plotted if each.log.clip_coef]:
        charts.append(_coefficient_chart(clipping))
    if measured:
        charts += [_histogram_chart(measured), _what_if_chart(measured)]
    for number, each in enumerate(plotted, 1):
        blocks = ((metric, metric.of(each.log)) for metric in BLOCK_METRICS)
        charts += [heat_map(logged, metric, number, each.log.name) for metric, logged in blocks if logged]
        if strip := vanished_chart(each.log, number):
            charts.append(strip)
    return charts


def _norm_chart(plotted: list[PlottedRun]) -> Chart:
    clips = any(each.log.clip_fraction for each in plotted)

    def draw(figure: Figure, theme: Theme) -> None:
        height_ratios = [3.2, 1] if clips else [1]
        norms, *strips = figure.subplots(len(height_ratios), sharex=True, height_ratios=height_ratios, squeeze=False)[:, 0]
        for each in plotted:
            draw_line(norms, each.log.total_norm, each.color, each.label, f"total_norm-{each.log.name}")
            _mark_steps(norms, each, limit_color(plotted, each, theme), theme)
            for strip in strips:
                _draw_clipped_share(strip, each, fill=len(plotted) == 1)
        for style, marker, label, is_there in (
            (DASHED, "", "max_norm", any(each.log.max_norm for each in plotted)),
            ("", ".", "clipped step", any(len(_clipped(each).steps) for each in plotted)),
            ("", "x", "skipped step", any(len(each.log.skips[0]) for each in plotted)),
        ):
            if is_there:
                norms.plot([], [], color=theme.ink, linestyle=style, marker=marker, label=label)
        norms.set(yscale="log", ylabel=f"{_norm_label(plotted)}\n(log scale)")
        label_log_axis(norms.yaxis)
        for strip in strips:
            strip.set(ylabel="clipped\nsteps", ylim=(0, 1.02))
            strip.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        label_step_axis((strips or [norms])[-1])
        add_legend(norms, theme)

    spans = "; ".join(
        f"{each.log.name}: from {each.log.total_norm.values.min():.3g} to {each.log.total_norm.values.max():.3g}, "
        f"median {each.log.total_norm.median:.3g}, last max_norm {or_none(each.log.max_norm.last)}"
        for each in plotted
    )
    caption = "The norm of all gradients as it was logged."
    if any(each.log.norm.is_ours for each in plotted):
        caption = (
            "The norm of all gradients before clipping. A dot marks a clipped optimizer step, a cross at the top a skipped one. "
            "The lower plot shows the share of all optimizer steps that were clipped."
        )
    if any(each.log.has_local_norms for each in plotted):
        caption += " In a run with local norms max_norm is the limit of one block, not of the norm of all gradients."
    if not all(fits(each.log.total_norm) for each in plotted):
        caption += (
            " Long runs are downsampled: the line is the median of each column of the plot, the band spans its smallest to its "
            "largest value, and clipped steps are not marked."
        )
    return Chart(
        "norm",
        "Norm of all gradients",
        caption,
        f"{_norm_label(plotted)} over optimizer steps. {spans}.",
        draw,
        heights_with_legend(4.2, 4.0, [*(each.label for each in plotted), "max_norm", "clipped step", "skipped step"]),
    )


def _draw_clipped_share(axes: Axes, each: PlottedRun, *, fill: bool) -> None:
    share = each.log.clip_fraction
    if share:
        edges, values = column_means(share, min(MAX_COLUMNS // 4, len(share)))
        axes.stairs(values, edges, color=each.color, fill=fill, gid=f"clip_fraction-{each.log.name}")


def _mark_steps(axes: Axes, each: PlottedRun, color_of_limit: str, theme: Theme) -> None:
    """Draw the limit, a dot on each clipped step and a cross above each skipped step."""
    name = each.log.name
    if each.log.max_norm:
        limit = downsample(each.log.max_norm)
        axes.plot(
            limit.steps,
            limit.median,
            marker="_" if len(limit.steps) == 1 else "",
            color=color_of_limit,
            linestyle=DASHED,
            linewidth=1.4,
            zorder=3,
            gid=f"max_norm-{name}",
            label=NO_LEGEND,
        )
    clipped = _clipped(each)
    if clipped:
        axes.plot(
            clipped.steps, clipped.values, ".", color=theme.ink, markersize=3, zorder=4, gid=f"clipped-{name}", label=NO_LEGEND
        )
    skips = _at_most_half_the_columns(each.log.skips[0])
    if len(skips):
        options: dict[str, Any] = {"markersize": 6, "markeredgewidth": 1.6, "transform": axes.get_xaxis_transform(), "zorder": 4}
        axes.plot(skips, np.full(len(skips), 0.97), "x", color=each.color, gid=f"skips-{name}", label=NO_LEGEND, **options)


def _clipped(each: PlottedRun) -> Series:
    """Return the norms logged at clipped steps; none of a run that is too long to draw each of them."""
    norms = each.log.total_norm
    if not fits(norms) or not each.log.clip_coef:
        return Series.empty()
    is_clipped = np.isin(norms.steps, each.log.clip_coef.steps[each.log.clip_coef.values < 1])
    return Series(norms.steps[is_clipped], norms.values[is_clipped])


def _at_most_half_the_columns(steps: Steps) -> Steps:
    """Return evenly spread steps if there are too many to be drawn."""
    if len(steps) <= MAX_COLUMNS // 2:
        return steps
    places = np.linspace(0, len(steps) - 1, MAX_COLUMNS // 2).astype(int)
    return np.asarray(steps[places])


def _coefficient_chart(plotted: list[PlottedRun]) -> Chart:
    smallest = min(float(each.log.clip_coef.values.min()) for each in plotted)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for each in plotted:
            draw_line(axes, each.log.clip_coef, each.color, each.label, f"clip_coef-{each.log.name}")
        if 0 < smallest < 1 / LOG_AXIS_RATIO:
            axes.set(yscale="log", ylabel="clip_coef (log scale)")
            label_log_axis(axes.yaxis)
        else:
            axes.set(ylim=(0, 1.05), ylabel="clip_coef")
        label_step_axis(axes)
        add_legend(axes, theme)

    means = "; ".join(
        f"{each.log.name}: smallest {each.log.clip_coef.values.min():.3g}, mean {each.log.clip_coef.values.mean():.3g}"
        for each in plotted
    )
    caption = "clip_coef is clipped_norm / total_norm: 1 means that the gradient was not changed, 0.1 that a tenth of it was left."
    heights = heights_with_legend(2.6, 2.6, [each.label for each in plotted])
    return Chart("coefficient", "Clipping coefficient", caption, f"clip_coef over optimizer steps. {means}.", draw, heights)


def _histogram_chart(plotted: list[PlottedRun]) -> Chart:
    low = min(float(each.log.total_norm.values.min()) for each in plotted)
    high = max(float(each.log.total_norm.values.max()) for each in plotted)
    has_limit = any(math.isfinite(_global_limit(each)) for each in plotted)

    def draw(figure: Figure, theme: Theme) -> None:
        edges = np.geomspace(low * 0.98, high * 1.02, HISTOGRAM_BINS + 1)
        rows = figure.subplots(len(plotted), sharex=True, squeeze=False)[:, 0]
        for axes, each in zip(rows, plotted, strict=True):
            norms, limit = each.log.total_norm.values, _global_limit(each)
            counts, _ = np.histogram(norms, edges)
            axes.stairs(counts, edges, fill=True, color=each.color, alpha=0.75, gid=f"histogram-{each.log.name}")
            top = counts.max() * 1.3
            for percent, height in ((50, 0.98), (90, 0.86), (99, 0.74)):
                value = float(np.percentile(norms, percent))
                axes.plot([value, value], [0, top * height], color=theme.ink, linestyle=":", linewidth=1)
                text = f"p{percent} {value:.3g}"
                axes.annotate(
                    text,
                    (value, top * height),
                    xytext=(3, -8),
                    textcoords="offset points",
                    fontsize=8,
                    bbox={"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
                )
            if low < limit < high:
                axes.axvline(limit, color=theme.ink, linestyle=DASHED, linewidth=1.4)
            axes.set(xscale="log", ylim=(0, top), ylabel="logged steps\nper bin", title=each.label)
            label_log_axis(axes.xaxis, narrow=theme.narrow)
        rows[-1].set_xlabel(f"{_norm_label(plotted)} (log scale)")

    percentiles = "; ".join(
        f"{each.log.name}: "
        + ", ".join(f"p{percent} {np.percentile(each.log.total_norm.values, percent):.3g}" for percent in (50, 90, 99))
        for each in plotted
    )
    caption = "Histogram of the logged norms. Dotted lines are percentiles: half of the norms are below p50, nine tenths below p90."
    if has_limit:
        caption += " The dashed line is the last max_norm."
    height = 1.0 + 1.5 * len(plotted)
    return Chart(
        "histogram",
        "Distribution of norms",
        caption,
        f"Histogram of {_norm_label(plotted)}. {percentiles}.",
        draw,
        (height, height),
    )


def _what_if_chart(plotted: list[PlottedRun]) -> Chart:
    has_limit = any(math.isfinite(_global_limit(each)) for each in plotted)
    has_advice = any(math.isfinite(each.suggested) for each in plotted)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for each in plotted:
            norms = np.sort(each.log.total_norm.values)
            place = np.unique(np.linspace(0, len(norms) - 1, min(MAX_COLUMNS, len(norms))).astype(int))
            above = 1 - (place + 1) / len(norms)
            axes.plot(
                norms[place], above, color=each.color, label=each.label, drawstyle="steps-post", gid=f"what_if-{each.log.name}"
            )
            for value, marker in ((_global_limit(each), "o"), (each.suggested, "D")):
                if math.isfinite(value):
                    share = float((norms > value).mean())
                    axes.plot([value], [share], marker, color=each.color, markersize=6, markeredgecolor=theme.ink, label=NO_LEGEND)
        for marker, label, is_there in (("o", "last max_norm", has_limit), ("D", "suggested max_norm", has_advice)):
            if is_there:
                axes.plot([], [], marker, color=theme.faint, markeredgecolor=theme.ink, label=label)
        axes.set(xscale="log", ylim=(-0.02, 1.02), xlabel="constant max_norm (log scale)", ylabel="clipped share of logged steps")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        label_log_axis(axes.xaxis, narrow=theme.narrow)
        add_legend(axes, theme)

    clipped = "; ".join(
        f"{each.log.name}: "
        + ", ".join(f"{share:.0%} at {np.quantile(each.log.total_norm.values, 1 - share):.3g}" for share in (0.5, 0.1, 0.01))
        for each in plotted
    )
    caption = (
        "The share of the logged steps that a constant max_norm for the norm of all gradients would have clipped. This is a guide "
        "only: with another max_norm the training would have taken other steps."
    )
    summary = f"Share of clipped steps over max_norm. {clipped}."
    heights = heights_with_legend(3.4, 3.2, [*(each.label for each in plotted), "last max_norm", "suggested max_norm"])
    return Chart("what_if", "Steps that another max_norm would clip", caption, summary, draw, heights)


def _global_limit(each: PlottedRun) -> float:
    """Return the last limit of the norm of all gradients; NaN without one, as with local norms, whose limit is that of a block."""
    return math.nan if each.log.has_local_norms else each.log.max_norm.last


def _norm_label(plotted: Sequence[PlottedRun]) -> str:
    """Return the label of an axis of norms: the name under which they were logged, if it is the same in all runs."""
    names = {shorten(each.log.norm.title, 40) for each in plotted}
    if all(each.log.norm.is_ours for each in plotted):
        return "total_norm before clipping"
    return names.pop() if len(names) == 1 else "norm of all gradients"
