"""Suggest a max_norm from the norms of a run, with reasons in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

PERCENTILES = (1, 10, 25, 50, 75, 90, 95, 99)

ADVISED, QUANTILE = 90, 0.9
"""The suggested percentile, which clips the largest tenth of the steps."""
QUARTER_COUNT = 4
MIN_NORMS_FOR_QUARTERS = 40
"""A run with fewer norms is not divided into quarters."""
CHANGED = 3.0
"""Norms changed during the run if the medians of its quarters differ by this factor; lognormal norms do not by chance."""
OUTLIER_SIGMAS = 3.0
"""A norm is an outlier if it is this many robust standard deviations above the median, in logarithms."""
ROUNDING_SHARE_TOLERANCE = 0.02
"""Rounding may change the share of clipped steps by this much at most."""
LEAST_SIGMA = 0.05
"""The smallest robust standard deviation of logarithms, as in RobustZScoreLimit: smaller differences are no outliers."""
EUCLIDEAN = 2.0
HIGHEST_LOG = math.log(1.79e308)
MAD_TO_SIGMA = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""


@dataclass(frozen=True)
class Advice:
    """A suggested max_norm, an adaptive limit beside it, and the reasons.

    Args:
        steps: Number of finite norms above 0.
        left_out: Number of norms that are not finite or not above 0.
        percentiles: Norm at each percentile, with linear interpolation.
        largest: The largest norm.
        max_norm: Suggested max_norm, rounded to two significant digits, or to more if needed.
        clips: Share of the steps that it would have clipped.
        quarters: Medians of the four quarters of the run; empty in a short run.
        outliers: Share of norms above median · exp(3 sigma), with sigma = 1.4826 MAD of their logarithms.
        reasons: Reasons for the suggestion, in sentences.
        is_from_stable_quarter: If True, the suggestion is made from the most stable quarter of a run that went out of control.
        norm_type: Order p of the norms; None if it is unknown.
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
        """The adaptive limit, as Python code."""
        return f"Tightest(QuantileLimit({QUANTILE:g}), {self.max_norm:g})"

    def configuration(self, *, adaptive: bool = False) -> dict[str, Any]:
        """Return the suggestion as a configuration for LightningCLI, in nested dictionaries."""
        limit = self._adaptive if adaptive else self.max_norm
        return {"trainer": {"callbacks": [_named("GradientClipping", max_norm=limit, **self._order)]}}

    @property
    def _order(self) -> dict[str, float | str]:
        """The argument norm_type of GradientClipping; none for 2, the default."""
        if self.norm_type is None or self.norm_type == EUCLIDEAN:
            return {}
        return {"norm_type": "inf" if math.isinf(self.norm_type) else self.norm_type}

    @property
    def _adaptive(self) -> dict[str, Any]:
        return _named("Tightest", limits=[_named("QuantileLimit", quantile=QUANTILE), self.max_norm])

    def facts(self) -> dict[str, Any]:
        """Return all fields for JSON."""
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
        """Return the suggestion and its reasons as lines of text."""
        lines = [f"max_norm={self.max_norm:g} would have clipped {self.clips:.1%} of {self.steps} steps."]
        lines += [f"  - {reason}" for reason in self.reasons]
        return "\n".join([*lines, f"Or use an adaptive limit, which is never above that: {self.adaptive_call}."])


