"""Which pictures a report has, and what is drawn in each."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from clip_callbacks.dashboard.pictures import Chart, Look
from clip_callbacks.dashboard.runs import Series, Steps, Track
from clip_callbacks.dashboard.thinning import COLUMNS, means, peaks, thin

COLORS = ("#3a86c8", "#d97706", "#2f9e6b", "#d1495b", "#9467bd", "#a0714f", "#d670a6", "#7f8b99", "#9a9a2e", "#1b9aaa")
"""Of the runs; each can be told from white and from the dark page."""
MOST = len(COLORS)
BLOCKS = 40
"""Rows of a heat map."""
BINS = 60
DASHED = (0, (4, 2))
ORDERS = 10.0
"""From this ratio on an axis is logarithmic."""


def make_charts(tracks: Sequence[Track], losses: Sequence[dict[str, Series]]) -> list[Chart]:
    """All pictures for which something was logged.

    Args:
        tracks: The runs' optimizers.
        losses: The losses of each of them.
    """
    shown = [track for track in tracks if track.total_norm]
    charts = [_norm_chart(shown), _histogram_chart(shown), _what_if_chart(shown)] if shown else []
    if any(track.clip_coef for track in tracks):
        charts.insert(1, _coefficient_chart([track for track in tracks if track.clip_coef]))
    if any(losses):
        charts.insert(1, _loss_chart(tracks, losses))
    for number, track in enumerate(tracks, 1):
        for blocks, key, what in (
            ({name: series for name, series in track.blocks().items() if series}, "blocks", "Norm of each block's gradient"),
            (
                {name: series for name, series in track.update_ratios.items() if series},
                "updates",
                "Update-to-weight ratio of each block",
            ),
        ):
            if blocks:
                charts.append(_heat_map_chart(track, blocks, f"{key}-{number}", what))
    return charts


def color(tracks: Sequence[Track], track: Track) -> str:
    """The color of a run."""
    return COLORS[tracks.index(track) % MOST]


def _norm_chart(tracks: list[Track]) -> Chart:
    def draw(figure: Figure, look: Look) -> None:
        clips = any(track.clip_fraction for track in tracks)
        norms, *shares = figure.subplots(2 if clips else 1, sharex=True, height_ratios=[3.2, 1] if clips else None, squeeze=False)[
            :, 0
        ]
        for track in tracks:
            hue = color(tracks, track)
            _line(norms, track.total_norm, hue, track.name, f"total_norm-{track.name}")
            if limit := track.max_norm:
                thinned = thin(limit)
                norms.plot(
                    thinned.steps,
                    thinned.middle,
                    color=hue if len(tracks) > 1 else look.ink,
                    linestyle=DASHED,
                    linewidth=1.4,
                    zorder=3,
                    gid=f"max_norm-{track.name}",
                )
            skips = _skip_steps(track)
            if len(skips):
                norms.plot(skips, np.full(len(skips), 0.97), "x", color=hue, markersize=6, markeredgewidth=1.6,
                           transform=norms.get_xaxis_transform(), gid=f"skips-{track.name}", zorder=4)  # fmt: skip
            if shares and track.clip_fraction:
                first, last = int(track.clip_fraction.steps[0]), int(track.clip_fraction.steps[-1])
                columns = min(COLUMNS // 4, len(track.clip_fraction))
                share = means(track.clip_fraction, first, last, columns)
                edges = np.linspace(first, last + 1, columns + 1)
                shares[0].stairs(np.nan_to_num(share), edges, color=hue, fill=len(tracks) == 1, gid=f"clip_fraction-{track.name}")
        if any(track.max_norm for track in tracks):
            norms.plot([], [], color=look.ink, linestyle=DASHED, label="max_norm")
        if any(len(_skip_steps(track)) for track in tracks):
            norms.plot([], [], "x", color=look.ink, label="skipped", markeredgewidth=1.6)
        norms.set(yscale="log", ylabel="total_norm")
        _plain_log(norms.yaxis)
        if shares:
            shares[0].set(ylabel="clipped", ylim=(0, 1.02))
            shares[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _steps_axis((shares or [norms])[-1])
        _legend(norms, look)

    each = "; ".join(
        f"{track.name}: from {track.total_norm.values.min():.3g} to {track.total_norm.values.max():.3g}, "
        f"median {np.median(track.total_norm.values):.3g}, last max_norm {_or_none(track.max_norm.last)}"
        for track in tracks
    )
    return Chart(
        "norm",
        "Norm of the gradient",
        "total_norm before clipping, on a logarithmic axis; what lies above the dashed limit is clipped down to it. A "
        "cross at the top is a "
        "skipped step. Below, the share of steps that were clipped. Of long runs the line is the median of each column of the "
        "picture, and the shade reaches from its smallest to its largest value.",
        f"total_norm over steps. {each}.",
        draw,
        (4.4, 4.4),
    )


def _loss_chart(tracks: Sequence[Track], losses: Sequence[dict[str, Series]]) -> Chart:
    styles: tuple[tuple[int, tuple[float, ...]], ...] = ((0, ()), (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1, 1, 1)))

    def draw(figure: Figure, look: Look) -> None:
        axes = figure.subplots()
        drawn, seen = [], set()
        for track, found in zip(tracks, losses, strict=True):
            if track.run.name in seen:  # one loss for all optimizers of a run
                continue
            seen.add(track.run.name)
            for (key, series), style in zip(found.items(), styles * len(found), strict=False):
                label = key if len(tracks) == 1 else f"{track.run.name}: {key}"
                finite = series.finite
                if finite:
                    drawn.append(finite.values)
                    marker = "o" if len(finite) < 30 else None  # noqa: PLR2004
                    _line(axes, finite, color(tracks, track), label, f"loss-{label}", linestyle=style, marker=marker, markersize=3)
                broken = series.steps[~np.isfinite(series.values)]
                if len(broken):
                    axes.axvline(float(broken[0]), color=color(tracks, track), linestyle=":", label=f"{label} NaN or inf")
        values = np.concatenate(drawn) if drawn else np.ones(1)
        if values.min() > 0 and values.max() / values.min() > ORDERS:
            axes.set_yscale("log")
            _plain_log(axes.yaxis)
        axes.set_ylabel("loss")
        _steps_axis(axes)
        _legend(axes, look)

    each = "; ".join(
        f"{track.run.name}: {key} {_or_none(series.last)} at the end"
        for track, found in zip(tracks, losses, strict=True)
        for key, series in found.items()
    )
    return Chart(
        "loss",
        "Loss",
        "As the module logged it. A dotted line is where it was NaN or inf first.",
        f"Loss over steps. {each}.",
        draw,
    )


def _coefficient_chart(tracks: list[Track]) -> Chart:
    def draw(figure: Figure, look: Look) -> None:
        axes = figure.subplots()
        for track in tracks:
            _line(axes, track.clip_coef, color(tracks, track), track.name, f"clip_coef-{track.name}")
        smallest = min(float(track.clip_coef.values.min()) for track in tracks)
        if 0 < smallest < 1 / ORDERS:
            axes.set_yscale("log")
            _plain_log(axes.yaxis)
        else:
            axes.set_ylim(0, 1.05)
        axes.set_ylabel("clip_coef")
        _steps_axis(axes)
        _legend(axes, look)

    each = "; ".join(
        f"{track.name}: smallest {track.clip_coef.values.min():.3g}, mean {track.clip_coef.values.mean():.3g}" for track in tracks
    )
    caption = "What the gradient was multiplied by: clipped_norm / total_norm. 1: left alone. 0.1: a tenth of its length was kept."
    return Chart("coefficient", "Clipping coefficient", caption, f"clip_coef over steps. {each}.", draw, (2.6, 2.6))


def _histogram_chart(tracks: list[Track]) -> Chart:
    def draw(figure: Figure, look: Look) -> None:
        low = min(float(track.total_norm.values.min()) for track in tracks)
        high = max(float(track.total_norm.values.max()) for track in tracks)
        edges = np.geomspace(low * 0.98, high * 1.02, BINS + 1)
        rows = figure.subplots(len(tracks), sharex=True, squeeze=False)[:, 0]
        for axes, track in zip(rows, tracks, strict=True):
            norms = track.total_norm.values
            counts, _ = np.histogram(norms, edges)
            axes.stairs(counts, edges, fill=True, color=color(tracks, track), alpha=0.75, gid=f"histogram-{track.name}")
            top = counts.max() * 1.3
            for percent, height in ((50, 0.98), (90, 0.86), (99, 0.74)):
                value = float(np.percentile(norms, percent))
                axes.plot([value, value], [0, top * height], color=look.ink, linestyle=":", linewidth=1)
                axes.annotate(
                    f"p{percent} {value:.3g}", (value, top * height), xytext=(3, -8), textcoords="offset points", fontsize=8
                )
            if track.max_norm and low < track.max_norm.last < high:
                axes.axvline(track.max_norm.last, color=look.ink, linestyle=DASHED, linewidth=1.4)
            axes.set(xscale="log", ylim=(0, top), ylabel="logged steps", title=track.name)
            _plain_log(axes.xaxis)
        rows[-1].set_xlabel("total_norm (dashed: max_norm)" if any(track.max_norm for track in tracks) else "total_norm")

    each = "; ".join(
        f"{track.name}: p50 {np.percentile(track.total_norm.values, 50):.3g}, p90 "
        f"{np.percentile(track.total_norm.values, 90):.3g}, "
        f"p99 {np.percentile(track.total_norm.values, 99):.3g}"
        for track in tracks
    )
    caption = "How often each norm occurred, on a logarithmic axis, with percentiles."
    heights = (1.0 + 1.5 * len(tracks), 1.0 + 1.5 * len(tracks))
    return Chart("histogram", "Distribution of norms", caption, f"Histogram of total_norm. {each}.", draw, heights)


def _what_if_chart(tracks: list[Track]) -> Chart:
    def draw(figure: Figure, look: Look) -> None:
        axes = figure.subplots()
        for track in tracks:
            norms, hue = np.sort(track.total_norm.values), color(tracks, track)
            place = np.unique(np.linspace(0, len(norms) - 1, min(COLUMNS, len(norms))).astype(int))
            axes.plot(norms[place], 1 - (place + 1) / len(norms), color=hue, label=track.name, drawstyle="steps-post",
                      gid=f"what_if-{track.name}")  # fmt: skip
            advice = track.advice
            for value, marker in ((track.max_norm.last, "o"), (advice.max_norm if advice else math.nan, "D")):
                if math.isfinite(value):
                    axes.plot([value], [float((norms > value).mean())], marker, color=hue, markersize=6, markeredgecolor=look.ink)
        if any(track.max_norm for track in tracks):
            axes.plot([], [], "o", color=look.faint, markeredgecolor=look.ink, label="max_norm now")
        axes.plot([], [], "D", color=look.faint, markeredgecolor=look.ink, label="suggested")
        axes.set(xscale="log", ylim=(-0.02, 1.02), xlabel="max_norm", ylabel="steps clipped")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _plain_log(axes.xaxis)
        _legend(axes, look)

    each = "; ".join(
        f"{track.name}: "
        f"{', '.join(f'{share:.0%} at {np.quantile(track.total_norm.values, 1 - share):.3g}' for share in (0.5, 0.1, 0.01))}"
        for track in tracks
    )
    caption = (
        "The share of the logged steps that a fixed global max_norm would clip. A circle is the limit at the end of the run, a "
        "diamond the suggestion. Other clipping would have made other steps: read it as a guide."
    )
    return Chart("what_if", "What if max_norm were another?", caption, f"Share of steps clipped over max_norm. {each}.", draw)


def _heat_map_chart(track: Track, blocks: dict[str, Series], key: str, what: str) -> Chart:
    largest = sorted(blocks, key=lambda name: -float(np.quantile(blocks[name].values, 0.99)))[:BLOCKS]
    names = sorted(largest, key=_naturally)
    first = min(int(blocks[name].steps[0]) for name in names)
    last = max(int(blocks[name].steps[-1]) for name in names)
    columns = max(1, min(COLUMNS // 2, max(len(blocks[name]) for name in names)))
    cells = np.array([peaks(blocks[name], first, last, columns) for name in names])
    positive = np.isfinite(cells) & (cells > 0)
    cells[~positive] = np.nan
    bottom = float(np.nanquantile(cells, 0.01)) if positive.any() else 1e-3
    top = float(np.nanmax(cells)) if positive.any() else 1.0

    def draw(figure: Figure, look: Look) -> None:
        axes = figure.subplots()
        image = axes.imshow(
            cells, aspect="auto", interpolation="nearest", norm=LogNorm(min(bottom, top / 2), top), cmap="viridis",
            extent=(first - 0.5, last + 0.5, len(names) - 0.5, -0.5), gid=f"{key}-image",
        )  # fmt: skip
        axes.grid(visible=False)
        limit = 22 if look.narrow else 44
        axes.set_yticks(range(len(names)), [name if len(name) <= limit else f"…{name[1 - limit :]}" for name in names], fontsize=8)
        bar = figure.colorbar(image, ax=axes, pad=0.01, location="bottom" if look.narrow else "right", shrink=0.9)
        long_axis = bar.ax.xaxis if look.narrow else bar.ax.yaxis
        _plain_log(long_axis)
        bar.outline.set_edgecolor(look.faint)
        _steps_axis(axes)

    left_out = f" The {BLOCKS} largest of {len(blocks)} blocks are shown." if len(blocks) > BLOCKS else ""
    medians = ", ".join(f"{name} {np.median(blocks[name].values):.3g}" for name in names[:8])
    height = 1.1 + 0.22 * len(names)
    return Chart(
        key,
        f"{what}: {track.name}",
        f"One row a block, in color the largest value in each column of the picture; white or black gaps: nothing was "
        f"logged.{left_out}",
        f"Heat map over steps. Medians: {medians}.",
        draw,
        (max(height, 1.8), max(height + 0.5, 2.2)),
    )


def _line(axes: Axes, series: Series, hue: str, label: str, gid: str, **options: object) -> None:
    thinned = thin(series)
    axes.plot(thinned.steps, thinned.middle, color=hue, label=label, gid=gid, **options)  # type: ignore[arg-type]
    if not thinned.is_whole:
        axes.fill_between(thinned.steps, thinned.low, thinned.high, color=hue, alpha=0.25, linewidth=0)


def _skip_steps(track: Track) -> Steps:
    """Where to draw crosses: where steps were skipped, a column of the picture one at most."""
    skips = track.skips
    if len(skips) <= COLUMNS // 2:
        return skips
    places = np.linspace(0, len(skips) - 1, COLUMNS // 2).astype(int)
    return np.asarray(skips[places])


def _steps_axis(axes: Axes) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.locator_params(axis="x", nbins=6)
    axes.margins(x=0.01)


def _legend(axes: Axes, look: Look) -> None:
    _, labels = axes.get_legend_handles_labels()
    columns = (48 if look.narrow else 120) // (max(map(len, labels)) + 8)
    legend = axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=max(1, columns), borderaxespad=0.2, handlelength=1.8)
    legend.set_in_layout(True)


def _plain_log(axis: Axis) -> None:
    """Labels such as 0.01 and 30 instead of powers of ten, with 2 and 5 between them where the axis spans little."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if 0 < high < 300 * low else (1.0,), numticks=8))
    axis.set_major_formatter(FuncFormatter(_plainly))
    axis.set_minor_formatter(NullFormatter())


def _plainly(value: float, _: int | None = None) -> str:
    return f"{value:g}" if 1e-4 <= value < 1e5 else f"{value:.0e}"  # noqa: PLR2004


def _naturally(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def _or_none(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "none"
