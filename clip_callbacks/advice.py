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
OFTEN = 0.005
"""Share of norms that stand out above which there is a tail; a lognormal distribution has 0.00135 of them."""
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
        max_norm: The suggestion, to two significant digits.
        clips: The share of the steps that it would have clipped.
        quarters: Medians of the run's four quarters; empty in a short run.
        outliers: Share of norms above median · exp(3 sigma), with sigma = 1.4826 MAD of their logarithms.
        adaptive: The class of the limit that is suggested if the threshold is to follow the norms.
        options: Its arguments.
        reasons: Sentences.
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

    @property
    def adaptive_call(self) -> str:
        """The adaptive limit as one writes it in Python."""
        return f"{self.adaptive}({', '.join(f'{key}={value:g}' for key, value in self.options.items())})"

    def configuration(self, *, adaptive: bool = False) -> dict[str, Any]:
        """What to put under LightningCLI's configuration, as nested dictionaries."""
        limit = {"class_path": f"clip_callbacks.{self.adaptive}", "init_args": dict(self.options)}
        clipping = {
            "class_path": "clip_callbacks.GradientClipping",
            "init_args": {"max_norm": limit if adaptive else self.max_norm},
        }
        return {"trainer": {"callbacks": [clipping]}}

    def facts(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "max_norm": self.max_norm,
            "clips": self.clips,
            "adaptive": {"class_path": f"clip_callbacks.{self.adaptive}", "init_args": self.options},
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


def advise(norms: Tensor) -> Advice | None:
    r"""Suggest a max_norm from the total norms of a run, in the order of its steps.

    The suggestion is the 90th percentile of the norms, rounded to two digits: it leaves the typical step alone and bounds the
    largest tenth. Pascanu, Mikolov and Bengio (ICML 2013) set the threshold from the average norm over many updates in the same
    way, and found values from half to ten times that average to work. If the norms *grow* threefold over the run, which a run that
    goes out of control does, it is that of the calmest quarter of the steps.

    The adaptive limit is ``QuantileLimit(0.9)``, which clips a tenth of the steps at any scale, if the medians of the run's
    quarters differ threefold; else ``RobustZScoreLimit``, which clips only what stands out.

    Args:
        norms: Total norms before clipping, any shape, in the order of the steps; those that are not finite or not above 0 are left
            out and counted.

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
    changed = max(medians) / min(medians) if medians else 1.0
    grew = bool(medians) and medians[-1] / min(medians) >= CHANGED
    basis = quarters[medians.index(min(medians))] if grew else ordered
    percentiles = {percent: _quantile(ordered, percent / 100) for percent in PERCENTILES}
    max_norm = two_digits(_quantile(basis, ADVISED / 100))
    outliers = float((sound > _threshold(ordered, STANDS_OUT)).double().mean())
    clips = float((sound > max_norm).double().mean())
    has_changed = changed >= CHANGED
    adaptive, options = ("QuantileLimit", {"quantile": 0.9}) if has_changed else ("RobustZScoreLimit", {"z": STANDS_OUT})
    p50, p90, p99, largest = (f"{value:.3g}" for value in (*(percentiles[key] for key in (50, 90, 99)), float(ordered[-1])))
    reasons = [f"total_norm: p50 {p50}, p90 {p90}, p99 {p99}, largest {largest}."]
    if grew:
        reasons.append(
            f"The norm grew: its median was {_listed(medians)} in the four quarters of the run. The suggestion is the "
            f"90th percentile "
            "of the calmest quarter; those of the whole run are of a network that was going out of control."
        )
    else:
        reasons.append("It is their 90th percentile: the typical step is left alone, the largest tenth is bounded.")
    if has_changed and not grew:
        reasons.append(
            f"The norm changed {changed:.2g}-fold: its median was {_listed(medians)} in the four quarters of the run. "
            f"One number "
            "cannot fit all of them; QuantileLimit follows."
        )
    elif not has_changed:
        tail = "a tail that clipping is for" if outliers > OFTEN else "hardly any: max_norm is an insurance"
        reasons.append(f"{outliers:.2%} of the steps stand out (three robust standard deviations above the median): {tail}.")
    left_out = len(values) - len(sound)
    return Advice(
        steps=len(sound),
        left_out=left_out,
        percentiles=percentiles,
        largest=float(ordered[-1]),
        max_norm=max_norm,
        clips=clips,
        quarters=medians,
        outliers=outliers,
        adaptive=adaptive,
        options=options,
        reasons=tuple(reasons),
    )


def two_digits(value: float) -> float:
    """Round a number above 0 to two significant digits."""
    return float(f"{value:.1e}")


def robust_threshold(norms: Tensor, z: float) -> float:
    """The norm that is ``z`` robust standard deviations above the median, in logarithms; ``norms`` above 0, float64."""
    return _threshold(norms.sort().values, z)


def _threshold(ordered: Tensor, z: float) -> float:
    logs = ordered.log()
    median = _quantile(logs, 0.5)
    sigma = MAD_TO_SIGMA * _quantile((logs - median).abs().sort().values, 0.5)
    return math.exp(min(median + z * sigma, 700.0))


def _quantile(ordered: Tensor, share: float) -> float:
    """With linear interpolation, as ``torch.quantile``, which takes 16 million values at most."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    return float(torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below))


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
