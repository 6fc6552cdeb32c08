"""What is wrong with a run's gradients, in plain words and with its numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clip_callbacks.html_report.bad_steps import offenders, spikes
from clip_callbacks.html_report.runs import OptimizerLog
from clip_callbacks.html_report.series import Series
from clip_callbacks.html_report.third_party_norms import taken_after_clip, unknowns
from clip_callbacks.stats.advice import MIN_NORMS_FOR_QUARTERS, QUARTER_COUNT

Severity = Literal["bad", "warn", "good", "note"]

ALWAYS, OFTEN, MUCH, SELDOM = 0.95, 0.5, 0.25, 0.001
"""Shares of clipped steps."""
HARD = 0.1
"""A clip_coef below which clipping is hard."""
MANY = 0.01
"""A share of skipped steps that is bad."""
DOMINANT = 0.9
"""Share of the total norm with which one block is all of it."""
FADING = 1e-4
"""Share of the total norm below which a block hardly learns."""
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


def diagnose(log: OptimizerLog, losses: dict[str, Series]) -> list[Finding]:
    """What there is to say of one optimizer of a run, the worst first."""
    order: list[Severity] = ["bad", "warn", "good", "note"]
    found = [
        *_broken_loss(losses),
        *([Finding("bad", caution)] if (caution := out_of_control(losses)) else []),
        *_origin(log),
        *_not_finite(log),
        *_clipping(log),
        *_skips(log),
        *_lost_metrics(log),
        *_spikes(log),
        *_scaler(log),
        *_blocks(log),
        *_updates(log),
        *_shadows(log),
        *_sampling(log),
    ]
    return sorted(found, key=lambda finding: order.index(finding.severity))


def out_of_control(losses: dict[str, Series]) -> str | None:
    """What to say if the training loss doubled: if in some quarter of the run its median was twice the first value logged."""

    def rank(key: str) -> tuple[bool, bool, bool, int]:
        name = key.lower()
        return "val" in name or "test" in name, len(losses[key].finite) < MIN_NORMS_FOR_QUARTERS, "train" not in name, len(key)

    training = sorted(losses, key=rank)
    for key in training[:1]:
        finite = losses[key].finite
        if len(finite) < MIN_NORMS_FOR_QUARTERS or not bool((finite.values > 0).all()):
            continue
        worst = max(float(np.median(part)) for part in np.array_split(finite.values, QUARTER_COUNT))
        if worst > 2 * finite.values[0]:
            return (
                f"{key} rose from {finite.values[0]:.3g} to {worst:.3g} (the median of a quarter of the run): it went "
                f"out of control, and "
                "its norms say little of a healthy run. Lower the learning rate, or begin with QuantileLimit(0.1), "
                "which needs no "
                "number, and ask again of that run."
            )
    return None


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


def _origin(log: OptimizerLog) -> Iterator[Finding]:
    if log.norm.is_ours:
        return
    if caution := taken_after_clip(log):
        yield Finding("bad", caution)
    yield Finding("note", unknowns(log))


def _not_finite(log: OptimizerLog) -> Iterator[Finding]:
    logged, finite = log.logged_norm, log.logged_norm.finite
    broken = len(logged) - len(finite)
    if not broken:
        return
    first = int(logged.steps[~np.isfinite(logged.values)][0])
    text = (
        f"{broken:,} of {len(logged):,} logged norms are NaN or inf, first at step {first:,}: they are in no percentile and no "
        "picture."
    )
    at_end = int((logged.steps > finite.steps[-1]).sum()) if finite else 0
    if at_end > 1:
        yield Finding("bad", f"{text} None is finite after step {finite.steps[-1]:,}: since then the weights may be NaN.")
    else:
        yield Finding("warn", text)


def _clipping(log: OptimizerLog) -> Iterator[Finding]:
    share, norms, limit = log.clipped_share, log.total_norm, log.max_norm
    if not norms:
        yield Finding(
            "bad", "No logged step has a finite norm above 0: there is nothing to clip. Did backward run, are weights NaN?"
        )
        return
    p50, p90, p99 = (float(np.quantile(norms.values, q)) for q in (0.5, 0.9, 0.99))
    if math.isnan(share) and not log.norm.is_ours:
        yield Finding("note", f"p50 of the norm is {p50:.3g}, p90 {p90:.3g}, p99 {p99:.3g}.")
        return
    if math.isnan(share) or (not limit and not share):
        yield Finding("note", f"Nothing was clipped: no limit was set. p50 of the norm is {p50:.3g}, p90 {p90:.3g}, p99 {p99:.3g}.")
        return
    force = _limit_in_words(limit)
    if log.has_local_norms:
        yield Finding(
            "note",
            f"clipped_norm lies above max_norm: the norms are local, and {force} held for each block by itself. Compare it with "
            "the norms of blocks (GradientNormMonitor), not with total_norm.",
        )
    if share >= ALWAYS:
        yield Finding(
            "warn",
            f"{share:.0%} of steps are clipped by {force}: max_norm acts as a learning rate, the size of a gradient no longer "
            f"counts. p50 of the norm is {p50:.3g}, p90 is {p90:.3g}.",
        )
    elif share >= OFTEN:
        yield Finding("warn", f"{share:.0%} of steps are clipped by {force}, more than half. p90 of the norm is {p90:.3g}.")
    elif share >= MUCH:
        yield Finding("note", f"{share:.0%} of steps are clipped by {force}: ordinary ones too. p90 of the norm is {p90:.3g}.")
    elif share < SELDOM:
        yield Finding("note", f"{force} hardly ever clips ({share:.2%} of steps): an insurance. p99 of the norm is {p99:.3g}.")
    else:
        yield Finding("good", f"{share:.1%} of steps are clipped by {force}: spikes are bounded, the typical step is left alone.")
    coefficients = log.clip_coef.values
    hard = coefficients[coefficients < 1]
    if len(hard) and np.median(hard) < HARD:
        yield Finding(
            "note",
            f"Where it clips it clips hard: the median clip_coef of clipped steps is {np.median(hard):.2g} "
            f"(smallest {hard.min():.2g}).",
        )


def _limit_in_words(limit: Series) -> str:
    if not limit:
        return "a limit that was not logged"
    lowest, highest = limit.values.min(), limit.values.max()
    return f"max_norm {limit.last:.3g}" if highest <= 1.01 * lowest else f"a limit from {lowest:.3g} to {highest:.3g}"


def _skips(log: OptimizerLog) -> Iterator[Finding]:
    skipped = int(log.skipped_steps.last) if log.skipped_steps else 0
    if not skipped:
        return
    share = skipped / log.steps
    entries = log.bad_steps
    stages = Counter(str(entry.get("stage")) for entry in entries)
    stage = stages.most_common(1)[0][0] if stages else ""
    names = Counter(offenders(entry)[0] for entry in entries if entry.get("stage") != "loss" and offenders(entry))
    where = ""
    if stage:
        where = f' Most often the stage is "{stage}"'
        if names and stage != "loss":
            where += f", the first offender {names.most_common(1)[0][0]}"
        where += "."
    were = "was" if skipped == 1 else "were"
    yield Finding("bad" if share > MANY else "warn", f"{skipped:,} of {log.steps:,} steps {were} skipped ({share:.2%}).{where}")


def _lost_metrics(log: OptimizerLog) -> Iterator[Finding]:
    """What the guard has said of metrics that a bad loss has got into: of each the first time, and how often."""
    told = [(int(entry["step"]), str(sentence)) for entry in log.bad_steps for sentence in entry.get("lost_metrics") or []]
    for sentence in dict.fromkeys(sentence for _, sentence in told):
        steps = [step for step, other in told if other == sentence]
        more = f" (so in {len(steps)} epochs)" if len(steps) > 1 else ""
        yield Finding("warn", f"From step {steps[0]:,} on{more}: {sentence}")


def _spikes(log: OptimizerLog) -> Iterator[Finding]:
    found, times = spikes(log)
    if found:
        worst = int(np.argmax(times))
        yield Finding(
            "note",
            f"{len(found):,} of {len(log.total_norm):,} logged norms stand far out of those around them; most of all "
            f"{found.values[worst]:.3g} at step {found.steps[worst]:,}, {times[worst]:.3g} times their median.",
        )


def _scaler(log: OptimizerLog) -> Iterator[Finding]:
    scale = log.amp_scale
    if scale and scale.last < 1:
        yield Finding("bad", f"The loss scale has fallen to {scale.last:.3g}: float16 overflows again and again. Use bf16-mixed.")


def _blocks(log: OptimizerLog) -> Iterator[Finding]:
    norms = {name: series for name, series in log.blocks().items() if series}
    if len(norms) < 2:  # noqa: PLR2004
        return
    shares = {}
    for name, series in norms.items():
        total = log.total_norm.at(series.steps)
        ratio = series.values / np.where(total > 0, total, np.nan)
        shares[name] = float(np.nanmedian(ratio)) if np.isfinite(ratio).any() else math.nan
    heaviest = max(shares, key=lambda name: -1.0 if math.isnan(shares[name]) else shares[name])
    if shares[heaviest] > DOMINANT:
        yield Finding(
            "note",
            f"The norm of {heaviest} alone is {min(shares[heaviest], 1.0):.0%} of {log.norm.title}, in the median: a global "
            f"norm is its norm, and "
            'clips all others because of it. scope="layer" gives each its own.',
        )
    fading = [name for name, share in shares.items() if share < FADING]
    if fading:
        listed = ", ".join(fading[:4]) + (f" and {len(fading) - 4} more" if len(fading) > 4 else "")  # noqa: PLR2004
        yield Finding("warn", f"Hardly any gradient arrives at {listed}: in the median less than 1e-4 of the total norm.")


def _updates(log: OptimizerLog) -> Iterator[Finding]:
    low, high = HEALTHY_UPDATES
    medians = {name: float(np.median(series.values)) for name, series in log.update_ratios.items() if series}
    for names, what in (
        ([name for name, value in medians.items() if value > high], f"above {high:g}: the learning rate is high for them"),
        ([name for name, value in medians.items() if value < low], f"below {low:g}: they hardly move"),
    ):
        if names:
            yield Finding("note", f"The update-to-weight ratio of {', '.join(names[:4])} is {what} (about 1e-3 is usual).")


def _shadows(log: OptimizerLog) -> Iterator[Finding]:
    if shadows := log.shadows:
        each = ", ".join(f"{name} {share:.1%}" for name, share in shadows.items())
        yield Finding("note", f"Other limits, tried without touching gradients, would have clipped: {each}.")


def _sampling(log: OptimizerLog) -> Iterator[Finding]:
    every = log.steps_between_norms
    if every > 1:
        counted = "; clipped and skipped steps are counted over all steps" if log.norm.is_ours else ""
        count = len(log.total_norm)
        yield Finding(
            "note", f"About one step in {every:.0f} was logged: percentiles and pictures are made from {count:,} norms{counted}."
        )
