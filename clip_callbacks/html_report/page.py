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

from clip_callbacks.html_report.axes import PlottedRun
from clip_callbacks.html_report.bad_steps import MIN_NORMS_FOR_SPIKES, BadStep, bad_steps
from clip_callbacks.html_report.charts import MAX_PLOTTED_RUNS, RUN_COLORS, make_charts
from clip_callbacks.html_report.diagnosis import Finding, diagnose, out_of_control
from clip_callbacks.html_report.progress import progress_bar
from clip_callbacks.html_report.rendering import Chart
from clip_callbacks.html_report.runs import OptimizerLog, Run, UnusableLogError
from clip_callbacks.html_report.third_party_norms import conditions, taken_after_clip
from clip_callbacks.stats.advice import Advice, advise

MISSING = "-"


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

    shown: PlottedRun
    findings: list[Finding]
    caution: str | None
    advice: Advice | None
    bad_steps: list[BadStep]
    bad_count: int

    @property
    def log(self) -> OptimizerLog:
        """The optimizer."""
        return self.shown.log

    @property
    def row(self) -> list[str]:
        """Its row in the table of runs."""
        log, norms = self.log, self.log.total_norm
        percentiles = [float(np.percentile(norms.values, percent)) for percent in (50, 90, 99)] if norms else [math.nan] * 3
        share, skipped = log.clipped_share, log.skipped_steps
        losses = [f"{key} {series.values[-1]:.3g}".replace("nan", "NaN") for key, series in list(self.shown.losses.items())[:2]]
        return [
            f"{log.steps:,}",
            *map(number, percentiles),
            number(float(norms.values.max())) if norms else MISSING,
            number(log.max_norm.last),
            MISSING if math.isnan(share) else f"{share:.1%}",
            f"{skipped.last:.0f}" if skipped else MISSING,
            f"{self.advice.max_norm:g}" if self.advice else MISSING,
            f"{len(norms):,}",
            ", ".join(losses) or MISSING,
        ]

    @property
    def nothing_bad(self) -> str:
        """What to say where the table of bad steps is empty."""
        skipped = "No step was skipped." if self.log.norm.is_ours else "Whether steps were skipped is not in the log."
        if len(self.log.total_norm) < MIN_NORMS_FOR_SPIKES:
            return f"{skipped} Too few norms were logged to tell spikes."
        return f"{skipped} No norm stands far out of those around it."

    def yaml(self, *, adaptive: bool = False) -> str:
        """The suggestion for a configuration file."""
        return yaml.safe_dump(self.advice.configuration(adaptive=adaptive), sort_keys=False) if self.advice else ""


LOCAL_NORMS_CONDITION = (
    "This run was clipped by local norms, each block by itself: there max_norm is a block's limit. What is suggested is for the "
    "norm of all gradients (scope: global)."
)

HEADINGS = ("steps", "p50", "p90", "p99", "largest", "max_norm", "clipped", "skipped", "suggested", "norms logged", "last loss")


def number(value: float) -> str:
    """Three digits; a dash for NaN, a word for infinity."""
    if math.isnan(value):
        return MISSING
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
    for log in [log for run in runs for log in run.optimizer_logs]:
        found = log.run.losses(tuple(losses))
        rows, count = bad_steps(log)
        hue, caution = RUN_COLORS[len(sections) % MAX_PLOTTED_RUNS], taken_after_clip(log) or out_of_control(found)
        advice = _advice(log, caution)
        shown = PlottedRun(log, found, hue, advice.max_norm if advice else math.nan)
        sections.append(Section(shown, diagnose(log, found), caution, advice, rows, count))
    return sections


def _advice(log: OptimizerLog, caution: str | None) -> Advice | None:
    """A max_norm; None if no norm was logged, or none is to be trusted."""
    norms = torch.from_numpy(np.array(log.logged_norm.values))
    advice = advise(
        norms,
        out_of_control=caution is not None,
        is_sampled=not log.has_every_step,
        metric=log.norm.title,
        norm_type=log.norm.norm_type,
    )
    if advice is None or taken_after_clip(log) or (caution and not advice.is_from_stable_quarter):
        return None
    local = (LOCAL_NORMS_CONDITION,) if log.has_local_norms else ()
    return replace(advice, reasons=(*advice.reasons, *local, *conditions(log)))


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
    runs = list(dict.fromkeys(section.log.run for section in sections))
    notes = [*notes, *(f"{run.name}: {note}" for run in runs for note in run.notes)]
    if len(sections) > MAX_PLOTTED_RUNS:
        notes.append(f"{MAX_PLOTTED_RUNS} of {len(sections)} runs are shown. Name fewer to see the others.")
    shown = list(sections[:MAX_PLOTTED_RUNS])
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
        runs=len({section.log.run.name for section in sections}),
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
