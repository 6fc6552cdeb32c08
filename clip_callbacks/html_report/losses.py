"""The training loss of an optimizer, and its spikes: those in the guard's journal, and those found in hindsight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from clip_callbacks.core.metric_names import LOSS, LOSS_LIMIT
from clip_callbacks.html_report.norm_metrics import EVALUATION_WORDS, words_of
from clip_callbacks.html_report.runs import LOSS_WORDS, OptimizerLog
from clip_callbacks.html_report.series import Series
from clip_callbacks.html_report.spikes import MIN_POINTS_FOR_SPIKES, Spikes, loss_spikes

TRAINING_LOSS_WORDS = LOSS_WORDS - {"perplexity", "ppl", "error", "rmse"} | {
    "train",
    "training",
    "step",
    "batch",
    "total",
    "cross",
    "entropy",
}
"""All words that the name of a training loss may have. Others tell of a part of the loss, such as kl, or of one network of several;
an error or a perplexity is not what the optimizer minimizes."""


@dataclass(frozen=True, eq=False)
class TrainingLoss:
    """The training loss of an optimizer, as it was logged.

    Args:
        name: Name of the metric.
        logged: The loss where it is finite.
        limit: Threshold of the guard in force; an empty series if there is none.
        known: Steps of the loss spikes in the guard's journal.
    """

    name: str
    logged: Series
    limit: Series
    known: tuple[int, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether clip_callbacks logged it: the loss of whole windows, over all ranks."""
        return self.name.startswith(LOSS)

    @cached_property
    def spikes(self) -> Spikes:
        """Logged losses that are far above those before and after, except for steps in the journal."""
        return loss_spikes(self.logged).without(self.known)


def training_loss(log: OptimizerLog, losses: Mapping[str, Series], *, is_named: bool = False) -> TrainingLoss | None:
    """Return the training loss of an optimizer; None if none was logged, or the log does not tell which it is.

    This is ``grad/loss``, which the guard logs. Else it is, in a run with one optimizer, a loss whose name has no other words than
    those for loss, training, step and batch (``train_loss``, ``train/loss_step``, ``loss``, ``train_nll``): with "train" in it
    before others, then the shortest; those of fewer than 20 points last. Losses of a validation or a test never count, nor do means
    of epochs.

    Args:
        log: The log of the optimizer.
        losses: The losses of the run.
        is_named: If True, the user named the losses: the first of them counts that is not of a validation or a test.
    """
    known = tuple(int(entry["step"]) for entry in log.bad_steps if is_loss_spike(entry))
    own = log.metric(LOSS).finite
    if own:
        return TrainingLoss(LOSS + log.suffix, own, log.metric(LOSS_LIMIT).finite, known)
    if len(log.run.optimizer_logs) > 1:
        return None
    words = {key: {word for word in words_of(key) if not word.isdigit()} for key in losses}
    candidates = [key for key in losses if losses[key].finite and not words[key] & EVALUATION_WORDS]
    if not is_named:
        candidates = sorted(
            (key for key in candidates if words[key] <= TRAINING_LOSS_WORDS),
            key=lambda key: (
                len(losses[key].finite) < MIN_POINTS_FOR_SPIKES,  # a loss that sums up the run, such as that of transformers
                not words[key] & {"train", "training"},
                len(key),
                key,
            ),
        )
    if not candidates:
        return None
    return TrainingLoss(candidates[0], losses[candidates[0]].finite, Series.empty(), known)


def is_loss_spike(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry of the journal is a step whose loss was above its threshold."""
    return entry.get("stage") == "spike" and exceeds(entry, "loss", "loss_limit")


def exceeds(entry: Mapping[str, Any], value: str, limit: str) -> bool:
    """Return whether a value in an entry of the journal was above its threshold; False if either is missing."""
    return number_in(entry, value) > number_in(entry, limit)


def number_in(entry: Mapping[str, Any], key: str) -> float:
    """Return a number in an entry of the journal; NaN if it is missing."""
    value = entry.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan
