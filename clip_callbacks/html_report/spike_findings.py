"""Findings on spikes of the norm and of the training loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clip_callbacks.core.wording import plural
from clip_callbacks.html_report.finding import Finding, Severity
from clip_callbacks.html_report.losses import TrainingLoss, exceeds, is_loss_spike, number_in
from clip_callbacks.html_report.runs import OptimizerLog
from clip_callbacks.html_report.series import Series
from clip_callbacks.html_report.spikes import is_norm_spike


def find_spikes(log: OptimizerLog, loss: TrainingLoss | None) -> Iterator[Finding]:
    """List the findings on spikes: those of the loss that the guard found, those of the loss and of the norm in hindsight."""
    if entries := [entry for entry in log.bad_steps if is_loss_spike(entry)]:
        yield _guarded(log, entries)
    if loss and loss.spikes.points:
        yield _logged_losses(log, loss)
    if log.norm_spikes.points:
        yield _logged_norms(log)


def _guarded(log: OptimizerLog, entries: Sequence[Mapping[str, Any]]) -> Finding:
    """Describe the loss spikes in the journal."""
    reported = sum(entry.get("policy") == "warn" for entry in entries)
    highest = max(entries, key=lambda entry: number_in(entry, "loss"))
    at_norms = sum(_norm_stands_out(log, entry) for entry in entries)
    skipped = len(entries) - reported
    severity: Severity = "warn"
    if not reported:
        outcome, severity = "skipped", "note"
    elif not skipped:
        outcome = 'only reported (policy "warn"): the weights have taken these steps'
    else:
        outcome = f'found, {skipped} of them skipped and {reported} only reported (policy "warn")'
    count = len(entries)
    steps = plural(count, "1 step with a spike of the loss was", f"{count:,} steps with a spike of the loss were")
    loss, limit = number_in(highest, "loss"), number_in(highest, "loss_limit")
    text = f"{steps} {outcome}. The highest loss was {loss:.3g} at optimizer step {highest['step']:,}, its limit {limit:.3g}."
    return Finding(severity, f"{text} {_norms_saw(at_norms, count)}")


def _norm_stands_out(log: OptimizerLog, entry: Mapping[str, Any]) -> bool:
    """Return whether the norm of a journalled step was above its limit too or, without a limit, far above the norms around it."""
    step = int(entry["step"])
    if number_in(entry, "limit") < math.inf:
        return exceeds(entry, "total_norm", "limit")
    return step in log.norm_spikes.points.steps or is_norm_spike(number_in(entry, "total_norm"), step, log.total_norm)


def _norms_saw(count: int, of: int) -> str:
    if not count:
        return f"The norm showed {plural(of, 'nothing unusual', 'none of them')}."
    if count == of:
        return f"The norm was far above its usual size {plural(of, 'too', 'at all of them too')}."
    return f"The norm was far above its usual size at {count} of them."


def _logged_losses(log: OptimizerLog, loss: TrainingLoss) -> Finding:
    found = loss.spikes.points
    step, value, height = loss.spikes.worst
    at_norms = int(np.isin(found.steps, log.norm_spikes.points.steps).sum())
    return Finding(
        "note",
        f"{len(found):,} of {len(loss.logged):,} logged values of {loss.name} {_are_spikes(found)}, far above those of the steps "
        f"before and after. The most extreme is {value:.3g} at optimizer step {step:,}, {height:.3g} robust standard deviations "
        f"above them. {_norms_saw(at_norms, len(found))}",
    )


def _logged_norms(log: OptimizerLog) -> Finding:
    found = log.norm_spikes.points
    step, norm, times = log.norm_spikes.worst
    return Finding(
        "note",
        f"{len(found):,} of {len(log.total_norm):,} logged norms {_are_spikes(found)}, far above the norms of neighbouring steps. "
        f"The most extreme is {norm:.3g} at optimizer step {step:,}, {times:.3g} times the median of its neighbours.",
    )


def _are_spikes(found: Series) -> str:
    return plural(len(found), "is a spike", "are spikes")
