"""What norms that somebody else logged do not tell, and whether they give away that they were taken after a clip."""

from __future__ import annotations

from clip_callbacks.html_report.runs import ROUNDING_TOLERANCE, TRANSFORMERS, OptimizerLog
from clip_callbacks.stats.advice import EUCLIDEAN, SUGGESTED_PERCENTILE

MIN_CAPPED_NORMS = 5
"""Fewer norms at the top may be there by chance."""
UNKNOWN_PROCESSING = (
    "whether the norm was taken before or after a clip, whether a loss scale (16-mixed) is in it, and whether it is of whole steps "
    "or of each micro-batch."
)
LIGHTNING_PROCESSING = (
    "Lightning's grad_norm, called in on_before_optimizer_step, sees whole steps before the Trainer's own clip, without the loss "
    "scale unless the optimizer is fused; called in on_after_backward, the sum of the micro-batches so far, times the loss scale."
)
TRANSFORMERS_PROCESSING = (
    "the max_grad_norm of the Trainer (1.0 by default), which is not in trainer_state.json. The Trainer of transformers logs the "
    "norm before that clip, without the loss scale, of the last step of each logging interval. A loss that was NaN is not in the "
    "log either, but the mean of those before it, unless logging_nan_inf_filter was off."
)


def unknowns(log: OptimizerLog) -> str:
    """What to say of a log in which clip_callbacks did not log the norm that is read."""
    clipped = "" if log.clip_fraction else "which steps were clipped or skipped, "
    if log.run.kind == TRANSFORMERS:
        about = f"{clipped}nor {TRANSFORMERS_PROCESSING}"
    elif log.norm.norm_type is None:
        about = clipped + UNKNOWN_PROCESSING
    else:
        about = f"{clipped}{UNKNOWN_PROCESSING} {LIGHTNING_PROCESSING}"
    return f"The norms are what was logged as {log.norm.name}, not by clip_callbacks. Such a log does not tell {about}"


def conditions(log: OptimizerLog) -> list[str]:
    """What must hold for a number that is suggested from norms of others."""
    norm = log.norm
    if norm.is_ours:
        return []
    if log.run.kind == TRANSFORMERS:
        said = (
            f"{norm.name} was logged by the Trainer of transformers, before its own clip: the number is one for its max_grad_norm, "
            "too. Which one it had, and which steps were clipped or skipped, is not in the log."
        )
        return [said]
    holds = (
        f"{norm.name} was not logged by clip_callbacks. The log does not tell which steps were clipped or skipped, nor whether "
        "that is the norm before clipping, of whole steps, without a loss scale: only then does the number hold."
    )
    if norm.norm_type in {None, EUCLIDEAN}:
        return [holds]
    return [holds, f"It is a number for norms of order {norm.norm_type:g}, the norm_type of GradientClipping."]


def taken_after_clip(log: OptimizerLog) -> str | None:
    """What to say if the largest tenth of the norms is one and the same number, as behind a clip: then there is no percentile."""
    norms = log.total_norm.values
    if log.norm.is_ours or not len(norms):
        return None
    highest = float(norms.max())
    capped = int((norms * ROUNDING_TOLERANCE >= highest).sum())
    if capped < max(MIN_CAPPED_NORMS, (1 - SUGGESTED_PERCENTILE / 100) * len(norms)):
        return None
    return (
        f"{capped:,} of {len(norms):,} norms are {highest:.3g}, and none is above: {log.norm.name} was taken after a clip to "
        "that. How large the gradients were is not in the log. Log the norm before clipping, or have GradientClipping(None) log it."
    )
