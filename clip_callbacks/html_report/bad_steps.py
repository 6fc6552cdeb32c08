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
from clip_callbacks.html_report.runs import Track
from clip_callbacks.html_report.series import Series, Values
from clip_callbacks.stats.advice import robust_sigma

SPIKE = 4.0
"""Robust standard deviations above the median around it, in logarithms, from which a norm is a spike."""
AROUND = 31
"""Logged norms that a norm is compared with: itself, and as many before as after."""
FEWEST = 20
"""Fewer norms than these tell nothing of spikes."""
LISTED = 20
"""Rows of the table for what was skipped, and for spikes."""
NAMED = 4
"""Offenders that a row names."""
WHAT = {"skip": "skipped", "zero": "zeroed", "microbatch": "micro-batch dropped", "raise": "raised"}
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


def bad_steps(track: Track) -> tuple[list[BadStep], int]:
    """Rows for the table of bad steps, in order, and how many there are.

    They are the journal's, else the skips that were logged; norms logged that are not finite; and the largest spikes.
    """
    bad = [_journal_row(entry) for entry in track.bad_steps] or _logged_skips(track)
    logged = track.logged_norm
    bad += [BadStep(int(step), "norm not finite", math.nan, "", "") for step in logged.steps[~np.isfinite(logged.values)][:LISTED]]
    outliers, times = spikes(track)
    limits = track.max_norm.at(outliers.steps)
    largest = [
        _spike_row(track, int(outliers.steps[place]), float(outliers.values[place]), float(times[place]), float(limits[place]))
        for place in np.argsort(-times, kind="stable")[:LISTED]
    ]
    return sorted([*bad[:LISTED], *largest], key=lambda row: row.step), len(bad) + len(outliers)


def spikes(track: Track) -> tuple[Series, Values]:
    """Logged norms that are four robust standard deviations (of 5 % at least) above the median around them, in logarithms.

    Returns:
        The norms, and how many times that median each is, shape ``(n,)``.
    """
    norms = track.total_norm
    if len(norms) < FEWEST:
        return Series.empty(), np.empty(0)
    logs = np.log(norms.values)
    above = logs - pd.Series(logs).rolling(AROUND, center=True, min_periods=1).median().to_numpy()
    stands_out = above > SPIKE * robust_sigma(torch.from_numpy(above))
    return Series(norms.steps[stands_out], norms.values[stands_out]), np.exp(above[stands_out])


def offenders(entry: Mapping[str, Any]) -> list[str]:
    """What an entry of the journal names, the first offender first: what was bad before the step, then parameters by gradients."""
    return list(dict.fromkeys(str(each.get("name", "?")) for kind in BAD_TENSOR_KEYS for each in entry.get(kind) or []))


def _journal_row(entry: Mapping[str, Any]) -> BadStep:
    stage, names, norm = str(entry.get("stage", "unknown")), offenders(entry), entry.get("total_norm")
    listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    place = ", ".join(f"{key} {entry[key]}" for key in ("epoch", "batch", "rank") if key in entry)
    is_spike, policy = stage == "spike", str(entry.get("policy", "bad"))
    what = "skipped as a spike" if is_spike else WHAT.get(policy, policy)
    known = float(norm) if isinstance(norm, (int, float)) else math.nan
    return BadStep(int(entry["step"]), what, known, place, listed if is_spike else f"{stage}: {listed}".removesuffix(": "))


def _logged_skips(track: Track) -> list[BadStep]:
    return [
        BadStep(int(step), "skipped", math.nan, "", f"{count:.0f} since the last logged step; no journal beside the log")
        for step, count in zip(*track.skips, strict=True)
    ]


def _spike_row(track: Track, step: int, norm: float, times: float, limit: float) -> BadStep:
    if limit < norm:
        held = f"; clipped to {limit:.3g}"
    elif track.norm.is_ours:
        held = "; not clipped"
    else:  # it is not in the log
        held = ""
    return BadStep(step, "spike", norm, "", f"{times:.3g} times the median around it{held}")
