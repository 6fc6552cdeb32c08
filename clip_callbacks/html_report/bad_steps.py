"""Find the bad steps of a run: optimizer steps that were skipped, whose norm is not finite, or that are spikes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_callbacks.core.metric_names import BAD_TENSOR_KEYS
from clip_callbacks.core.wording import listed
from clip_callbacks.html_report.losses import TrainingLoss, number_in
from clip_callbacks.html_report.runs import OptimizerLog
from clip_callbacks.html_report.spikes import NO_SPIKES, Spikes

MAX_ROWS_PER_KIND = 20
"""The number of table rows for skipped steps, and as many for spikes of the norm and for those of the loss."""
MAX_TENSORS_PER_ROW = 4
"""The number of tensors that a table row names."""
POLICY_OUTCOMES = {
    "skip": "skipped",
    "zero": "zeroed",
    "microbatch": "micro-batch dropped",
    "raise": "raised",
    "rollback": "rolled back",
    "warn": "reported, not skipped",
}
"""Outcome of a bad step under each policy of the guard."""


@dataclass(frozen=True)
class BadStep:
    """A row of the table of bad steps.

    Args:
        step: The optimizer step, counted from 0.
        outcome: Outcome of the step: "skipped", "spike" and so on.
        norm: The total_norm; NaN if it was not finite or is not known.
        where: Epoch, batch and rank, if they are known.
        details: Stage and names of non-finite tensors, or what else is known.
    """

    step: int
    outcome: str
    norm: float
    where: str
    details: str


def bad_steps(log: OptimizerLog, loss: TrainingLoss | None = None) -> tuple[list[BadStep], int]:
    """Return the rows of the table of bad steps in the order of the steps, and the number of all bad steps.

    The rows are the journal's entries, or without a journal the skips in the metrics; logged norms that are not finite; and the
    largest spikes of the norm and of the training loss that are not in the journal.
    """
    bad = [_journal_row(entry) for entry in log.bad_steps] or _logged_skips(log)
    broken = log.logged_norm.not_finite.steps[:MAX_ROWS_PER_KIND]
    bad += [BadStep(int(step), "norm not finite", math.nan, "", "") for step in broken]
    norms = log.norm_spikes.without([row.step for row in bad])  # the guard may have skipped a spike
    losses = NO_SPIKES
    if loss:
        losses = loss.spikes.without([row.step for row in bad])
    both = set(norms.points.steps.tolist()) & set(losses.points.steps.tolist())
    rows = [*bad[:MAX_ROWS_PER_KIND], *_norm_rows(log, norms, losses)]
    if loss:
        rows += _loss_rows(log, loss.name, losses.without([row.step for row in rows]))
    return sorted(rows, key=lambda row: row.step), len(bad) + len(norms.points) + len(losses.points) - len(both)


def named_tensors(entry: Mapping[str, Any]) -> list[str]:
    """List the tensors that an entry of the journal names: those that were bad before the step first, then by their gradients."""
    return list(dict.fromkeys(str(each.get("name", "?")) for kind in BAD_TENSOR_KEYS for each in entry.get(kind) or []))


def _journal_row(entry: Mapping[str, Any]) -> BadStep:
    stage, policy = str(entry.get("stage", "unknown")), str(entry.get("policy", "bad"))
    place = ", ".join(f"{key} {entry[key]}" for key in ("global_step", "epoch", "batch", "rank") if key in entry)
    outcome = POLICY_OUTCOMES.get(policy, policy)
    if stage == "spike":
        outcome = "skipped as a spike"
        if policy == "warn":
            outcome = f"spike, {POLICY_OUTCOMES[policy]}"
        details = _spike_details(entry)
    elif policy == "rollback":
        details = stage
    else:
        details = f'stage "{stage}"'
        if names := named_tensors(entry):
            details += f"; not finite: {listed(names, MAX_TENSORS_PER_ROW)}"
    return BadStep(int(entry["step"]), outcome, number_in(entry, "total_norm"), place, details)


def _spike_details(entry: Mapping[str, Any]) -> str:
    """Return the loss and the thresholds of a spike, where they are known, and the largest gradients."""
    parts = []
    for name, key, limit in (("loss", "loss", "loss_limit"), ("norm", "total_norm", "limit")):
        value, threshold = number_in(entry, key), number_in(entry, limit)
        if math.isfinite(value) and math.isfinite(threshold):
            side = "within"
            if value > threshold:
                side = "above"
            # a norm alone is in its column, and is why the step is here
            if name == "loss" or "loss" in entry:
                parts.append(f"{name} {value:.3g} {side} its limit {threshold:.3g}")
        elif math.isfinite(value) and name == "loss":
            parts.append(f"loss {value:.3g}")
    if names := named_tensors(entry):
        parts.append(f"largest gradients: {listed(names, MAX_TENSORS_PER_ROW)}")
    return "; ".join(parts)


def _logged_skips(log: OptimizerLog) -> list[BadStep]:
    return [
        BadStep(int(step), "skipped", math.nan, "", f"{count:.0f} skipped since the last logged step (no journal beside the log)")
        for step, count in zip(*log.skips, strict=True)
    ]


def _norm_rows(log: OptimizerLog, norms: Spikes, losses: Spikes) -> list[BadStep]:
    """Return the rows of the largest spikes of the norm; a spike of the loss at the same step is told of in its details."""
    highest = norms.highest(MAX_ROWS_PER_KIND)
    limits = log.max_norm.at(highest.points.steps)
    rows = []
    for step, norm, times, limit in zip(highest.points.steps, highest.points.values, highest.height, limits, strict=True):
        details = f"{times:.3g} times the median of neighbouring steps"
        if limit < norm:
            details += f"; clipped by max_norm {limit:.3g}"
        elif limit >= norm:  # without a max_norm in the log, other code may have clipped
            details += f"; within max_norm {limit:.3g}"
        if step in losses.points.steps:
            details += f"; the loss {losses.points.at(np.array([step]))[0]:.3g} is a spike too"
        rows.append(BadStep(int(step), "spike", float(norm), "", details))
    return rows


def _loss_rows(log: OptimizerLog, name: str, losses: Spikes) -> list[BadStep]:
    """Return the rows of the largest spikes of the loss."""
    highest = losses.highest(MAX_ROWS_PER_KIND)
    rows = []
    for step, loss, height in zip(highest.points.steps, highest.points.values, highest.height, strict=True):
        norm = log.total_norm.between(step, step)
        details = f"{name} {loss:.3g}, {height:.3g} robust standard deviations above neighbouring steps"
        rows.append(BadStep(int(step), "loss spike", norm.last, "", details))
    return rows
