"""Norms that other code logged: what their log leaves unknown, and whether they were taken after clipping."""

from __future__ import annotations

from clip_callbacks.html_report.runs import ROUNDING_FACTOR, TRANSFORMERS, OptimizerLog
from clip_callbacks.stats.advice import EUCLIDEAN, SUGGESTED_PERCENTILE

MIN_CAPPED_NORMS = 5
"""Fewer norms at the largest value may be there by chance; as many hint at a clip."""
UNKNOWN_PROCESSING = (
    "The log does not tell whether the norm was taken before or after clipping, whether a loss scale (16-mixed) is included, and "
    "whether it is of whole optimizer steps or of each micro-batch."
)
LIGHTNING_PROCESSING = (
    "Lightning's grad_norm, called in on_before_optimizer_step, measures whole optimizer steps before the Trainer's own clipping, "
    "without the loss scale unless the optimizer is fused. Called in on_after_backward, it measures the sum of the micro-batches "
    "so far, including the loss scale."
)
TRANSFORMERS_PROCESSING = (
    "The max_grad_norm of the Trainer (1.0 by default) is not in trainer_state.json. The Trainer of transformers logs the "
    "norm before clipping, without the loss scale, of the last optimizer step of each logging interval. The log leaves out a loss "
    "that was NaN and repeats the mean of those before it, unless logging_nan_inf_filter was off."
)


def describe_unknowns(log: OptimizerLog) -> str:
    """Say what remains unknown in a log whose norm clip_callbacks did not log."""
    sentences = [f"The norms were logged as {log.norm.name}, not by clip_callbacks."]
    if not log.clip_fraction:
        sentences.append("The log does not tell which optimizer steps were clipped or skipped.")
    if log.run.kind == TRANSFORMERS:
        sentences.append(TRANSFORMERS_PROCESSING)
    else:
        sentences.append(UNKNOWN_PROCESSING)
        if log.norm.norm_type is not None:
            sentences.append(LIGHTNING_PROCESSING)
    return " ".join(sentences)


def suggestion_conditions(log: OptimizerLog) -> list[str]:
    """Say under which conditions a max_norm suggested from norms of other code is valid."""
    norm = log.norm
    if norm.is_ours:
        return []
    if log.run.kind == TRANSFORMERS:
        said = (
            f"{norm.name} was logged by the Trainer of transformers, before its own clipping: the suggestion is also one for its "
            "max_grad_norm. Its max_grad_norm, and which optimizer steps were clipped or skipped, are not in the log."
        )
        return [said]
    condition = (
        f"{norm.name} was not logged by clip_callbacks. The suggestion is valid only if {norm.name} is the norm before clipping, "
        "of whole optimizer steps, without a loss scale; the log does not tell, nor which optimizer steps were clipped or skipped."
    )
    if norm.norm_type in {None, EUCLIDEAN}:
        return [condition]
    return [condition, f"The suggestion is for norms of order {norm.norm_type:g}: set norm_type of GradientClipping to it."]


def taken_after_clip(log: OptimizerLog) -> str | None:
    """Say that the norms were taken after clipping if the largest tenth of them is one number; None otherwise.

    Percentiles of such norms tell nothing of the gradients.
    """
    norms = log.total_norm.values
    if log.norm.is_ours or not len(norms):
        return None
    highest = float(norms.max())
    capped = int((norms * ROUNDING_FACTOR >= highest).sum())
    if capped < max(MIN_CAPPED_NORMS, (1 - SUGGESTED_PERCENTILE / 100) * len(norms)):
        return None
    return (
        f"{capped:,} of {len(norms):,} norms are {highest:.3g}, and none is larger: {log.norm.name} was taken after clipping to "
        "that value. The log does not tell how large the gradients were. Log the norm before clipping, or let "
        "GradientClipping(None) log it."
    )
