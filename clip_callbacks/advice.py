"""Which max_norm? An answer from the norms of a run, with its reasons in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PERCENTILES = (1, 10, 25, 50, 75, 90, 95, 99)

ADVISED = 90
"""The percentile that is advised: what it clips are the largest 10 % of the steps."""
QUARTERS = 4
FEWEST = 40
"""Fewer norms than these are not divided into quarters."""
CHANGED = 3.0
"""By this factor the medians of quarters must differ for a run to have changed: lognormal norms do not by chance."""
STANDS_OUT = 3.0
"""A norm stands out that is so many robust standard deviations above the median, in logarithms."""
SAME = 0.02
"""By so much the share of steps that a rounded threshold clips may differ."""
LEAST_SIGMA = 0.05
"""The floor of RobustZScoreLimit too."""
HIGHEST_LOG = math.log(1.79e308)
WARMUP = 100
"""Steps for which the number is in force before a limit that sets itself."""
MAD_TO_SIGMA = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""


@dataclass(frozen=True)
class Advice:
    """A max_norm worth trying, a limit that sets itself, and why.

    Args:
        steps: How many finite norms it is made from.
        left_out: How many were not finite, or not above 0.
        percentiles: Percentile to norm, with linear interpolation, of all steps.
        largest: The largest norm.
        max_norm: The suggestion, to two significant digits, or more.
        clips: The share of the steps that it would have clipped.
        quarters: Medians of the run's four quarters; empty in a short run.
        outliers: Share of norms above median · exp(3 sigma), with sigma = 1.4826 MAD of their logarithms.
        adaptive: The class of the limit that is suggested if the threshold is to follow the norms, after a warm-up at ``max_norm``.
        options: Its arguments.
        reasons: Sentences.
        is_of_calm_part: Whether the suggestion is made from the calmest quarter of a run that went out of control.
    """

    steps: int
    left_out: int
    percentiles: dict[int, float]
    largest: float
    max_norm: float
    clips: float
    quarters: tuple[float, ...]
    outliers: float
    adaptive: str
    options: dict[str, float]
    reasons: tuple[str, ...]
    is_of_calm_part: bool = False

    @property
    def adaptive_call(self) -> str:
        """The adaptive limit as one writes it in Python."""
        limit = f"{self.adaptive}({', '.join(f'{key}={value:g}' for key, value in self.options.items())})"
        return f"Warmup({limit}, steps={WARMUP}, until={self.max_norm:g})"

    def configuration(self, *, adaptive: bool = False) -> dict[str, Any]:
        """What to put under LightningCLI's configuration, as nested dictionaries."""
        limit = self._adaptive if adaptive else self.max_norm
        return {"trainer": {"callbacks": [_named("GradientClipping", max_norm=limit)]}}

    @property
    def _adaptive(self) -> dict[str, Any]:
        return _named("Warmup", limit=_named(self.adaptive, **self.options), steps=WARMUP, until=self.max_norm)

    def facts(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "max_norm": self.max_norm,
            "clips": self.clips,
            "adaptive": self._adaptive,
            "reasons": list(self.reasons),
            "steps": self.steps,
            "left_out": self.left_out,
            "percentiles": {f"p{percent}": value for percent, value in self.percentiles.items()},
            "largest": self.largest,
            "medians_of_quarters": list(self.quarters),
            "outliers": self.outliers,
        }

    def describe(self) -> str:
        """A few lines of text."""
        lines = [f"max_norm={self.max_norm:g} would have clipped {self.clips:.1%} of {self.steps} steps."]
        lines += [f"  - {reason}" for reason in self.reasons]
        return "\n".join([*lines, f"A limit that sets itself: {self.adaptive_call}."])


