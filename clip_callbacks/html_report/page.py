"""The report: one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from clip_callbacks.html_report.axes import PlottedRun
from clip_callbacks.html_report.bad_steps import BadStep, bad_steps
from clip_callbacks.html_report.charts import MAX_PLOTTED_RUNS, RUN_COLORS, make_charts
from clip_callbacks.html_report.diagnosis import diagnose
from clip_callbacks.html_report.divergence import out_of_control
from clip_callbacks.html_report.finding import Finding
from clip_callbacks.html_report.losses import TrainingLoss, training_loss
from clip_callbacks.html_report.norm_metrics import MAX_LISTED_METRICS
from clip_callbacks.html_report.progress import progress_bar
from clip_callbacks.html_report.rendering import Chart
from clip_callbacks.html_report.runs import OptimizerLog, Run, UnusableLogError
from clip_callbacks.html_report.series import Series
from clip_callbacks.html_report.spikes import MIN_POINTS_FOR_SPIKES
from clip_callbacks.html_report.third_party_norms import suggestion_conditions, taken_after_clip
from clip_callbacks.stats.advice import Advice, advise
from clip_callbacks.stats.loss_advice import MIN_LOSSES, NONE_FITS, LossAdvice, advise_on_losses

MISSING = "-"
"""Text of a table cell without a value."""


@dataclass(frozen=True)
class Section:
    """The content of the page for one optimizer of a run.

    Args:
        plotted: The optimizer as the plots show it.
        findings: Findings on the optimizer.
        caution: Reason why the norms are no basis for a suggestion; None if there is none.
        advice: Suggested max_norm; None if no norm was logged, or the norms are no basis for one.
        loss_advice: Suggested loss_above; None if too few training losses were logged, or they are no basis for one.
        bad_steps: Rows of the table of bad steps, in the order of the steps.
        bad_count: Number of all bad steps.
    """

    plotted: PlottedRun
    findings: list[Finding]
    caution: str | None
    advice: Advice | None
    loss_advice: LossAdvice | None
    bad_steps: list[BadStep]
    bad_count: int

    @property
    def log(self) -> OptimizerLog:
        """The log of the optimizer."""
        return self.plotted.log

    @property
    def row(self) -> list[str]:
        """The row in the table of runs, one cell for each of ``HEADINGS``."""
        log, norms = self.log, self.log.total_norm
        losses = [f"{key} {series.values[-1]:.3g}".replace("nan", "NaN") for key, series in list(self.plotted.losses.items())[:2]]
        return [
            f"{log.step_count:,}",
            *map(number, _percentiles_and_largest(norms)),
            number(log.max_norm.last),
            number(log.clipped_share, ".1%"),
            number(log.skipped_steps.last, ".0f"),
            number(self.plotted.suggested, "g"),
            f"{len(norms):,}",
            ", ".join(losses) or MISSING,
        ]

    @property
    def no_bad_steps(self) -> str:
        """Sentences that stand in place of an empty table of bad steps."""
        skipped = "No step was skipped."
        if not self.log.skipped_steps:
            skipped = "The log does not tell whether steps were skipped."
        if len(self.log.total_norm) < MIN_POINTS_FOR_SPIKES:
            return f"{skipped} Too few norms were logged to find spikes."
        loss = self.plotted.loss
        if loss is None or len(loss.logged) < MIN_POINTS_FOR_SPIKES:
            return f"{skipped} No logged norm is a spike."
        return f"{skipped} No logged norm is a spike. Neither is a logged value of {loss.name}."

    def yaml(self, *, adaptive: bool = False) -> str:
        """Return the suggestion as YAML for LightningCLI; empty without one."""
        if self.advice is None:
            return ""
        return yaml.safe_dump(self.advice.configuration(adaptive=adaptive), sort_keys=False)

    def loss_yaml(self) -> str:
        """Return the suggested loss_above as YAML for LightningCLI; empty without one."""
        if self.loss_advice is None:
            return ""
        return yaml.safe_dump(self.loss_advice.configuration(), sort_keys=False)

    @property
    def no_loss_advice(self) -> str:
        """Say why no loss_above is suggested although enough losses were logged; empty otherwise."""
        loss = self.plotted.loss
        if self.loss_advice or loss is None or len(loss.logged) < MIN_LOSSES or out_of_control(loss):
            return ""
        return f"No suggestion of a loss_above: {NONE_FITS}"


LOCAL_NORMS_CONDITION = (
    "This run was clipped by local norms: its max_norm is the limit for the norm of one block. The suggestion is a limit for the "
    "norm of all gradients (scope: global)."
)

HEADINGS = (
    "steps",
    "norm\np50",
    "norm\np90",
    "norm\np99",
    "largest\nnorm",
    "last\nmax_norm",
    "clipped\nsteps",
    "skipped\nsteps",
    "suggested\nmax_norm",
    "logged\nnorms",
    "last loss",
)
"""Headings of the table of runs, in two lines to keep the columns narrow."""


def number(value: float, digits: str = ".3g") -> str:
    """Format a number, with three digits unless a format is given; NaN as a dash."""
    if math.isnan(value):
        return MISSING
    return format(value, digits)


def _percentiles_and_largest(norms: Series) -> list[float]:
    """Return p50, p90, p99 and the largest norm; NaN without norms."""
    percents = (50, 90, 99, 100)
    if not norms:
        return [math.nan] * len(percents)
    return [float(np.percentile(norms.values, percent)) for percent in percents]


def make_sections(runs: Sequence[Run], losses: Sequence[str]) -> list[Section]:
    """Make the content of the page for each optimizer of each run.

    Args:
        runs: Runs with at least one norm of all gradients.
        losses: Names of the metrics that are losses; if empty, losses are found by their names.

    Raises:
        UnusableLogError: If no run has one of the ``losses``.
    """
    for key in losses:
        if not any(key in run.metrics for run in runs):
            others = sorted({key for run in runs for key in run.metrics if not key.startswith("grad")})
            listed = ", ".join(others[:MAX_LISTED_METRICS]) or "only metrics of gradients"
            raise UnusableLogError(f"--loss must be a metric of a run, got {key!r}. The logs hold {listed}.")
    sections: list[Section] = []
    for log in [log for run in runs for log in run.optimizer_logs]:
        found = log.run.losses(tuple(losses))
        loss = training_loss(log, found, is_named=bool(losses))
        rows, count = bad_steps(log, loss)
        color, caution = RUN_COLORS[len(sections) % MAX_PLOTTED_RUNS], taken_after_clip(log) or out_of_control(loss)
        advice = _advice(log, caution)
        suggested = math.nan
        if advice:
            suggested = advice.max_norm
        plotted = PlottedRun(log, found, color, suggested, loss)
        sections.append(Section(plotted, diagnose(log, found, loss), caution, advice, _loss_advice(loss), rows, count))
    return sections


def _advice(log: OptimizerLog, caution: str | None) -> Advice | None:
    """Suggest a max_norm; None if no norm was logged, or the norms are no basis for one."""
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
    reasons = [*advice.reasons]
    if log.has_local_norms:
        reasons.append(LOCAL_NORMS_CONDITION)
    return replace(advice, reasons=(*reasons, *suggestion_conditions(log)))


def _loss_advice(loss: TrainingLoss | None) -> LossAdvice | None:
    """Suggest a loss_above; None if too few losses were logged, or they are no basis for one."""
    if loss is None or out_of_control(loss):
        return None
    spikes = [*loss.known, *loss.spikes.points.steps]
    return advise_on_losses(
        torch.from_numpy(np.array(loss.logged.values)),
        torch.from_numpy(np.isin(loss.logged.steps, spikes)),
        metric=loss.name,
        is_ours=loss.is_ours,
        steps_between=loss.logged.steps_between,
    )


def write_report(
    sections: Sequence[Section],
    path: Path,
    *,
    notes: Sequence[str] = (),
    png: Path | None = None,
    title: str = "Gradient report",
) -> list[Path]:
    """Write the page in one piece: if writing fails, an earlier page stays as it is.

    Args:
        sections: Content of the page; the first ten are shown.
        path: File to write.
        notes: Notes for the end of the page, beside those of the runs.
        png: Folder for the plots as PNG files; None writes none.
        title: Heading of the page.

    Returns:
        The files written, the page first.

    Raises:
        OSError: If a file cannot be written.
    """
    runs = list(dict.fromkeys(section.log.run for section in sections))
    notes = [*notes, *(f"{run.name}: {note}" for run in runs for note in run.notes)]
    if len(sections) > MAX_PLOTTED_RUNS:
        notes.append(f"The first {MAX_PLOTTED_RUNS} of {len(sections)} runs are shown. Name fewer logs to see the others.")
    visible = list(sections[:MAX_PLOTTED_RUNS])
    charts = make_charts([section.plotted for section in visible])
    _write(path, _render(visible, charts, notes, title))
    written = [path]
    if png:
        written += _write_pngs(charts, png)
    return written


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
    with progress_bar("Drawing", len(charts), "plot") as bar:
        for chart in charts:
            drawn.append((chart, Markup(chart.svg(narrow=False)), Markup(chart.svg(narrow=True))))
            bar.update()
    suggestions = "Suggested max_norm"
    if any(section.loss_advice for section in sections):
        suggestions += " and loss_above"
    style = files("clip_callbacks.html_report").joinpath("templates/report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(
        title=title,
        sections=sections,
        runs=len({section.log.run.name for section in sections}),
        headings=HEADINGS,
        suggestions=suggestions,
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
    unfinished = path.with_name(f".{path.name}-{uuid4().hex}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
