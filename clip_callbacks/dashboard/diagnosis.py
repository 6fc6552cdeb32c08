"""What is wrong with a run's gradients, in plain words and with its numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from clip_callbacks.advice import FEWEST, QUARTERS, robust_threshold
from clip_callbacks.dashboard.runs import Series, Track

Severity = Literal["bad", "warn", "good", "note"]

ALWAYS, OFTEN, SELDOM = 0.95, 0.5, 0.001
"""Shares of clipped steps."""
SPIKE = 4.0
"""Robust standard deviations above the median, in logarithms, from which a step is listed as a spike."""
DOMINANT = 0.8
"""Share of the sum of squares with which one block is the whole norm."""
FADING = 1e-4
"""Share of the total norm below which a block hardly learns."""
LISTED = 20
"""Rows of the table of bad steps."""
HEALTHY_UPDATES = (1e-5, 1e-2)
"""Norms of updates over those of the weights that give no cause for concern; about 1e-3 is usual."""


@dataclass(frozen=True)
class Finding:
    """One sentence or two on a run.

    Args:
        severity: How much it matters.
        text: What was found, with numbers, and what to do.
    """

    severity: Severity
    text: str


@dataclass(frozen=True)
class BadStep:
    """A row of the table of bad steps.

    Args:
        step: The optimizer step, 0 at the start.
        what: "skipped", "spike" and so on.
        norm: total_norm; NaN if it was not finite.
        where: Epoch and batch and rank, as far as known.
        offenders: Which parameters, or what else is known.
    """

    step: int
    what: str
    norm: float
    where: str
    offenders: str


def diagnose(track: Track, losses: dict[str, Series]) -> list[Finding]:
    """What there is to say of one optimizer of a run, the worst first."""
    order: list[Severity] = ["bad", "warn", "good", "note"]
    found = [
        *_broken_loss(losses),
        *([Finding("bad", caution)] if (caution := out_of_control(losses)) else []),
        *_clipping(track),
        *_skips(track),
        *_spikes(track),
        *_scaler(track),
        *_blocks(track),
        *_updates(track),
        *_shadows(track),
        *_sampling(track),
    ]
    return sorted(found, key=lambda finding: order.index(finding.severity))


def spikes(track: Track) -> Series:
    """Logged steps whose norm is four robust standard deviations (5 % at least each) above the median, in logarithms."""
    norms = track.total_norm
    if len(norms) < LISTED:
        return Series.empty()
    values = torch.from_numpy(np.array(norms.values))
    level = max(robust_threshold(values, SPIKE), float(np.median(norms.values)) * math.exp(SPIKE * 0.05))
    stands_out = norms.values > level
    return Series(norms.steps[stands_out], norms.values[stands_out])


def bad_steps(track: Track) -> tuple[list[BadStep], int]:
    """Rows for the table of bad steps (the journal's, else the skips logged, and the largest spikes), and how many there are."""
    rows = [_journal_row(entry) for entry in track.bad_steps]
    if not rows:
        counts = track.skipped_steps
        gained = np.diff(counts.values, prepend=0.0) if counts else np.empty(0)
        for step, count in zip(counts.steps[gained > 0], gained[gained > 0], strict=True):
            rows.append(BadStep(int(step), "skipped", math.nan, "", f"{count:.0f} skipped since the last logged step; no journal"))
    outliers = spikes(track)
    largest = np.argsort(-outliers.values, kind="stable")[:LISTED]
    median = float(np.median(track.total_norm.values)) if outliers else math.nan
    limits = track.max_norm.at(outliers.steps)
    for place in largest:
        norm, limit = float(outliers.values[place]), float(limits[place])
        held = f"; clipped to {limit:.3g}" if limit < norm else "; not clipped"
        rows.append(BadStep(int(outliers.steps[place]), "spike", norm, "", f"{norm / median:.3g} times the median{held}"))
    total = len(rows) + len(outliers) - len(largest)
    worst = sorted(rows, key=lambda row: (row.what == "spike", row.step if row.what != "spike" else -row.norm))[: 2 * LISTED]
    return sorted(worst, key=lambda row: row.step), total


def out_of_control(losses: dict[str, Series]) -> str | None:
    """What to say if a loss above 0 doubled: if in some quarter of the run its median was twice the first value logged."""
    for key, series in losses.items():
        finite = series.finite
        if len(finite) < FEWEST or not bool((finite.values > 0).all()):
            continue
        worst = max(float(np.median(part)) for part in np.array_split(finite.values, QUARTERS))
        if worst > 2 * finite.values[0]:
            return (
                f"{key} rose from {finite.values[0]:.3g} to {worst:.3g} (a quarter's median): the run went out of "
                f"control, and its norms say "
                "little of a healthy one. Clip at 1, or lower the learning rate, and ask again after that run."
            )
    return None


def _journal_row(entry: object) -> BadStep:
    assert isinstance(entry, dict)
    is_spike = entry.get("stage") == "spike"
    named = [*(entry.get("parameters") or []), *(entry.get("gradients") or []), *(entry.get("largest") or [])]
    names = list(dict.fromkeys(str(each.get("name", "?")) for each in named if isinstance(each, dict)))
    offenders = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")  # noqa: PLR2004
    place = ", ".join(f"{key} {entry[key]}" for key in ("epoch", "batch", "rank") if key in entry)
    policy = {"skip": "skipped", "zero": "zeroed", "microbatch": "micro-batch dropped", "raise": "raised"}
    what = "skipped as a spike" if is_spike else policy.get(str(entry.get("policy")), str(entry.get("policy", "bad")))
    stage = str(entry.get("stage", "unknown"))
    norm = entry.get("total_norm")
    return BadStep(
        int(entry["step"]),
        what,
        float(norm) if isinstance(norm, (int, float)) else math.nan,
        place,
        offenders if is_spike else f"{stage}: {offenders}".removesuffix(": "),
    )


def _broken_loss(losses: dict[str, Series]) -> Iterator[Finding]:
    for key, series in losses.items():
        broken = series.steps[~np.isfinite(series.values)]
        if not len(broken):
            continue
        ended = not math.isfinite(series.values[-1])
        stays = "and stays so: from there on nothing was learned" if ended else f"at {len(broken)} of {len(series)} logged steps"
        yield Finding(
            "bad" if ended else "warn",
            f"{key} is NaN or inf from step {broken[0]:,} {stays}. GradientClipping skips such steps (NonFiniteGuard "
            f"names who did it)."
            if ended
            else f"{key} is NaN or inf {stays}, first at step {broken[0]:,}.",
        )


def _clipping(track: Track) -> Iterator[Finding]:
    share, norms = track.share_clipped, track.total_norm
    if not norms:
        yield Finding(
            "bad", "No logged step has a finite norm above 0: there is nothing to clip. Did backward run, are weights NaN?"
        )
        return
    p50, p90, p99 = (float(np.quantile(norms.values, q)) for q in (0.5, 0.9, 0.99))
    limit = track.max_norm
    if not limit or math.isnan(share):
        yield Finding("note", f"Nothing was clipped: no limit was set. p50 of the norm is {p50:.3g}, p90 {p90:.3g}, p99 {p99:.3g}.")
        return
    moves = limit.values.max() > limit.values.min() * 1.01
    force = f"a limit from {limit.values.min():.3g} to {limit.values.max():.3g}" if moves else f"max_norm {limit.last:.3g}"
    if share >= ALWAYS:
        yield Finding(
            "warn",
            f"{share:.0%} of steps are clipped by {force}: max_norm acts as a learning rate, the size of a gradient no longer "
            f"counts. p50 of the norm is {p50:.3g}, p90 is {p90:.3g}.",
        )
    elif share >= OFTEN:
        yield Finding("warn", f"{share:.0%} of steps are clipped by {force}, more than half. p90 of the norm is {p90:.3g}.")
    elif share < SELDOM:
        yield Finding("note", f"{force} hardly ever clips ({share:.2%} of steps): an insurance. p99 of the norm is {p99:.3g}.")
    else:
        yield Finding("good", f"{share:.1%} of steps are clipped by {force}: spikes are bounded, the typical step is left alone.")
    coefficients = track.clip_coef.values
    hard = coefficients[coefficients < 1]
    if len(hard) and np.median(hard) < 0.1:  # noqa: PLR2004
        yield Finding(
            "note",
            f"Where it clips it clips hard: the median clip_coef of clipped steps is {np.median(hard):.2g} (smallest "
            f"{hard.min():.2g}).",
        )


def _skips(track: Track) -> Iterator[Finding]:
    skipped = int(track.skipped_steps.last) if track.skipped_steps else 0
    if not skipped:
        return
    steps = int(track.skipped_steps.steps[-1]) + 1
    share = skipped / steps
    names = Counter(
        str(each.get("name"))
        for entry in track.bad_steps
        for each in [*(entry.get("parameters") or []), *(entry.get("gradients") or [])][:1]
        if isinstance(each, dict)
    )
    stages = Counter(str(entry.get("stage")) for entry in track.bad_steps)
    where = f' Most often the stage is "{stages.most_common(1)[0][0]}"' if stages else ""
    who = f", the first offender {names.most_common(1)[0][0]}." if names else "." if where else ""
    yield Finding("bad" if share > 0.01 else "warn", f"{skipped} of {steps:,} steps were skipped ({share:.2%}).{where}{who}")  # noqa: PLR2004


def _spikes(track: Track) -> Iterator[Finding]:
    found = spikes(track)
    if found:
        worst = int(np.argmax(found.values))
        median = float(np.median(track.total_norm.values))
        yield Finding(
            "note",
            f"{len(found)} of {len(track.total_norm):,} logged norms stand far out of the others; the largest, "
            f"{found.values[worst]:.3g} "
            f"at step {found.steps[worst]:,}, is {found.values[worst] / median:.3g} times the median.",
        )


def _scaler(track: Track) -> Iterator[Finding]:
    scale = track.amp_scale
    if scale and scale.last < 1:
        yield Finding(
            "bad", f"The loss scale has fallen to {scale.last:.3g}: nearly every step overflows in float16. Use bf16-mixed."
        )


def _blocks(track: Track) -> Iterator[Finding]:
    norms = {name: series for name, series in track.blocks().items() if series}
    if len(norms) < 2:  # noqa: PLR2004
        return
    shares = {}
    for name, series in norms.items():
        total = track.total_norm.at(series.steps)
        ratio = series.values / np.where(total > 0, total, np.nan)
        shares[name] = float(np.nanmedian(ratio)) if np.isfinite(ratio).any() else math.nan
    heaviest = max(shares, key=lambda name: -1.0 if math.isnan(shares[name]) else shares[name])
    if shares[heaviest] ** 2 > DOMINANT:
        yield Finding(
            "note",
            f"{heaviest} alone makes {min(shares[heaviest] ** 2, 1.0):.0%} of the norm (of the sum of squares, in the "
            f"median): a global "
            'norm is its norm, and clips all others because of it. scope="layer" gives each its own.',
        )
    fading = [name for name, share in shares.items() if share < FADING]
    if fading:
        listed = ", ".join(fading[:4]) + (f" and {len(fading) - 4} more" if len(fading) > 4 else "")  # noqa: PLR2004
        yield Finding("warn", f"Hardly any gradient arrives at {listed}: in the median less than 1e-4 of the total norm.")


def _updates(track: Track) -> Iterator[Finding]:
    low, high = HEALTHY_UPDATES
    medians = {name: float(np.median(series.values)) for name, series in track.update_ratios.items() if series}
    for names, what in (
        ([name for name, value in medians.items() if value > high], f"above {high:g}: the learning rate is high for them"),
        ([name for name, value in medians.items() if value < low], f"below {low:g}: they hardly move"),
    ):
        if names:
            yield Finding("note", f"The update-to-weight ratio of {', '.join(names[:4])} is {what} (about 1e-3 is usual).")


def _shadows(track: Track) -> Iterator[Finding]:
    if shadows := track.shadows:
        each = ", ".join(f"{name} {share:.1%}" for name, share in shadows.items())
        yield Finding("note", f"Other limits, tried without touching gradients, would have clipped: {each}.")


def _sampling(track: Track) -> Iterator[Finding]:
    norms = track.total_norm
    if len(norms) > 1:
        every = float(np.median(np.diff(norms.steps)))
        if every > 1:
            yield Finding(
                "note",
                f"About one step in {every:.0f} was logged: percentiles and pictures are made from {len(norms):,} norms; "
                "clipped and skipped steps are counted over all steps.",
            )
