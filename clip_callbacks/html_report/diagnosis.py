"""Findings on the gradients of a run, in plain sentences with their numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from clip_callbacks.core.wording import plural
from clip_callbacks.html_report.bad_steps import named_tensors
from clip_callbacks.html_report.block_findings import find_in_blocks
from clip_callbacks.html_report.divergence import explodes_at_end, out_of_control
from clip_callbacks.html_report.finding import Finding, Severity
from clip_callbacks.html_report.losses import TrainingLoss
from clip_callbacks.html_report.norm_metrics import EVALUATION_WORDS, words_of
from clip_callbacks.html_report.runs import JOURNAL_ALONE, OptimizerLog
from clip_callbacks.html_report.series import Series
from clip_callbacks.html_report.spike_findings import find_spikes
from clip_callbacks.html_report.third_party_norms import describe_unknowns, taken_after_clip

NEARLY_ALL_CLIPPED, HALF_CLIPPED, MANY_CLIPPED, HARDLY_ANY_CLIPPED = 0.95, 0.5, 0.25, 0.001
"""Shares of clipped optimizer steps that divide the findings on clipping."""
HARD_CLIP_COEF = 0.1
"""A median clip_coef of clipped steps below this is reported as hard clipping."""
ALARMING_SKIPPED_SHARE = 0.01
"""A larger share of skipped optimizer steps is a problem rather than a warning."""
DEFAULT_MAX_CONSECUTIVE = 10
"""The number of bad batches in a row at which NonFiniteGuard ends a run by default."""
NO_MAX_NORM = (
    "No max_norm was logged, so these callbacks clipped no step by its norm. The log does not tell whether anything else clipped: "
    "the Trainer's gradient_clip_val, a clip_value, self.clip_gradients() or the optimizer."
)
NAN_CURES = "GradientClipping skips such steps, and NonFiniteGuard names the tensors that caused them."
"""Advice for a run without the guard whose loss was not finite."""
STAGE_MEANINGS = {
    "step": "the previous optimizer step had made parameters non-finite",
    "parameter": "parameters were non-finite before the step",
    "buffer": "buffers were non-finite before the step",
    "carried": "a tensor that a module keeps from batch to batch was non-finite before the step",
    "loss": "the loss was not finite",
    "gradient": "the loss was finite, but its gradients were not",
    "spike": "the step was a finite spike, larger than the guard allows",
}
"""Meaning of the stages in the guard's journal."""


def diagnose(log: OptimizerLog, losses: dict[str, Series], loss: TrainingLoss | None = None) -> list[Finding]:
    """List the findings on one optimizer of a run, the most severe first.

    Args:
        log: The log of the optimizer.
        losses: All losses of the run, by the names of their metrics.
        loss: The training loss; None if it is not known.
    """
    order: list[Severity] = ["bad", "warn", "good", "note"]
    found = [
        *_broken_losses(log, losses),
        *_out_of_control(loss),
        *_origin(log),
        *_not_finite(log),
        *_clipping(log),
        *_skips(log),
        *_lost_metrics(log),
        *_end_of_run(log),
        *find_spikes(log, loss),
        *_scaler(log),
        *find_in_blocks(log),
        *_shadows(log),
        *_sampling(log),
    ]
    return sorted(found, key=lambda finding: order.index(finding.severity))


def _out_of_control(loss: TrainingLoss | None) -> Iterator[Finding]:
    if caution := out_of_control(loss):
        yield Finding("bad", caution)
    elif warning := explodes_at_end(loss):
        yield Finding("warn", warning)


def _broken_losses(log: OptimizerLog, losses: dict[str, Series]) -> Iterator[Finding]:
    for key, series in losses.items():
        broken, tail = series.not_finite, series.not_finite_at_end
        if len(tail) > 1:
            text = f"{key} is NaN or inf from optimizer step {tail.steps[0]:,} to the end, at {len(tail):,} logged steps"
            # One NaN makes the mean of an epoch NaN too, also under a name that does not say so: its other steps have finite norms.
            if words_of(key) & (EVALUATION_WORDS | {"epoch"}) or log.total_norm.between(int(tail.steps[0]), None):
                yield Finding("bad", f"{text}.")
            elif log.skipped_steps:
                yield Finding("bad", f"{text}: nothing was learned from them.")
            else:
                yield Finding("bad", f"{text}: nothing was learned from them. {NAN_CURES}")
        elif broken:
            yield Finding(
                "warn",
                f"{key} is NaN or inf at {len(broken):,} of {len(series):,} logged steps, first at optimizer step "
                f"{broken.steps[0]:,}.",
            )