def advise(norms: Tensor, *, out_of_control: bool = False) -> Advice | None:
    r"""Suggest a max_norm from the total norms of a run, in the order of its steps.

    The suggestion is the 90th percentile of the norms, rounded to two digits, or to more where that would clip other steps: it
    leaves the typical step alone and bounds the largest tenth. Pascanu, Mikolov and Bengio (ICML 2013) set the threshold from the
    average norm over many updates in the same way, and found values from half to ten times that average to work.

    The adaptive limit is ``QuantileLimit(0.9)``, which clips a tenth of the steps at any scale, if the medians of the run's
    quarters differ threefold; else ``RobustZScoreLimit(3)``, which clips only what stands out. For the first hundred steps the
    number is in force: a limit that has seen nothing yet clips nothing, and that is when a run breaks.

    Args:
        norms: Total norms before clipping, any shape, in the order of the steps; those that are not finite or not above 0 are left
            out and counted.
        out_of_control: Whether the run is known to have gone out of control. If its norms grew threefold from the first quarter to
            the last, the suggestion then is the 90th percentile of the calmest quarter.

    Returns:
        The advice; None if no norm is left.

    Example::

        >>> advise(torch.linspace(0.01, 1.0, 100)).max_norm
        0.9
    """
    values = norms.detach().double().flatten().cpu()
    sound = values[torch.isfinite(values) & (values > 0)]
    if not len(sound):
        return None
    ordered = sound.sort().values
    quarters = [quarter.sort().values for quarter in sound.tensor_split(QUARTERS)] if len(sound) >= FEWEST else []
    medians = tuple(_quantile(quarter, 0.5) for quarter in quarters)
    calm = _quantile(quarters[medians.index(min(medians))], ADVISED / 100) if quarters else math.nan
    grew = bool(medians) and medians[-1] >= CHANGED * medians[0]
    has_changed = bool(medians) and max(medians) >= CHANGED * min(medians)
    threshold = _threshold(ordered, STANDS_OUT)
    percentiles = {percent: _quantile(ordered, percent / 100) for percent in PERCENTILES}
    from_calm = grew and out_of_control
    max_norm = rounded(calm if from_calm else percentiles[ADVISED], ordered)
    outliers = _share_above(ordered, threshold)
    adaptive, options = ("QuantileLimit", {"quantile": ADVISED / 100}) if has_changed else ("RobustZScoreLimit", {"z": STANDS_OUT})
    reasons = [_spread(percentiles, float(ordered[-1]))]
    if len(sound) < FEWEST:
        reasons.append(f"It is made from {len(sound)} norms only: ask again of a longer run.")
    if from_calm:
        reasons.append("It is the 90th percentile of the run's calmest quarter: the run went out of control later.")
    else:
        reasons.append("It is their 90th percentile: the typical step is left alone, the largest tenth is bounded.")
    if has_changed:
        reasons.append(
            f"The median of the norm was {', '.join(f'{median:.3g}' for median in medians)} in the four quarters of the run: "
            "no number fits all of them. QuantileLimit(0.9) follows, and clips a tenth of the steps at any scale."
        )
    if grew and not out_of_control:
        reasons.append(
            f"It grew: if the loss did too, the run went out of control, and {calm:.2g}, from the calmest quarter, is better."
        )
    if not has_changed:
        reasons.append(
            f"{outliers:.2%} of the steps stand out, with norms above {threshold:.3g} (three robust standard deviations above "
            "the median): they are what RobustZScoreLimit(3) clips, and hardly anything else."
        )
    return Advice(
        steps=len(sound),
        left_out=len(values) - len(sound),
        percentiles=percentiles,
        largest=float(ordered[-1]),
        max_norm=max_norm,
        clips=_share_above(ordered, max_norm),
        quarters=medians,
        outliers=outliers,
        adaptive=adaptive,
        options=options,
        reasons=tuple(reasons),
        is_of_calm_part=from_calm,
    )


def _named(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"clip_callbacks.{name}", "init_args": arguments}


def rounded(value: float, ordered: Tensor) -> float:
    """Round a threshold to two significant digits, or to as many more as it takes to clip about the same norms.

    Args:
        value: The threshold, above 0.
        ordered: The norms, ascending.
    """
    exact = _share_above(ordered, value)
    candidates = (float(f"{value:.{digits}e}") for digits in range(1, 17))
    return next((short for short in candidates if short < math.inf and abs(_share_above(ordered, short) - exact) <= SAME), value)


def robust_sigma(logs: Tensor) -> float:
    """1.4826 times the median absolute deviation of logarithms of norms, 0.05 at least: what differs less does not stand out."""
    median = _quantile(logs.sort().values, 0.5)
    return max(MAD_TO_SIGMA * _quantile((logs - median).abs().sort().values, 0.5), LEAST_SIGMA)


def _threshold(ordered: Tensor, z: float) -> float:
    """The norm that is ``z`` robust standard deviations above the median, in logarithms."""
    logs = ordered.log()
    above = _quantile(logs, 0.5) + z * robust_sigma(logs)
    return math.exp(above) if above < HIGHEST_LOG else math.inf


def _share_above(ordered: Tensor, threshold: float) -> float:
    above = len(ordered) - int(torch.searchsorted(ordered, torch.tensor(threshold, dtype=ordered.dtype), right=True))
    return above / len(ordered)


def _spread(percentiles: dict[int, float], largest: float) -> str:
    p50, p90, p99 = (f"{percentiles[percent]:.3g}" for percent in (50, 90, 99))
    return f"total_norm: p50 {p50}, p90 {p90}, p99 {p99}, largest {largest:.3g}."


def _quantile(ordered: Tensor, share: float) -> float:
    """With linear interpolation, as ``torch.quantile``, which takes 16 million values at most."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    return float(torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below))
