"""Which max_norm? An answer from the norms of a run, with its reasons in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

PERCENTILES = (1, 10, 25, 50, 75, 90, 95, 99)

ADVISED, QUANTILE = 90, 0.9
"""The percentile that is advised: what it clips are the largest 10 % of the steps."""
QUARTER_COUNT = 4
MIN_NORMS_FOR_QUARTERS = 40
"""Fewer norms than these are not divided into quarters."""
CHANGED = 3.0
"""By this factor the medians of quarters must differ for a run to have changed: lognormal norms do not by chance."""
STANDS_OUT = 3.0
"""A norm stands out that is so many robust standard deviations above the median, in logarithms."""
SAME = 0.02
"""By so much the share of steps that a rounded threshold clips may differ."""
LEAST_SIGMA = 0.05
"""The floor of RobustZScoreLimit too."""
EUCLIDEAN = 2.0
HIGHEST_LOG = math.log(1.79e308)
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
        reasons: Sentences.
        is_from_stable_quarter: Whether the suggestion is made from the calmest quarter of a run that went out of control.
        norm_type: The order p of the norms, if it is known.
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
        """The limit that sets itself, as one writes it in Python."""
        return f"Tightest(QuantileLimit({QUANTILE:g}), {self.max_norm:g})"

    def configuration(self, *, adaptive: bool = False) -> dict[str, Any]:
        """What to put under LightningCLI's configuration, as nested dictionaries."""
        limit = self._adaptive if adaptive else self.max_norm
        return {"trainer": {"callbacks": [_named("GradientClipping", max_norm=limit, **self._order)]}}

    @property
    def _order(self) -> dict[str, float | str]:
        """The argument for the order of the norm, if it is another than 2, which GradientClipping takes by itself."""
        if self.norm_type is None or self.norm_type == EUCLIDEAN:
            return {}
        return {"norm_type": "inf" if math.isinf(self.norm_type) else self.norm_type}

    @property
    def _adaptive(self) -> dict[str, Any]:
        return _named("Tightest", limits=[_named("QuantileLimit", quantile=QUANTILE), self.max_norm])

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
        } | self._order

    def describe(self) -> str:
        """A few lines of text."""
        lines = [f"max_norm={self.max_norm:g} would have clipped {self.clips:.1%} of {self.steps} steps."]
        lines += [f"  - {reason}" for reason in self.reasons]
        return "\n".join([*lines, f"Or a limit that sets itself, never above that: {self.adaptive_call}."])


def advise(
    norms: Tensor,
    *,
    out_of_control: bool = False,
    is_sampled: bool = False,
    metric: str = "total_norm",
    norm_type: float | None = None,
) -> Advice | None:
    r"""Suggest a max_norm from the total norms of a run, in the order of its steps.

    The suggestion is the 90th percentile of the norms, rounded to two digits, or to more where that would clip other steps: it
    leaves the typical step alone and bounds the largest tenth. Pascanu, Mikolov and Bengio (ICML 2013) set the threshold from the
    average norm over many updates in the same way, and found values from half to ten times that average to work.

    The limit that sets itself is ``Tightest(QuantileLimit(0.9), max_norm)``: never above the number, so that it is as safe, and
    below it where norms fall, of which it goes on clipping a tenth. An adaptive limit alone follows a run that goes out of control.

    Args:
        norms: Total norms before clipping, any shape, in the order of the steps; those that are not finite or not above 0 are left
            out and counted.
        out_of_control: Whether the run is known to have gone out of control. If its norms grew threefold from the first quarter to
            the last, the suggestion then is the 90th percentile of the calmest quarter.
        is_sampled: Whether the norms are those of some steps only, of which a log may hold more.
        metric: The name of the norms.
        norm_type: The order p of the norms, if it is known.

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
    ordered, quarters = sound.sort().values, _Quarters.of(sound)
    percentiles = {percent: _quantile(ordered, percent / 100) for percent in PERCENTILES}
    threshold = _threshold(ordered, STANDS_OUT)
    from_stable_quarter = quarters.grew and out_of_control
    max_norm = rounded(quarters.stable if from_stable_quarter else percentiles[ADVISED], ordered)
    outliers, largest = _share_above(ordered, threshold), float(ordered[-1])
    p50, p90, p99 = (f"{percentiles[percent]:.3g}" for percent in (50, 90, 99))
    source = (
        "It is the 90th percentile of the run's calmest quarter: the run went out of control later."
        if from_stable_quarter
        else "It is their 90th percentile: the typical step is left alone, the largest tenth is bounded."
    )
    left_out = len(values) - len(sound)
    stand_out = f"{outliers:.2%} of the steps stand out: above {threshold:.3g}, three robust standard deviations from the median."
    return Advice(
        steps=len(sound),
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
            *(() if quarters.changed or not quarters.medians else (stand_out,)),
        ),
        is_from_stable_quarter=from_stable_quarter,
        norm_type=norm_type,
    )


class _Quarters(NamedTuple):
    """The four quarters of a run: their medians, and the 90th percentile of the calmest one; nothing of a short run."""

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
                "run: no number fits all of them. The limit that sets itself follows where they fall."
            )
        if self.grew and not out_of_control:
            yield (
                f"It grew: if the loss did too, the run went out of control, and {self.stable:.2g}, from the calmest quarter, is "
                "better."
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


def _quantile(ordered: Tensor, share: float) -> float:
    """With linear interpolation, as ``torch.quantile``, which takes 16 million values at most."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    return float(torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below))
