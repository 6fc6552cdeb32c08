"""Find the bad steps of a run: optimizer steps that were skipped, whose norm is not finite, or that are spikes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from clip_callbacks.core.metric_names import BAD_TENSOR_KEYS
from clip_callbacks.html_report.runs import OptimizerLog
from clip_callbacks.html_report.series import Series, Values
from clip_callbacks.stats.advice import robust_sigma

SPIKE_SIGMAS = 4.0
"""A norm is a spike if it is this many robust standard deviations above the median of its neighbours, in logarithms."""
SPIKE_WINDOW_NORMS = 31
"""Number of logged norms in the window around a norm that it is compared with, itself included."""
MIN_NORMS_FOR_SPIKES = 20
"""With fewer logged norms spikes cannot be told from ordinary norms."""
MAX_ROWS_PER_KIND = 20
"""The number of table rows for skipped steps, and as many for spikes."""
MAX_TENSORS_PER_ROW = 4
"""The number of tensors that a table row names."""
POLICY_OUTCOMES = {
    "skip": "skipped",
    "zero": "zeroed",
    "microbatch": "micro-batch dropped",
    "raise": "raised",
    "rollback": "rolled back",
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


def bad_steps(log: OptimizerLog) -> tuple[list[BadStep], int]:
    """Return the rows of the table of bad steps in the order of the steps, and the number of all bad steps.

    The rows are the journal's entries, or without a journal the skips in the metrics; logged norms that are not finite; and the
    largest spikes that are not in the journal.
    """
    bad = [_journal_row(entry) for entry in log.bad_steps] or _logged_skips(log)
    logged = log.logged_norm
    bad += [
        BadStep(int(step), "norm not finite", math.nan, "", "")
        for step in logged.steps[~np.isfinite(logged.values)][:MAX_ROWS_PER_KIND]
    ]
    outliers, times = spikes(log)
    is_new = ~np.isin(outliers.steps, [row.step for row in bad])  # the guard may have skipped a spike
    outliers, times = Series(outliers.steps[is_new], outliers.values[is_new]), times[is_new]
    limits = log.max_norm.at(outliers.steps)
    largest = [
        _spike_row(log, int(outliers.steps[place]), float(outliers.values[place]), float(times[place]), float(limits[place]))
        for place in np.argsort(-times, kind="stable")[:MAX_ROWS_PER_KIND]
    ]
    return sorted([*bad[:MAX_ROWS_PER_KIND], *largest], key=lambda row: row.step), len(bad) + len(outliers)


def spikes(log: OptimizerLog) -> tuple[Series, Values]:
    """Find logged norms that are far above those of neighbouring steps.

    A spike is four robust standard deviations (of at least 5 %) above the median of the window around it, in logarithms.

    Returns:
        The spikes, and the ratio of each to the median of its window, shape ``(n,)``.
    """
    norms = log.total_norm
    if len(norms) < MIN_NORMS_FOR_SPIKES:
        return Series.empty(), np.empty(0)
    logs = np.log(norms.values)
    above = logs - pd.Series(logs).rolling(SPIKE_WINDOW_NORMS, center=True, min_periods=1).median().to_numpy()
    stands_out = above > SPIKE_SIGMAS * robust_sigma(torch.from_numpy(above))
    return Series(norms.steps[stands_out], norms.values[stands_out]), np.exp(above[stands_out])


def named_tensors(entry: Mapping[str, Any]) -> list[str]:
    """List the tensors that an entry of the journal names: those that were bad before the step first, then by their gradients."""
    return list(dict.fromkeys(str(each.get("name", "?")) for kind in BAD_TENSOR_KEYS for each in entry.get(kind) or []))


def _journal_row(entry: Mapping[str, Any]) -> BadStep:
    stage, names, norm = str(entry.get("stage", "unknown")), named_tensors(entry), entry.get("total_norm")
    listed = ", ".join(names[:MAX_TENSORS_PER_ROW]) + (
        f" and {len(names) - MAX_TENSORS_PER_ROW} more" if len(names) > MAX_TENSORS_PER_ROW else ""
    )
    place = ", ".join(f"{key} {entry[key]}" for key in ("epoch", "batch", "rank") if key in entry)
    is_spike, policy = stage == "spike", str(entry.get("policy", "bad"))
    outcome = "skipped as a spike" if is_spike else POLICY_OUTCOMES.get(policy, policy)
    known = float(norm) if isinstance(norm, (int, float)) else math.nan
    if is_spike:
        details = listed and f"largest gradients: {listed}"
    elif policy == "rollback":
        details = stage
    else:
        details = f'stage "{stage}"' + (listed and f"; not finite: {listed}")
    return BadStep(int(entry["step"]), outcome, known, place, details)


def _logged_skips(log: OptimizerLog) -> list[BadStep]:
    return [
        BadStep(int(step), "skipped", math.nan, "", f"{count:.0f} skipped since the last logged step (no journal beside the log)")
        for step, count in zip(*log.skips, strict=True)
    ]


def _spike_row(log: OptimizerLog, step: int, norm: float, times: float, limit: float) -> BadStep:
    details = f"{times:.3g} times the median of neighbouring steps"
    if limit < norm:
        details += f"; clipped by max_norm {limit:.3g}"
    elif log.norm.is_ours:  # logs of other code do not tell
        details += "; not clipped"
    return BadStep(step, "spike", norm, "", details)
