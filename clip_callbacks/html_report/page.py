"""The report: one page that needs nothing but itself."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from clip_callbacks.html_report.axes import Shown
from clip_callbacks.html_report.bad_steps import FEWEST, BadStep, bad_steps
from clip_callbacks.html_report.charts import COLORS, MOST, make_charts
from clip_callbacks.html_report.diagnosis import Finding, diagnose, out_of_control
from clip_callbacks.html_report.progress import progress_bar
from clip_callbacks.html_report.rendering import Chart
from clip_callbacks.html_report.runs import Run, Track, UnusableLogError
from clip_callbacks.html_report.third_party_norms import provisos, taken_after_clip
from clip_callbacks.stats.advice import Advice, advise

NONE = "-"


@dataclass(frozen=True)
class Section:
    """What the page says of one optimizer of a run.

    Args:
        shown: The optimizer, as in the pictures.
        findings: Sentences on it.
        caution: Why its norms are not to be trusted, if so.
        advice: A max_norm for it; None where no norm was logged, or none is to be trusted.
        bad_steps: The worst steps, in order.
        bad_count: How many there were.
    """

    shown: Shown
    findings: list[Finding]
    caution: str | None
    advice: Advice | None
    bad_steps: list[BadStep]
    bad_count: int

    @property
    def track(self) -> Track:
        """The optimizer."""
        return self.shown.track

    @property
    def row(self) -> list[str]:
        """Its row in the table of runs."""
        track, norms = self.track, self.track.total_norm
        percentiles = [float(np.percentile(norms.values, percent)) for percent in (50, 90, 99)] if norms else [math.nan] * 3
        share, skipped = track.share_clipped, track.skipped_steps
        losses = [f"{key} {series.values[-1]:.3g}".replace("nan", "NaN") for key, series in list(self.shown.losses.items())[:2]]
        return [
            f"{track.steps:,}",
            *map(number, percentiles),
            number(float(norms.values.max())) if norms else NONE,
            number(track.max_norm.last),
            NONE if math.isnan(share) else f"{share:.1%}",
            f"{skipped.last:.0f}" if skipped else NONE,
            f"{self.advice.max_norm:g}" if self.advice else NONE,
            f"{len(norms):,}",
            ", ".join(losses) or NONE,
        ]

    @property
    def nothing_bad(self) -> str:
        """What to say where the table of bad steps is empty."""
        skipped = "No step was skipped." if self.track.norm.is_ours else "Whether steps were skipped is not in the log."
        if len(self.track.total_norm) < FEWEST:
            return f"{skipped} Too few norms were logged to tell spikes."
        return f"{skipped} No norm stands far out of those around it."

    def yaml(self, *, adaptive: bool = False) -> str:
        """The suggestion for a configuration file."""
        return yaml.safe_dump(self.advice.configuration(adaptive=adaptive), sort_keys=False) if self.advice else ""


LOCAL = (
    "This run was clipped by local norms, each block by itself: there max_norm is a block's limit. What is suggested is for the "
    "norm of all gradients (scope: global)."
)

HEADINGS = ("steps", "p50", "p90", "p99", "largest", "max_norm", "clipped", "skipped", "suggested", "norms logged", "last loss")


def number(value: float) -> str:
    """Three digits; a dash for NaN, a word for infinity."""
    if math.isnan(value):
        return NONE
    return f"{value:.3g}"


def make_sections(runs: Sequence[Run], losses: Sequence[str]) -> list[Section]:
    """What there is to say of each optimizer of each run.

    Args:
        runs: The runs.
        losses: Names of metrics that are losses; none: those whose names say so.

    Raises:
        UnusableLogError: If no run has a loss that was asked for.
    """
    for key in losses:
        if not any(key in run.metrics for run in runs):
            others = sorted({key for run in runs for key in run.metrics if not key.startswith("grad")})
            raise UnusableLogError(f"no run has a metric {key!r}; there are {', '.join(others[:12]) or 'none but ours'}.")
    sections: list[Section] = []
    for track in [track for run in runs for track in run.tracks]:
        found = track.run.losses(tuple(losses))
        rows, count = bad_steps(track)
        hue, caution = COLORS[len(sections) % MOST], taken_after_clip(track) or out_of_control(found)
        advice = _advice(track, caution)
        shown = Shown(track, found, hue, advice.max_norm if advice else math.nan)
        sections.append(Section(shown, diagnose(track, found), caution, advice, rows, count))
    return sections


def _advice(track: Track, caution: str | None) -> Advice | None:
    """A max_norm; None if no norm was logged, or none is to be trusted."""
    norms = torch.from_numpy(np.array(track.logged_norm.values))
    advice = advise(
        norms,
        out_of_control=caution is not None,
        is_sampled=not track.has_every_step,
        metric=track.norm.title,
        norm_type=track.norm.norm_type,
    )
    if advice is None or taken_after_clip(track) or (caution and not advice.is_of_calm_part):
        return None
    local = (LOCAL,) if track.is_local else ()
    return replace(advice, reasons=(*advice.reasons, *local, *provisos(track)))


def write_report(
    sections: Sequence[Section],
    path: Path,
    *,
    notes: Sequence[str] = (),
    png: Path | None = None,
    title: str = "Gradient report",
) -> list[Path]:
    """Write the page, whole or not at all.

    Args:
        sections: What is to be shown; the first ten are.
        path: Of the page.
        notes: What else is to be said at its end, beside the readers' notes.
        png: A folder for the pictures as PNG files, if they are wanted.
        title: The page's heading.

    Returns:
        The files written.

    Raises:
        OSError: If it cannot be written.
    """
    runs = list(dict.fromkeys(section.track.run for section in sections))
    notes = [*notes, *(f"{run.name}: {note}" for run in runs for note in run.notes)]
    if len(sections) > MOST:
        notes.append(f"{MOST} of {len(sections)} runs are shown. Name fewer to see the others.")
    shown = list(sections[:MOST])
    charts = make_charts([section.shown for section in shown])
    _write(path, _render(shown, charts, notes, title))
    return [path, *(_write_pngs(charts, png) if png else ())]


def _render(sections: list[Section], charts: list[Chart], notes: Sequence[str], title: str) -> str:
    from clip_callbacks._version import __version__

    environment = Environment(
        loader=PackageLoader("clip_callbacks.html_report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["number"] = number
    drawn = []
    with progress_bar("Drawing", len(charts), "picture") as bar:
        for chart in charts:
            drawn.append((chart, Markup(chart.svg(narrow=False)), Markup(chart.svg(narrow=True))))
            bar.update()
    style = files("clip_callbacks.html_report").joinpath("templates/report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(
        title=title,
        sections=sections,
        runs=len({section.track.run.name for section in sections}),
        headings=HEADINGS,
        charts=drawn,
        notes=notes,
        style=Markup(style),
        version=__version__,
        now=datetime.now().astimezone(),
    )


def _write_pngs(charts: list[Chart], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [chart.write_png(folder) for chart in charts]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