def advise(
    norms: Tensor,
    *,
    out_of_control: bool = False,
    is_sampled: bool = False,
    metric: str = "total_norm",
    norm_type: float | None = None,
) -> Advice | None:
    r"""Suggest a max_norm from the total norms of a run, in the order of its steps.

    The suggestion is the 90th percentile of the norms, rounded to two digits, or to more if rounding would clip other steps: it
    leaves typical steps unchanged and bounds the largest tenth. Pascanu, Mikolov and Bengio (ICML 2013) set the threshold from the
    average norm over many updates in the same way, and found values from half to ten times that average to work.

    The adaptive limit is ``Tightest(QuantileLimit(0.9), max_norm)``: never above the number, so that it is as safe, and
    below it where norms fall, so that it continues to clip a tenth of the steps. An adaptive limit
    alone follows a run that goes out of control.

    Args:
        norms: Total norms before clipping, any shape, in the order of the steps; those that are not finite or not above 0 are left
            out and counted.
        out_of_control: If True, the training is known to have gone out of control. If its norms also grew threefold from the first
            quarter to the last, the suggestion is the 90th percentile of the most stable quarter, that of the smallest median.
        is_sampled: If True, only some steps were logged, so that logging more often gives more norms.
        metric: Name of the norms, for the reasons.
        norm_type: Order p of the norms; None if it is unknown.

    Returns:
        The suggestion; None if no norm is finite and above 0.

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
    from_stable_quarter = quarters.grew and out_of_control
    max_norm = rounded(quarters.stable if from_stable_quarter else percentiles[ADVISED], ordered)
    outliers, largest = _share_above(ordered, threshold), float(ordered[-1])
    p50, p90, p99 = (f"{percentiles[percent]:.3g}" for percent in (50, 90, 99))
    source = (
        "The suggestion is the 90th percentile of the most stable quarter of the run, which went out of control later."
        if from_stable_quarter
        else "The suggestion is the 90th percentile: typical steps are left unchanged, the largest tenth is bounded."
    )
    left_out = len(values) - len(usable)
    outlier_text = (
        f"{outliers:.2%} of the norms are outliers: above {threshold:.3g}, three robust standard deviations over the median."
    )
    return Advice(
        steps=len(usable),
        left_out=left_out,
        percentiles=percentiles,
        largest=largest,
        max_norm=max_norm,
        clips=_share_above(ordered, max_norm),
        quarters=quarters.medians,
        outliers=outliers,
        reasons=(
            f"{metric}: p50 {p50}, p90 {p90}, p99 {p99}, largest {largest:.3g}.",
            *((f"{left_out} of {len(values)} norms are left out: NaN, inf or not above 0.",) if left_out else ()),
            source,
            *quarters.reasons(out_of_control=out_of_control, is_sampled=is_sampled),
            *(() if quarters.changed or not quarters.medians else (outlier_text,)),
        ),
        is_from_stable_quarter=from_stable_quarter,
        norm_type=norm_type,
    )


class _Quarters(NamedTuple):
    """The medians of the four quarters of a run, and the 90th percentile of the most stable one; empty for a short run."""

    medians: tuple[float, ...]
    stable: float

    @classmethod
    def of(cls, norms: Tensor) -> _Quarters:
        if len(norms) < MIN_NORMS_FOR_QUARTERS:
            return cls((), math.nan)
        quarters = [quarter.sort().values for quarter in norms.tensor_split(QUARTER_COUNT)]
        medians = tuple(_quantile(quarter, 0.5) for quarter in quarters)
        return cls(medians, _quantile(quarters[medians.index(min(medians))], ADVISED / 100))

    @property
    def grew(self) -> bool:
        return bool(self.medians) and self.medians[-1] >= CHANGED * self.medians[0]

    @property
    def changed(self) -> bool:
        return bool(self.medians) and max(self.medians) >= CHANGED * min(self.medians)

    def reasons(self, *, out_of_control: bool, is_sampled: bool) -> Iterator[str]:
        if not self.medians and is_sampled:
            yield (
                f"Fewer than {MIN_NORMS_FOR_QUARTERS} norms were logged: repeat this with a longer run, or log more often "
                "(Trainer(log_every_n_steps=…), in transformers logging_steps)."
            )
        elif not self.medians:
            yield f"Fewer than {MIN_NORMS_FOR_QUARTERS} steps: repeat this with a longer run."
        if self.changed:
            yield (
                f"The median of the norm was {', '.join(f'{median:.3g}' for median in self.medians)} in the four quarters of the "
                "run: no constant fits all of them. The adaptive limit follows norms that fall."
            )
        if self.grew and not out_of_control:
            yield (
                f"The norm grew: if the loss grew too, the training went out of control, and {self.stable:.2g}, from the most "
                "stable quarter, is better."
            )


def _named(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"clip_callbacks.{name}", "init_args": arguments}


def rounded(value: float, ordered: Tensor) -> float:
    """Round a threshold to two significant digits, or to more if that is needed to clip about the same norms.

    Args:
        value: Threshold above 0.
        ordered: Norms in ascending order.
    """
    exact = _share_above(ordered, value)
    candidates = (float(f"{value:.{digits}e}") for digits in range(1, 17))
    return next(
        (
            short
            for short in candidates
            if short < math.inf and abs(_share_above(ordered, short) - exact) <= ROUNDING_SHARE_TOLERANCE
        ),
        value,
    )


def robust_sigma(logs: Tensor) -> float:
    """Return 1.4826 times the median absolute deviation of logarithms of norms, but at least 0.05."""
    median = _quantile(logs.sort().values, 0.5)
    return max(MAD_TO_SIGMA * _quantile((logs - median).abs().sort().values, 0.5), LEAST_SIGMA)


def _threshold(ordered: Tensor, z: float) -> float:
    """Return the norm that is ``z`` robust standard deviations above the median, in logarithms."""
    logs = ordered.log()
    above = _quantile(logs, 0.5) + z * robust_sigma(logs)
    return math.exp(above) if above < HIGHEST_LOG else math.inf


def _share_above(ordered: Tensor, threshold: float) -> float:
    above = len(ordered) - int(torch.searchsorted(ordered, torch.tensor(threshold, dtype=ordered.dtype), right=True))
    return above / len(ordered)


def _quantile(ordered: Tensor, share: float) -> float:
    """Return a quantile with linear interpolation, as ``torch.quantile``, which takes at most 16 million values."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    return float(torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below))
