"""A suggested max_norm from the norms of a run, with its reasons in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_callbacks.core.limits.robust_zscore import MAD_TO_SIGMA

PERCENTILES = (1, 10, 25, 50, 75, 90, 95, 99)

SUGGESTED_PERCENTILE = 90
"""Percentile of the norms that is the suggested max_norm: it clips the largest 10 % of them."""
QUANTILE = SUGGESTED_PERCENTILE / 100
"""Quantile of the suggested adaptive limit."""
QUARTER_COUNT = 4
MIN_NORMS_FOR_QUARTERS = 40
"""Least number of norms that are divided into quarters."""
CHANGE_FACTOR = 3.0
"""Least ratio of two quarters' medians in a run that has changed; lognormal norms do not reach it by chance."""
OUTLIER_SIGMAS = 3.0
"""Distance of an outlier above the median, in robust standard deviations of the norms' logarithms."""
MAX_SHARE_CHANGE = 0.02
"""Largest change in the fraction of clipped steps that rounding a threshold may cause."""
MIN_SIGMA = 0.05
"""Least robust standard deviation of logarithms of norms; RobustZScoreLimit has the same floor."""
EUCLIDEAN = 2.0
"""Order of the norm that GradientClipping takes by default."""
LARGEST_LOG = math.log(1.79e308)
"""Logarithm of about the largest float64 number."""


@dataclass(frozen=True)
class Advice:
    """A suggested max_norm, an adaptive limit, and the reasons for both.

    Args:
        steps: Number of norms that the suggestion is made from.
        left_out: Number of other norms: those that are not finite, or not above 0.
        percentiles: Norms by percentile, over all steps, with linear interpolation.
        largest: The largest norm.
        max_norm: The suggestion, rounded to two or more significant digits.
        clips: Fraction of the steps that it would have clipped.
        quarters: Medians of the run's four quarters; empty for a short run.
        outliers: Fraction of the norms above median · exp(3 sigma), with sigma = 1.4826 MAD of their logarithms.
        reasons: Sentences that explain the suggestion.
        is_from_stable_quarter: If True, the suggestion is made from one quarter of a run that diverged: the one with the lowest
            median.
        norm_type: Order p of the norms, if it is known.
    """

    steps: int
    left_out: int
    percentiles: dict[int, float]
    largest: float
    max_norm: float
    clips: float
    quarters: tuple[float, ...]
    outliers: float
    reasons: tuple[str, ...]
    is_from_stable_quarter: bool = False
    norm_type: float | None = None

    @property
    def adaptive_call(self) -> str:
        """Return the adaptive limit as Python code."""
        return f"TightestLimit(QuantileLimit({QUANTILE:g}), {self.max_norm:g})"

    def configuration(self, *, adaptive: bool = False) -> dict[str, Any]:
        """Return the configuration of the suggestion for LightningCLI, as nested dictionaries.

        Args:
            adaptive: If True, that of the adaptive limit.
        """
        limit = self._adaptive if adaptive else self.max_norm
        return {"trainer": {"callbacks": [_named("GradientClipping", max_norm=limit, **self._order)]}}

    @property
    def _order(self) -> dict[str, float | str]:
        """Return the argument for the order of the norm, unless it is 2, the default of GradientClipping."""
        if self.norm_type is None or self.norm_type == EUCLIDEAN:
            return {}
        return {"norm_type": "inf" if math.isinf(self.norm_type) else self.norm_type}

    @property
    def _adaptive(self) -> dict[str, Any]:
        return _named("TightestLimit", limits=[_named("QuantileLimit", quantile=QUANTILE), self.max_norm])

    def facts(self) -> dict[str, Any]:
        """Return all fields that users may want, as values that JSON can hold."""
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
        } | self._order

    def describe(self) -> str:
        """Return the suggestion and its reasons as text."""
        lines = [
            f"max_norm={self.max_norm:g} for the norm of all gradients would have clipped {self.clips:.1%} of {self.steps} steps."
        ]
        lines += [f"  - {reason}" for reason in self.reasons]
        return "\n".join([*lines, f"Or an adaptive limit that never exceeds it: {self.adaptive_call}."])


