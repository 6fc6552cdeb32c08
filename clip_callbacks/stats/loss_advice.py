"""A suggested loss_above from the training losses of a run, with its reasons in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import clip_callbacks.core.limits._window as loss_window
from clip_callbacks.core.limits import BlockNorms, RobustZScoreLimit
from clip_callbacks.core.limits.robust_zscore import MAD_TO_SIGMA, Scale

MIN_LOSSES = 100
"""Least number of losses that a suggestion is made from: fewer tell too little of the ordinary ones."""
MAX_JUDGED_LOSSES = 10_000
"""Largest number of losses, evenly spread over the run, whose limit is computed: it bounds time and memory."""
ZS = (4.0, 5.0, 6.0, 8.0, 10.0, 12.0)
"""The z that are tried, in this order."""
MAX_ORDINARY_SHARE = 0.001
"""Largest share of ordinary losses that may be above the suggestion."""
LOG_SCALE_RATIO = 10.0
"""Least ratio of the largest to the smallest level of positive losses for which their noise is taken to shrink with them."""
LEVEL_LOSSES = 101
"""Number of losses in a row whose median is the level of the losses there."""
FLOORS = (RobustZScoreLimit.floor, 0.01)
"""Floors of the limit: the default and, for losses that vary less, one that the rounding of bfloat16 (0.4 %) does not reach."""


@dataclass(frozen=True)
class LossAdvice:
    """A suggested threshold for the loss, above which the guard skips a step, and the reasons for it.

    Args:
        metric: Name of the metric that the losses were logged as.
        limit: The suggestion.
        losses: Number of losses that it was tried on.
        skips: Number of them that were above it.
        ordinary_skips: Number of these that are no spikes in hindsight.
        reasons: Sentences that explain the suggestion.
    """

    metric: str
    limit: RobustZScoreLimit
    losses: int
    skips: int
    ordinary_skips: int
    reasons: tuple[str, ...]

    @property
    def call(self) -> str:
        """Return the limit as Python code."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments.items())
        return f"RobustZScoreLimit({arguments})"

    @property
    def _arguments(self) -> dict[str, float | str]:
        """Return the arguments of the limit, floor and scale only if they are not the defaults."""
        chosen: dict[str, float | str] = {"z": self.limit.z}
        if self.limit.floor != RobustZScoreLimit.floor:
            chosen["floor"] = self.limit.floor
        if self.limit.scale != RobustZScoreLimit.scale:
            chosen["scale"] = self.limit.scale
        return chosen

    def _configured(self) -> dict[str, Any]:
        return {"class_path": "clip_callbacks.RobustZScoreLimit", "init_args": dict(self._arguments)}

    def configuration(self) -> dict[str, Any]:
        """Return the configuration of the suggestion for LightningCLI, as nested dictionaries."""
        guard = {"class_path": "clip_callbacks.NonFiniteGuard", "init_args": {"loss_above": self._configured()}}
        return {"trainer": {"callbacks": [guard]}}

    def facts(self) -> dict[str, Any]:
        """Return all fields that users may want, as values that JSON can hold."""
        return {
            "limit": self._configured(),
            "metric": self.metric,
            "losses": self.losses,
            "skips": self.skips,
            "ordinary_skips": self.ordinary_skips,
            "reasons": list(self.reasons),
        }

    def describe(self) -> str:
        """Return the suggestion and its reasons as text."""
        return "\n".join([f"loss_above={self.call} {self.outcome}", *(f"  - {reason}" for reason in self.reasons)])

    @property
    def outcome(self) -> str:
        """Say how many steps the suggestion would have skipped, as the end of a sentence."""
        spikes, others = self.skips - self.ordinary_skips, self.ordinary_skips
        kinds = f"{spikes:,} spike{'' if spikes == 1 else 's'} and {others:,} other{'' if others == 1 else 's'}"
        return f"would have skipped {self.skips:,} of {self.losses:,} steps ({kinds}), judged by {self.metric}."


