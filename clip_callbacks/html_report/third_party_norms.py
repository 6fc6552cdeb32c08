"""What norms that somebody else logged do not tell, and whether they give away that they were taken after a clip."""

from __future__ import annotations

from clip_callbacks.html_report.runs import ROUNDING, TRANSFORMERS, Track
from clip_callbacks.stats.advice import ADVISED, EUCLIDEAN

FEWEST_CAPPED = 5
"""Fewer norms at the top may be there by chance."""
UNTOLD = (
    "whether the norm was taken before or after a clip, whether a loss scale (16-mixed) is in it, and whether it is of whole steps "
    "or of each micro-batch."
)
IN_LIGHTNING = (
    "Lightning's grad_norm, called in on_before_optimizer_step, sees whole steps before the Trainer's own clip, without the loss "
    "scale unless the optimizer is fused; called in on_after_backward, the sum of the micro-batches so far, times the loss scale."
)
IN_TRANSFORMERS = (
    "the max_grad_norm of the Trainer (1.0 by default), which is not in trainer_state.json. The Trainer of transformers logs the "
    "norm before that clip, without the loss scale, of the last step of each logging interval. A loss that was NaN is not in the "
    "log either, but the mean of those before it, unless logging_nan_inf_filter was off."
)


def untold(track: Track) -> str:
    """What to say of a log in which clip_callbacks did not log the norm that is read."""
    clipped = "" if track.clip_fraction else "which steps were clipped or skipped, "
    if track.run.kind == TRANSFORMERS:
        about = f"{clipped}nor {IN_TRANSFORMERS}"
    elif track.norm.norm_type is None:
        about = clipped + UNTOLD
    else:
        about = f"{clipped}{UNTOLD} {IN_LIGHTNING}"
    return f"The norms are what was logged as {track.norm.name}, not by clip_callbacks. Such a log does not tell {about}"


def provisos(track: Track) -> list[str]:
    """What must hold for a number that is suggested from norms of others."""
    norm = track.norm
    if norm.is_ours:
        return []
    if track.run.kind == TRANSFORMERS:
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


def taken_after_clip(track: Track) -> str | None:
    """What to say if the largest tenth of the norms is one and the same number, as behind a clip: then there is no percentile."""
    norms = track.total_norm.values
    if track.norm.is_ours or not len(norms):
        return None
    highest = float(norms.max())
    capped = int((norms * ROUNDING >= highest).sum())
    if capped < max(FEWEST_CAPPED, (1 - ADVISED / 100) * len(norms)):
        return None
    return (
        f"{capped:,} of {len(norms):,} norms are {highest:.3g}, and none is above: {track.norm.name} was taken after a clip to "
        "that. How large the gradients were is not in the log. Log the norm before clipping, or have GradientClipping(None) log it."
    )