def advise(
    norms: Tensor,
    *,
    out_of_control: bool = False,
    is_sampled: bool = False,
    metric: str = "total_norm",
    norm_type: float | None = None,
) -> Advice | None:
    r"""Suggest a max_norm from the total norms of a run, in the order of its steps.

    The suggestion is the 90th percentile of the norms, rounded to two digits, or to more if two would change which steps are
    clipped: typical steps stay as they are, and the largest 10 % are bounded. Pascanu, Mikolov and Bengio (ICML 2013) set the
    threshold from the average norm over many updates in the same way, and found values from half to ten times that average to work.

    The adaptive limit is the lower one of that number and ``QuantileLimit(0.9)``: it is as safe as the number, and still clips
    10 % of the steps while norms fall. A ``QuantileLimit`` alone would grow with the norms of a run that diverges.

    Args:
        norms: Total norms before clipping, any shape, in the order of the steps. Those that are not finite, or not above 0, are
            counted and ignored.
        out_of_control: If True, the run is known to have diverged: if the medians of its quarters grew threefold from the first to
            the last, the suggestion is the 90th percentile of the quarter with the lowest median.
        is_sampled: If True, the norms are those of some steps only, and logging more often would give more of them.
        metric: Name of the norms in the reasons.
        norm_type: Order p of the norms, if it is known.

    Returns:
        The advice; None without a usable norm.

    Example::

        >>> advise(torch.linspace(0.01, 1.0, 100)).max_norm
        0.9
    """
    values = norms.detach().double().flatten().cpu()
    usable = values[torch.isfinite(values) & (values > 0)]
    if not len(usable):
        return None
    ordered, quarters = usable.sort().values, _Quarters.of(usable)
    percentiles = {percent: _quantile(ordered, percent / 100) for percent in PERCENTILES}
    threshold = _threshold(ordered, OUTLIER_SIGMAS)
    is_from_stable_quarter = quarters.grew and out_of_control
    if is_from_stable_quarter:
        max_norm = rounded(quarters.stable, ordered)
        source = "It is the 90th percentile of the quarter of the run with the lowest median: later the run diverged."
    else:
        max_norm = rounded(percentiles[SUGGESTED_PERCENTILE], ordered)
        source = "It is their 90th percentile: typical steps stay as they are, and the largest 10% are bounded."
    outliers, largest = _share_above(ordered, threshold), float(ordered[-1])
    p50, p90, p99 = (f"{percentiles[percent]:.3g}" for percent in (50, 90, 99))
    left_out = len(values) - len(usable)
    reasons = [f"{metric}: p50 {p50}, p90 {p90}, p99 {p99}, largest {largest:.3g}."]
    if left_out:
        reasons.append(f"{left_out} of {len(values)} norms are ignored: NaN, inf or not above 0.")
    reasons += [source, *quarters.reasons(out_of_control=out_of_control, is_sampled=is_sampled)]
    if outliers and quarters.medians and not quarters.changed:
        above = f"above {threshold:.3g}, three robust standard deviations from the median"
        reasons.append(f"{outliers:.2%} of the steps are outliers: {above}.")
    return Advice(
        steps=len(usable),
        left_out=left_out,
        percentiles=percentiles,
        largest=largest,
        max_norm=max_norm,
        clips=_share_above(ordered, max_norm),
        quarters=quarters.medians,
        outliers=outliers,
        reasons=tuple(reasons),
        is_from_stable_quarter=is_from_stable_quarter,
        norm_type=norm_type,
    )


class _Quarters(NamedTuple):
    """The four quarters of a run; no medians for a short run.

    Args:
        medians: Median of the norms in each quarter.
        stable: 90th percentile of the norms in the quarter with the lowest median.
    """

    medians: tuple[float, ...]
    stable: float

    @classmethod
    def of(cls, norms: Tensor) -> _Quarters:
        if len(norms) < MIN_NORMS_FOR_QUARTERS:
            return cls((), math.nan)
        quarters = [quarter.sort().values for quarter in norms.tensor_split(QUARTER_COUNT)]
        medians = tuple(_quantile(quarter, 0.5) for quarter in quarters)
        return cls(medians, _quantile(quarters[medians.index(min(medians))], QUANTILE))

    @property
    def grew(self) -> bool:
        return bool(self.medians) and self.medians[-1] >= CHANGE_FACTOR * self.medians[0]

    @property
    def changed(self) -> bool:
        return bool(self.medians) and max(self.medians) >= CHANGE_FACTOR * min(self.medians)

    def reasons(self, *, out_of_control: bool, is_sampled: bool) -> Iterator[str]:
        if not self.medians and is_sampled:
            yield (
                f"There are fewer than {MIN_NORMS_FOR_QUARTERS} norms: ask again with those of a longer run, or log more often "
                "(Trainer(log_every_n_steps=…), in transformers logging_steps)."
            )
        elif not self.medians:
            yield f"There are fewer than {MIN_NORMS_FOR_QUARTERS} steps: ask again with a longer run."
        if self.changed:
            yield (
                f"The median of the norm was {', '.join(f'{median:.3g}' for median in self.medians)} in the four quarters of the "
                "run: no single number fits all of them. The adaptive limit follows falling norms."
            )
        if self.grew and not out_of_control:
            yield (
                f"The norm grew. If the loss grew too, the run diverged, and {self.stable:.2g}, from the quarter with the lowest "
                "median, is the better max_norm."
            )


def _named(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"clip_callbacks.{name}", "init_args": arguments}


def rounded(value: float, ordered: Tensor) -> float:
    """Round a threshold to the fewest significant digits, two or more, with which it clips about as many norms.

    Args:
        value: The threshold, above 0.
        ordered: Norms in ascending order.
    """
    exact = _share_above(ordered, value)
    candidates = (float(f"{value:.{digits}e}") for digits in range(1, 17))
    return next(
        (short for short in candidates if short < math.inf and abs(_share_above(ordered, short) - exact) <= MAX_SHARE_CHANGE),
        value,
    )


def robust_sigma(logs: Tensor) -> float:
    """Return 1.4826 times the median absolute deviation of logarithms of norms, at least 0.05."""
    median = _quantile(logs.sort().values, 0.5)
    return max(MAD_TO_SIGMA * _quantile((logs - median).abs().sort().values, 0.5), MIN_SIGMA)


def _threshold(ordered: Tensor, z: float) -> float:
    """Return the norm whose logarithm is ``z`` robust standard deviations above the median of the logarithms."""
    logs = ordered.log()
    above = _quantile(logs, 0.5) + z * robust_sigma(logs)
    return math.exp(above) if above < LARGEST_LOG else math.inf


def _share_above(ordered: Tensor, threshold: float) -> float:
    above = len(ordered) - int(
        torch.searchsorted(ordered, torch.tensor(threshold, dtype=ordered.dtype, device=ordered.device), right=True)
    )
    return above / len(ordered)


def _quantile(ordered: Tensor, share: float) -> float:
    """Return a quantile with linear interpolation. ``torch.quantile`` does that too, but takes at most 16 million values."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    return float(torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below))
