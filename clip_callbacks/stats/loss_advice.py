"""A suggested loss_above from the training losses of a run, with its reasons in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import clip_callbacks.core.limits._tail as loss_tail
import clip_callbacks.core.limits._window as loss_window
from clip_callbacks.core.limits import BlockNorms, RobustZScoreLimit
from clip_callbacks.core.limits.robust_zscore import Scale

MIN_LOSSES = 100
"""Least number of losses that a suggestion is made from: fewer tell too little of the ordinary ones."""
MAX_JUDGED_LOSSES = 10_000
"""Largest number of losses, evenly spread over the run, whose limit is computed: it bounds time and memory."""
ZS = (4.0, 5.0)
"""The z that are tried on each scale, in this order. A larger one hardly finds more spikes than a fixed number would."""
FLOOR = 0.01
"""Floor of the limit: losses vary less than norms, and this one is above the rounding of bfloat16 (0.4 %)."""
MAX_ORDINARY_SHARE = 0.001
"""Largest share of ordinary losses that may be above the suggestion."""
LOG_SCALE_RATIO = 10.0
"""Least ratio of the largest to the smallest level of positive losses for which their noise is taken to shrink with them."""
LEVEL_LOSSES = 101
"""Number of losses in a row whose median is the level of the losses there."""
NONE_FITS = (
    f"more than {MAX_ORDINARY_SHARE:.1%} of the losses that are no spikes in hindsight are above each limit that was tried "
    f"(RobustZScoreLimit with z={ZS[0]:g} and {ZS[1]:g} on the linear scale and, for losses above 0, on the logarithmic one)."
)
"""Reason why there is no suggestion, for enough losses."""


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
        """Return the arguments of the limit, the scale only if it is not the default."""
        chosen: dict[str, float | str] = {"z": self.limit.z, "floor": self.limit.floor}
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

    The suggestion is a :class:`~clip_callbacks.RobustZScoreLimit` with a floor of 1 % and the smaller z of 4 and 5 that at most
    0.1 % of the ordinary losses exceed. Its scale is linear, for losses of any sign. If all losses are above 0, it may be
    logarithmic: it is so if their level (the running median of 101 losses) changes at least tenfold, since their noise then mostly
    shrinks with them; and otherwise if no z fits on the linear scale, as for losses that spread over orders of
    magnitude.

    The limit of each loss is that of a window with the losses before it. In the guard, spikes enter the window as the limit cuts
    them; the median and the MAD hardly notice the difference.

    Args:
        losses: Finite losses, shape ``(n,)``.
        is_spike: True for losses that are spikes in hindsight, shape ``(n,)``.
        metric: Name of the losses in the texts.
        is_ours: If True, the guard has logged them: the losses of whole windows.
        steps_between: Number of optimizer steps from one logged loss to the next.

    Returns:
        The advice; None with fewer than 100 losses, or if more than 0.1 % of the ordinary ones are above each limit that is
            tried.

    Example::

        >>> losses = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> advise_on_losses(losses, torch.zeros(1000, dtype=torch.bool)).call
        "RobustZScoreLimit(z=4.0, floor=0.01, scale='linear')"
    """
    values = losses.detach().double().flatten().cpu()
    if len(values) < MIN_LOSSES:
        return None
    count = min(len(values), MAX_JUDGED_LOSSES)
    judged = torch.linspace(0, len(values) - 1, count, dtype=torch.float64, device="cpu").long()
    level = _level(values, judged)
    ordinary = is_spike[judged].logical_not()
    scales = _scales(values, level)
    for scale, z in product(scales, ZS):
        limit = RobustZScoreLimit(z, floor=FLOOR, scale=scale)
        above = values[judged] > limits_at(values, judged, limit)
        ordinary_skips = int((above & ordinary).sum())
        if ordinary_skips <= MAX_ORDINARY_SHARE * len(judged):
            reasons = [
                *_choices(limit, level, is_first_scale=scale == scales[0]),
                *_conditions(metric, len(values), limit.window, is_ours=is_ours, steps_between=steps_between),
            ]
            return LossAdvice(metric, limit, len(judged), int(above.sum()), ordinary_skips, tuple(reasons))
    return None


def _scales(losses: Tensor, level: Tensor) -> tuple[Scale, ...]:
    """Return the scales to try, the likelier one first."""
    if not bool((losses > 0).all()):
        return ("linear",)
    if float(level.max()) >= LOG_SCALE_RATIO * float(level.min()):
        return ("log", "linear")
    return ("linear", "log")


def limits_at(losses: Tensor, places: Tensor, limit: RobustZScoreLimit) -> Tensor:
    """Return the limits of some losses, each from a window with the losses before it; inf during the warm-up.

    Args:
        losses: Losses in the order of the steps, float64, shape ``(n,)``.
        places: Indices of the losses whose limits are wanted, in ascending order, int64, shape ``(m,)``. On the linear scale, the
            upper tail is estimated from these losses alone.
        limit: The limit.
    """
    numbers = losses.log() if limit.scale == "log" else losses
    before = pad(numbers, (limit.window, 0), value=math.inf).unfold(0, limit.window, 1)[places].T
    # each place is a block of its own, so that one step of the limit does for all
    blocks = BlockNorms(losses[places], are_losses=True)
    window = loss_window.holding(before) | {"count": places}
    tail = loss_tail.empty(len(places))
    if limit.scale == "log":
        return limit.step(blocks, window)[0]
    # A loss counts for the tail or not according to its limit, which depends on the tail of those before it. Each round gives one
    # more loss its limit at least, and all others theirs after a few rounds.
    while True:
        limits, after = limit.step(blocks, window | {"tail": tail})
        known, tail = tail, _shares_before(after["tail"] > tail, places, limit.warmup)
        if torch.equal(tail, known):
            return limits


def _shares_before(is_far: Tensor, places: Tensor, warmup: int) -> Tensor:
    """Return the share of losses far above the median that a limit knows at each place, float64, shape ``(m,)``."""
    # from a share of 0, a loss that is far above the median leads to its weight
    weights = loss_tail.add(torch.zeros(len(places), dtype=torch.float64, device="cpu"), torch.ones_like(is_far), places - warmup)
    weights = weights.masked_fill(places < warmup, 0.0)
    share, shares = loss_tail.FIRST_SHARE, []
    for weight, far in zip(weights.tolist(), is_far.tolist(), strict=True):
        shares.append(share)
        share += weight * (far - share)
    return torch.tensor(shares, dtype=torch.float64, device="cpu")


def _level(losses: Tensor, places: Tensor) -> Tensor:
    """Return the running median of 101 losses at some places, float64, shape ``(m,)``."""
    padding = LEVEL_LOSSES // 2
    padded = pad(losses[None], (padding, padding), mode="replicate")[0]
    return padded.unfold(0, LEVEL_LOSSES, 1)[places].median(1).values


def _choices(limit: RobustZScoreLimit, level: Tensor, *, is_first_scale: bool) -> Iterator[str]:
    """Give the reasons for z and scale."""
    tried = " and ".join(f"{z:g}" for z in ZS)
    yield (
        f"z={limit.z:g} is the smallest of {tried} for which at most {MAX_ORDINARY_SHARE:.1%} of the losses that are no spikes in "
        "hindsight are above the limit."
    )
    if not is_first_scale:
        other, this = ("linear", "logarithmic") if limit.scale == "log" else ("logarithmic", "linear")
        yield f"The scale is {this}, because on the {other} one more of them are above the limit with any of these z."
    elif limit.scale == "log":
        yield f"The scale is logarithmic, because the level of the losses ranges from {level.min():.3g} to {level.max():.3g}."


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
