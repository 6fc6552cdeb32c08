"""Which steps were bad: skipped, not finite, or far out of those around them."""

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
"""Robust standard deviations above the median around it, in logarithms, from which a norm is a spike."""
SPIKE_WINDOW_NORMS = 31
"""Logged norms that a norm is compared with: itself, and as many before as after."""
MIN_NORMS_FOR_SPIKES = 20
"""Fewer norms than these tell nothing of spikes."""
MAX_ROWS_PER_KIND = 20
"""Rows of the table for what was skipped, and for spikes."""
MAX_TENSORS_PER_ROW = 4
"""Offenders that a row names."""
POLICY_OUTCOMES = {"skip": "skipped", "zero": "zeroed", "microbatch": "micro-batch dropped", "raise": "raised"}
"""What the guard's policies do."""


@dataclass(frozen=True)
class BadStep:
    """A row of the table of bad steps.

    Args:
        step: The optimizer step, 0 at the start.
        what: "skipped", "spike" and so on.
        norm: total_norm; NaN if it was not finite or is not known.
        where: Epoch and batch and rank, as far as known.
        offenders: Which parameters, buffers and so on, or what else is known.
    """

    step: int
    what: str
    norm: float
    where: str
    offenders: str


def bad_steps(log: OptimizerLog) -> tuple[list[BadStep], int]:
    """Rows for the table of bad steps, in order, and how many there are.

    They are the journal's, else the skips that were logged; norms logged that are not finite; and the largest spikes.
    """
    bad = [_journal_row(entry) for entry in log.bad_steps] or _logged_skips(log)
    logged = log.logged_norm
    bad += [
        BadStep(int(step), "norm not finite", math.nan, "", "")
        for step in logged.steps[~np.isfinite(logged.values)][:MAX_ROWS_PER_KIND]
    ]
    outliers, times = spikes(log)
    limits = log.max_norm.at(outliers.steps)
    largest = [
        _spike_row(log, int(outliers.steps[place]), float(outliers.values[place]), float(times[place]), float(limits[place]))
        for place in np.argsort(-times, kind="stable")[:MAX_ROWS_PER_KIND]
    ]
    return sorted([*bad[:MAX_ROWS_PER_KIND], *largest], key=lambda row: row.step), len(bad) + len(outliers)


def spikes(log: OptimizerLog) -> tuple[Series, Values]:
    """Logged norms that are four robust standard deviations (of 5 % at least) above the median around them, in logarithms.

    Returns:
        The norms, and how many times that median each is, shape ``(n,)``.
    """
    norms = log.total_norm
    if len(norms) < MIN_NORMS_FOR_SPIKES:
        return Series.empty(), np.empty(0)
    logs = np.log(norms.values)
    above = logs - pd.Series(logs).rolling(SPIKE_WINDOW_NORMS, center=True, min_periods=1).median().to_numpy()
    stands_out = above > SPIKE_SIGMAS * robust_sigma(torch.from_numpy(above))
    return Series(norms.steps[stands_out], norms.values[stands_out]), np.exp(above[stands_out])


def offenders(entry: Mapping[str, Any]) -> list[str]:
    """What an entry of the journal names, the first offender first: what was bad before the step, then parameters by gradients."""
    return list(dict.fromkeys(str(each.get("name", "?")) for kind in BAD_TENSOR_KEYS for each in entry.get(kind) or []))


def _journal_row(entry: Mapping[str, Any]) -> BadStep:
    stage, names, norm = str(entry.get("stage", "unknown")), offenders(entry), entry.get("total_norm")
    listed = ", ".join(names[:MAX_TENSORS_PER_ROW]) + (
        f" and {len(names) - MAX_TENSORS_PER_ROW} more" if len(names) > MAX_TENSORS_PER_ROW else ""
    )
    place = ", ".join(f"{key} {entry[key]}" for key in ("epoch", "batch", "rank") if key in entry)
    is_spike, policy = stage == "spike", str(entry.get("policy", "bad"))
    what = "skipped as a spike" if is_spike else POLICY_OUTCOMES.get(policy, policy)
    known = float(norm) if isinstance(norm, (int, float)) else math.nan
    return BadStep(int(entry["step"]), what, known, place, listed if is_spike else f"{stage}: {listed}".removesuffix(": "))


def _logged_skips(log: OptimizerLog) -> list[BadStep]:
    return [
        BadStep(int(step), "skipped", math.nan, "", f"{count:.0f} since the last logged step; no journal beside the log")
        for step, count in zip(*log.skips, strict=True)
    ]


def _spike_row(log: OptimizerLog, step: int, norm: float, times: float, limit: float) -> BadStep:
    if limit < norm:
        held = f"; clipped to {limit:.3g}"
    elif log.norm.is_ours:
        held = "; not clipped"
    else:  # it is not in the log
        held = ""
    return BadStep(step, "spike", norm, "", f"{times:.3g} times the median around it{held}")