def advise_on_losses(
    losses: Tensor, is_spike: Tensor, *, metric: str = "grad/loss", is_ours: bool = True, steps_between: float = 1.0
) -> LossAdvice | None:
    """Suggest a loss_above for NonFiniteGuard from the training losses of a run, in the order of its steps.

    The suggestion is a :class:`~clip_callbacks.RobustZScoreLimit` with the smallest z of 4, 5, 6, 8, 10 and 12 that at most 0.1 %
    of the ordinary losses exceed. Its scale is logarithmic if all losses are above 0 and their level (the running median of 101
    losses) changes at least tenfold, since their noise then mostly shrinks with them, and linear otherwise. Its floor is the
    default of 5 % or, where the losses vary less than that around their level, 1 %.

    The limit of each loss is that of a window with the losses before it. In the guard, spikes enter the window as the limit cuts
    them; the median and the MAD hardly notice the difference.

    Args:
        losses: Finite losses, shape ``(n,)``.
        is_spike: True for losses that are spikes in hindsight, shape ``(n,)``.
        metric: Name of the losses in the texts.
        is_ours: If True, the guard has logged them: the losses of whole windows.
        steps_between: Number of optimizer steps from one logged loss to the next.

    Returns:
        The advice; None with fewer than 100 losses, or if ordinary losses are above every limit that is tried.

    Example::

        >>> losses = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> advise_on_losses(losses, torch.zeros(1000, dtype=torch.bool)).call
        "RobustZScoreLimit(z=4.0, scale='linear')"
    """
    values = losses.detach().double().flatten().cpu()
    if len(values) < MIN_LOSSES:
        return None
    judged = torch.linspace(0, len(values) - 1, min(len(values), MAX_JUDGED_LOSSES)).long()
    level = _level(values, judged)
    variation = MAD_TO_SIGMA * float(((values[judged] - level) / level).abs().nan_to_num(math.inf).median())
    floor = FLOORS[variation < FLOORS[0]]
    scale: Scale = "log" if bool((values > 0).all()) and float(level.max()) >= LOG_SCALE_RATIO * float(level.min()) else "linear"
    ordinary = is_spike[judged].logical_not()
    for z in ZS:
        limit = RobustZScoreLimit(z, floor=floor, scale=scale)
        above = values[judged] > limits_at(values, judged, limit)
        ordinary_skips = int((above & ordinary).sum())
        if ordinary_skips <= MAX_ORDINARY_SHARE * len(judged):
            reasons = [
                *_choices(limit, level, variation),
                *_conditions(metric, len(values), limit.window, is_ours=is_ours, steps_between=steps_between),
            ]
            return LossAdvice(metric, limit, len(judged), int(above.sum()), ordinary_skips, tuple(reasons))
    return None


def limits_at(losses: Tensor, places: Tensor, limit: RobustZScoreLimit) -> Tensor:
    """Return the limits of some losses, each from a window with the losses before it; inf during the warm-up.

    Args:
        losses: Losses in the order of the steps, float64, shape ``(n,)``.
        places: Indices of the losses whose limits are wanted, int64, shape ``(m,)``.
        limit: The limit.
    """
    numbers = losses.log() if limit.scale == "log" else losses
    before = pad(numbers, (limit.window, 0), value=math.inf).unfold(0, limit.window, 1)[places].T
    # each place is a block of its own, so that one step of the limit does for all
    return limit.step(BlockNorms(losses[places], are_losses=True), loss_window.holding(before))[0]


def _level(losses: Tensor, places: Tensor) -> Tensor:
    """Return the running median of 101 losses at some places, float64, shape ``(m,)``."""
    padding = LEVEL_LOSSES // 2
    padded = pad(losses[None], (padding, padding), mode="replicate")[0]
    return padded.unfold(0, LEVEL_LOSSES, 1)[places].median(1).values


def _choices(limit: RobustZScoreLimit, level: Tensor, variation: float) -> Iterator[str]:
    """Give the reasons for z, scale and floor."""
    tried = ", ".join(f"{z:g}" for z in ZS)
    yield (
        f"z={limit.z:g} is the smallest of {tried} for which at most {MAX_ORDINARY_SHARE:.1%} of the losses that are no spikes in "
        "hindsight are above the limit."
    )
    if limit.scale == "log":
        yield f"The scale is logarithmic, because the level of the losses ranges from {level.min():.3g} to {level.max():.3g}."
    if limit.floor != FLOORS[0]:
        yield f"The losses vary by {variation:.1%} around their level, less than the default floor of {FLOORS[0]:.0%}."


def _conditions(metric: str, count: int, window: int, *, is_ours: bool, steps_between: float) -> Iterator[str]:
    """Say what the log leaves open."""
    if count > MAX_JUDGED_LOSSES:
        yield f"{MAX_JUDGED_LOSSES:,} of {count:,} logged losses, evenly spread over the run, were judged."
    if steps_between > 1:
        yield (
            f"About one loss in {steps_between:.0f} steps was logged, but the guard sees all: its window of {window} losses then "
            f"spans {window} steps instead of {window * steps_between:,.0f}, so that the count is a rough estimate."
        )
    if not is_ours:
        yield (
            f"The module logged {metric}. The guard judges the loss that training_step returns, as the mean over the window of a "
            "step and over all ranks, which may differ."
        )
    yield 'NonFiniteGuard(policy="warn", loss_above=...) reports spikes and skips nothing: use it to check the suggestion.'