def _origin(log: OptimizerLog) -> Iterator[Finding]:
    if log.norm.is_ours:
        return
    if caution := taken_after_clip(log):
        yield Finding("bad", caution)
    yield Finding("note", describe_unknowns(log))


def _not_finite(log: OptimizerLog) -> Iterator[Finding]:
    logged, finite, broken = log.logged_norm, log.logged_norm.finite, log.logged_norm.not_finite
    if not broken:
        return
    text = (
        f"{len(broken):,} of {len(logged):,} logged norms are NaN or inf, first at optimizer step {broken.steps[0]:,}. Percentiles "
        "and plots leave them out."
    )
    if finite and len(logged.not_finite_at_end) > 1:
        yield Finding("bad", f"{text} None is finite after optimizer step {finite.steps[-1]:,}: the weights may be NaN since then.")
    else:
        yield Finding("warn", text)


def _clipping(log: OptimizerLog) -> Iterator[Finding]:
    share, norms, limit = log.clipped_share, log.total_norm, log.max_norm
    if not norms:
        yield _no_norm(log)
        return
    p50, p90, p99 = (float(np.quantile(norms.values, q)) for q in (0.5, 0.9, 0.99))
    percentiles = f"The norm has p50 {p50:.3g}, p90 {p90:.3g} and p99 {p99:.3g}."
    if math.isnan(share) and not log.norm.is_ours:
        yield Finding("note", percentiles)
        return
    if math.isnan(share) or (not limit and not share):
        yield Finding("note", f"{NO_MAX_NORM} {percentiles}")
        return
    limit_text = _limit_in_words(limit)
    if log.has_local_norms:
        yield Finding(
            "note",
            f"The norms are local: {limit_text} held for the norm of each block, which is why clipped_norm is above max_norm. "
            "Compare it with the norms of blocks (GradientNormMonitor), not with total_norm.",
        )
    yield _clipped_share(share, limit_text, p90, p99)
    coefficients = log.clip_coef.values
    below_one = coefficients[coefficients < 1]
    if len(below_one) and np.median(below_one) < HARD_CLIP_COEF:
        yield Finding(
            "note",
            f"Clipped steps are clipped hard: their median clip_coef is {np.median(below_one):.2g}, the smallest is "
            f"{below_one.min():.2g}.",
        )


def _no_norm(log: OptimizerLog) -> Finding:
    if log.run.kind == JOURNAL_ALONE:
        return Finding(
            "note",
            "Nothing but the journal of bad steps was found. Either the run ended before anything was logged "
            "(Trainer(log_every_n_steps=…)), or its metrics are elsewhere.",
        )
    text = "No logged step has a finite norm above 0, so there is nothing to clip."
    if log.bad_steps:
        return Finding("bad", f"{text} The table of bad steps tells why.")
    return Finding("bad", f"{text} Check that backward ran and that no weight is NaN.")


def _clipped_share(share: float, limit_text: str, p90: float, p99: float) -> Finding:
    if share >= NEARLY_ALL_CLIPPED:
        return Finding(
            "warn",
            f"{share:.0%} of steps are clipped by {limit_text}. max_norm acts as a learning rate: the size of a gradient no longer "
            f"matters. The p90 of the norm is {p90:.3g}.",
        )
    if share >= HALF_CLIPPED:
        return Finding(
            "warn",
            f"{share:.0%} of steps are clipped by {limit_text}: more than half, so typical steps are shrunk too. The p90 of the "
            f"norm is {p90:.3g}.",
        )
    if share >= MANY_CLIPPED:
        return Finding(
            "note", f"{share:.0%} of steps are clipped by {limit_text}, ordinary ones among them. The p90 of the norm is {p90:.3g}."
        )
    if share < HARDLY_ANY_CLIPPED:
        return Finding(
            "note",
            f"Fewer than {HARDLY_ANY_CLIPPED:.1%} of steps are clipped by {limit_text}, which guards against rare spikes. The "
            f"p99 of the norm is {p99:.3g}.",
        )
    return Finding(
        "good", f"{share:.1%} of steps are clipped by {limit_text}: spikes are bounded, typical steps are left unchanged."
    )


def _limit_in_words(limit: Series) -> str:
    if not limit:
        return "a max_norm that was not logged"
    lowest, highest = limit.values.min(), limit.values.max()
    if highest <= 1.01 * lowest:
        return f"max_norm {limit.last:.3g}"
    return f"a max_norm from {lowest:.3g} to {highest:.3g}"


def _skips(log: OptimizerLog) -> Iterator[Finding]:
    if not log.skipped_steps or not log.skipped_steps.last:
        return
    skipped = int(log.skipped_steps.last)
    is_known = skipped <= log.step_count
    entries = log.bad_steps
    stages = Counter(str(entry.get("stage")) for entry in entries)
    if is_known:
        text = f"{skipped:,} of {log.step_count:,} steps {plural(skipped, 'was', 'were')} skipped ({skipped / log.step_count:.2%})."
    else:
        text = f"{skipped:,} steps were skipped. The log does not tell of how many: its own steps are fewer."
    if stages:
        stage = stages.most_common(1)[0][0]
        text += f' The most frequent stage is "{stage}"'
        if stage in STAGE_MEANINGS:
            text += f": {STAGE_MEANINGS[stage]}"
        text += "."
        named = [entry for entry in entries if entry.get("stage") != "loss" and named_tensors(entry)]
        if named and stage != "loss":
            names = Counter(named_tensors(entry)[0] for entry in named)
            text += f" The tensor named first most often is {names.most_common(1)[0][0]}."
    severity: Severity = "warn"
    if not is_known or skipped / log.step_count > ALARMING_SKIPPED_SHARE:
        severity = "bad"
    yield Finding(severity, text)


def _end_of_run(log: OptimizerLog) -> Iterator[Finding]:
    """Say that the log ends with bad steps in a row, or with one under the policy "raise": then the guard has ended the run."""
    entries = log.bad_steps
    if not entries or any(series.steps[-1] > int(entries[-1]["step"]) for series in log.run.metrics.values()):
        return
    last, streak, policy = entries[-1], entries[-1].get("streak"), str(entries[-1].get("policy"))
    if policy == "raise":
        yield Finding("bad", f'NonFiniteGuard(policy="raise") ended the run at optimizer step {last["step"]:,}.')
    elif policy not in {"ignore", "rollback", "warn"} and isinstance(streak, int) and streak > 1:
        yield Finding(
            "bad",
            f"The log ends with {streak} bad batches in a row, the last at optimizer step {last['step']:,}. NonFiniteGuard ends a "
            f"run at max_consecutive of them ({DEFAULT_MAX_CONSECUTIVE} by default).",
        )


def _lost_metrics(log: OptimizerLog) -> Iterator[Finding]:
    """Repeat the guard's warnings about metrics that a bad loss has reached: each sentence once, with the number of epochs."""
    warned = [(int(entry["step"]), str(sentence)) for entry in log.bad_steps for sentence in entry.get("lost_metrics") or []]
    for sentence in dict.fromkeys(sentence for _, sentence in warned):
        steps = [step for step, other in warned if other == sentence]
        since = f"From optimizer step {steps[0]:,} on"
        if len(steps) > 1:
            since += f" (in {len(steps)} epochs)"
        yield Finding("warn", f"{since}: {sentence}")


def _of_all(count: int, log: OptimizerLog) -> str:
    """Return a number of steps, and of how many, unless the log has fewer, as one whose first or last rows are missing."""
    if count > log.step_count:
        return f"{count:,}"
    return f"{count:,} of {log.step_count:,}"


def _scaler(log: OptimizerLog) -> Iterator[Finding]:
    overflowed, scale = log.overflowed_steps, log.amp_scale
    if overflowed and overflowed.last:
        yield Finding(
            "note",
            f"{_of_all(int(overflowed.last), log)} optimizer steps overflowed in float16: GradScaler skipped them and "
            "lowered the loss scale. This is normal while it searches for the scale.",
        )
    if scale and scale.last < 1:
        yield Finding(
            "bad", f"The loss scale has fallen to {scale.last:.3g}: float16 overflows again and again. Use precision bf16-mixed."
        )


def _shadows(log: OptimizerLog) -> Iterator[Finding]:
    if shadows := log.shadows:
        each = ", ".join(f"{name} {share:.1%}" for name, share in shadows.items())
        yield Finding("note", f"Shadow limits are computed but not applied. Share of steps that they would have clipped: {each}.")


def _sampling(log: OptimizerLog) -> Iterator[Finding]:
    interval = log.steps_between_norms
    if interval > 1:
        text = f"About one step in {interval:.0f} was logged: percentiles and plots are made from {len(log.total_norm):,} norms."
        if log.clip_fraction or log.skipped_steps:
            text += " Clipped and skipped steps are counted over all steps."
        yield Finding("note", text)
