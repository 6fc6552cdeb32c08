"""Which pictures a report has, and what is drawn in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from clip_callbacks.html_report.axes import DASHED, Shown, draw_line, name_lines, number_plainly, over_steps, short
from clip_callbacks.html_report.downsampling import COLUMNS, shares, thin
from clip_callbacks.html_report.heat_map import heat_map
from clip_callbacks.html_report.rendering import Chart, Look
from clip_callbacks.html_report.series import Series, Steps

COLORS = ("#3a86c8", "#d97706", "#2f9e6b", "#d1495b", "#9467bd", "#a0714f", "#d670a6", "#7f8b99", "#9a9a2e", "#1b9aaa")
"""Of the runs; each can be told from white and from the dark page."""
MOST = len(COLORS)
BINS = 60
FEW = 30
"""Points that are marked, not only joined by a line."""
ORDERS = 10.0
"""From this ratio on an axis is logarithmic."""
STYLES: tuple[tuple[int, tuple[float, ...]], ...] = ((0, ()), (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1, 1, 1)))
"""Of several losses of a run."""


def make_charts(shown: Sequence[Shown]) -> list[Chart]:
    """All pictures for which something was logged."""
    measured = [each for each in shown if each.track.total_norm]
    charts = [_norm_chart(measured)] if measured else []
    charts += [_loss_chart(shown)] if any(each.losses for each in shown) else []
    clipping = [each for each in shown if each.track.clip_coef]
    charts += [_coefficient_chart(clipping)] if clipping else []
    charts += [_histogram_chart(measured), _what_if_chart(measured)] if measured else []
    for number, each in enumerate(shown, 1):
        for key, what, blocks in (
            ("blocks", "Norm of each block's gradient", each.track.blocks()),
            ("updates", "Update-to-weight ratio of each block", each.track.update_ratios),
        ):
            if logged := {name: series for name, series in blocks.items() if series}:
                charts.append(heat_map(logged, f"{key}-{number}", f"{what}: {each.track.name}"))
    return charts


def _norm_chart(shown: list[Shown]) -> Chart:
    clips = any(each.track.clip_fraction for each in shown)

    def draw(figure: Figure, look: Look) -> None:
        grid = figure.subplots(2 if clips else 1, sharex=True, height_ratios=[3.2, 1] if clips else None, squeeze=False)
        norms, *strips = grid[:, 0]
        for each in shown:
            draw_line(norms, each.track.total_norm, each.color, each.label, f"total_norm-{each.track.name}")
            _mark_steps(norms, each, look.ink if len(shown) == 1 else each.color, look)
            for strip in strips if each.track.clip_fraction else ():
                share = each.track.clip_fraction
                edges, values = shares(share, min(COLUMNS // 4, len(share)))
                strip.stairs(values, edges, color=each.color, fill=len(shown) == 1, gid=f"clip_fraction-{each.track.name}")
        for style, marker, label, is_there in (
            (DASHED, "", "max_norm", any(each.track.max_norm for each in shown)),
            ("", ".", "clipped", any(len(_clipped(each).steps) for each in shown)),
            ("", "x", "skipped", any(len(each.track.skips[0]) for each in shown)),
        ):
            if is_there:
                norms.plot([], [], color=look.ink, linestyle=style, marker=marker, label=label)
        norms.set(yscale="log", ylabel=_axis(shown))
        number_plainly(norms.yaxis)
        for strip in strips:
            strip.set(ylabel="clipped", ylim=(0, 1.02))
            strip.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        over_steps((strips or [norms])[-1])
        name_lines(norms, look)

    spans = "; ".join(
        f"{each.track.name}: from {each.track.total_norm.values.min():.3g} to {each.track.total_norm.values.max():.3g}, "
        f"median {np.median(each.track.total_norm.values):.3g}, last max_norm {_or_none(each.track.max_norm.last)}"
        for each in shown
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
        ours if any(each.track.norm.is_ours for each in shown) else theirs,
        f"{_axis(shown)} over steps. {spans}.",
        draw,
        (4.4, 4.4),
    )


def _mark_steps(axes: Axes, each: Shown, limit_color: str, look: Look) -> None:
    """The limit, dots on steps that were clipped, crosses above those that were skipped."""
    name = each.track.name
    if each.track.max_norm:
        limit = thin(each.track.max_norm)
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
        axes.plot(clipped.steps, clipped.values, ".", color=look.ink, markersize=3, zorder=4, gid=f"clipped-{name}", label="_child")
    skips = _spread(each.track.skips[0])
    if len(skips):
        options: dict[str, Any] = {"markersize": 6, "markeredgewidth": 1.6, "transform": axes.get_xaxis_transform(), "zorder": 4}
        axes.plot(skips, np.full(len(skips), 0.97), "x", color=each.color, gid=f"skips-{name}", label="_child", **options)


def _clipped(each: Shown) -> Series:
    """The norms logged at steps that were clipped; none of a run too long to draw each of them."""
    norms = each.track.total_norm
    if not thin(norms).is_whole or not each.track.clip_coef:
        return Series.empty()
    is_clipped = np.isin(norms.steps, each.track.clip_coef.steps[each.track.clip_coef.values < 1])
    return Series(norms.steps[is_clipped], norms.values[is_clipped])


def _spread(steps: Steps) -> Steps:
    """Some of the steps, if there are too many to be drawn."""
    if len(steps) <= COLUMNS // 2:
        return steps
    places = np.linspace(0, len(steps) - 1, COLUMNS // 2).astype(int)
    return np.asarray(steps[places])


def _loss_chart(shown: Sequence[Shown]) -> Chart:
    runs = list({each.track.run.name: each for each in shown}.values())  # one loss for all optimizers of a run
    lines = [
        (each, key if len(runs) == 1 else f"{each.label}: {key}", series, style)
        for each in runs
        for (key, series), style in zip(each.losses.items(), STYLES * len(each.losses), strict=False)
    ]

    def draw(figure: Figure, look: Look) -> None:
        axes = figure.subplots()
        for each, label, series, style in lines:
            if finite := series.finite:
                marker = "o" if len(finite) < FEW else None
                draw_line(axes, finite, each.color, label, f"loss-{label}", linestyle=style, marker=marker, markersize=3)
            broken = series.steps[~np.isfinite(series.values)]
            if len(broken):
                axes.axvline(float(broken[0]), color=each.color, linestyle=":", label=f"{label} NaN or inf")
        values = np.concatenate([series.finite.values for _, _, series, _ in lines])
        if len(values) and values.min() > 0 and values.max() > ORDERS * values.min():
            axes.set_yscale("log")
            number_plainly(axes.yaxis)
        axes.set_ylabel("loss")
        over_steps(axes)
        name_lines(axes, look)

    ends = "; ".join(f"{label} {_or_none(series.last)} at the end" for _, label, series, _ in lines)
    caption = "As the module logged it. A dotted line is where it was NaN or inf first."
    return Chart("loss", "Loss", caption, f"Loss over steps. {ends}.", draw)


def _coefficient_chart(shown: list[Shown]) -> Chart:
    smallest = min(float(each.track.clip_coef.values.min()) for each in shown)

    def draw(figure: Figure, look: Look) -> None:
        axes = figure.subplots()
        for each in shown:
            draw_line(axes, each.track.clip_coef, each.color, each.label, f"clip_coef-{each.track.name}")
        if 0 < smallest < 1 / ORDERS:
            axes.set_yscale("log")
            number_plainly(axes.yaxis)
        else:
            axes.set_ylim(0, 1.05)
        axes.set_ylabel("clip_coef")
        over_steps(axes)
        name_lines(axes, look)

    means = "; ".join(
        f"{each.track.name}: smallest {each.track.clip_coef.values.min():.3g}, mean {each.track.clip_coef.values.mean():.3g}"
        for each in shown
    )
    caption = "What the gradient was multiplied by: clipped_norm / total_norm. 1: left alone. 0.1: a tenth of its length was kept."
    return Chart("coefficient", "Clipping coefficient", caption, f"clip_coef over steps. {means}.", draw, (2.6, 2.6))


def _histogram_chart(shown: list[Shown]) -> Chart:
    low = min(float(each.track.total_norm.values.min()) for each in shown)
    high = max(float(each.track.total_norm.values.max()) for each in shown)
    has_limit = any(each.track.max_norm for each in shown)

    def draw(figure: Figure, look: Look) -> None:
        edges = np.geomspace(low * 0.98, high * 1.02, BINS + 1)
        rows = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
        for axes, each in zip(rows, shown, strict=True):
            norms, limit = each.track.total_norm.values, each.track.max_norm.last
            counts, _ = np.histogram(norms, edges)
            axes.stairs(counts, edges, fill=True, color=each.color, alpha=0.75, gid=f"histogram-{each.track.name}")
            top = counts.max() * 1.3
            for percent, height in ((50, 0.98), (90, 0.86), (99, 0.74)):
                value = float(np.percentile(norms, percent))
                axes.plot([value, value], [0, top * height], color=look.ink, linestyle=":", linewidth=1)
                text = f"p{percent} {value:.3g}"
                axes.annotate(text, (value, top * height), xytext=(3, -8), textcoords="offset points", fontsize=8)
            if low < limit < high:
                axes.axvline(limit, color=look.ink, linestyle=DASHED, linewidth=1.4)
            axes.set(xscale="log", ylim=(0, top), ylabel="logged steps", title=each.label)
            number_plainly(axes.xaxis)
        rows[-1].set_xlabel(f"{_axis(shown)} (dashed: max_norm)" if has_limit else _axis(shown))

    percentiles = "; ".join(
        f"{each.track.name}: "
        + ", ".join(f"p{percent} {np.percentile(each.track.total_norm.values, percent):.3g}" for percent in (50, 90, 99))
        for each in shown
    )
    caption = "How often each norm occurred, on a logarithmic axis, with percentiles."
    height = 1.0 + 1.5 * len(shown)
    return Chart(
        "histogram", "Distribution of norms", caption, f"Histogram of {_axis(shown)}. {percentiles}.", draw, (height, height)
    )


def _what_if_chart(shown: list[Shown]) -> Chart:
    has_limit, has_advice = any(each.track.max_norm for each in shown), any(math.isfinite(each.suggested) for each in shown)

    def draw(figure: Figure, look: Look) -> None:
        axes = figure.subplots()
        for each in shown:
            norms = np.sort(each.track.total_norm.values)
            place = np.unique(np.linspace(0, len(norms) - 1, min(COLUMNS, len(norms))).astype(int))
            above = 1 - (place + 1) / len(norms)
            axes.plot(
                norms[place], above, color=each.color, label=each.label, drawstyle="steps-post", gid=f"what_if-{each.track.name}"
            )
            for value, marker in ((each.track.max_norm.last, "o"), (each.suggested, "D")):
                if math.isfinite(value):
                    share = float((norms > value).mean())
                    axes.plot([value], [share], marker, color=each.color, markersize=6, markeredgecolor=look.ink, label="_child")
        for marker, label, is_there in (("o", "max_norm now", has_limit), ("D", "suggested", has_advice)):
            if is_there:
                axes.plot([], [], marker, color=look.faint, markeredgecolor=look.ink, label=label)
        axes.set(xscale="log", ylim=(-0.02, 1.02), xlabel="max_norm", ylabel="steps clipped")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        number_plainly(axes.xaxis)
        name_lines(axes, look)

    clipped = "; ".join(
        f"{each.track.name}: "
        + ", ".join(f"{share:.0%} at {np.quantile(each.track.total_norm.values, 1 - share):.3g}" for share in (0.5, 0.1, 0.01))
        for each in shown
    )
    caption = (
        "The share of the logged steps that a fixed global max_norm would clip. A circle is the limit at the end of the run, a "
        "diamond the suggestion. Other clipping would have made other steps: read it as a guide."
    )
    return Chart("what_if", "What if max_norm were another?", caption, f"Share of steps clipped over max_norm. {clipped}.", draw)


def _axis(shown: Sequence[Shown]) -> str:
    """What an axis of norms is called: as they were logged, if all were logged under one name."""
    names = {short(each.track.norm.title, 40) for each in shown}
    return names.pop() if len(names) == 1 else "norm"


def _or_none(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "none"
