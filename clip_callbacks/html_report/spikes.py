"""Find spikes in hindsight: norms and losses that are far above those of neighbouring steps, before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from clip_callbacks.core.limits.robust_zscore import MAD_TO_SIGMA
from clip_callbacks.html_report.series import Series, Values
from clip_callbacks.stats.advice import robust_sigma

SPIKE_SIGMAS = 4.0
"""Least distance of a spike among norms above the median of its neighbours, in robust standard deviations of logarithms."""
SPIKE_WINDOW_NORMS = 31
"""Number of logged norms in the window around a norm that it is compared with, itself included."""
MIN_POINTS_FOR_SPIKES = 20
"""With fewer logged norms or losses, spikes cannot be told from ordinary ones."""
SIDE_WINDOW_LOSSES = 15
"""Number of losses on either side that a loss is compared with."""
MIN_LOSSES_BEFORE = 5
"""A loss with fewer losses before it is never a spike: a run begins with high losses."""
LOSS_SPIKE_SIGMAS = 6.0
"""Least distance of a spike among losses above the medians of its neighbours, in robust standard deviations."""
NOISE_WINDOW_LOSSES = 200
"""Least number of losses in a row that the spread of the losses is estimated from."""
UPPER_QUANTILE, UPPER_QUANTILE_SIGMAS = 0.9, 1.2816
"""A quantile of the losses above their level, and its distance from the median of a normal distribution."""
MIN_RELATIVE_SIGMA = 0.01
"""Least robust standard deviation of losses, as a share of their median: losses in bfloat16 are rounded to 0.4 %."""


class Spikes(NamedTuple):
    """Points of a metric that are spikes.

    Args:
        points: Steps and values of the spikes.
        height: Height of each above its neighbours, shape ``(n,)``: of a norm the ratio to the median of its window, of a loss the
            distance in robust standard deviations.
    """

    points: Series
    height: Values

    @property
    def worst(self) -> tuple[int, float, float]:
        """Step, value and height of the highest spike."""
        place = int(np.argmax(self.height))
        return int(self.points.steps[place]), float(self.points.values[place]), float(self.height[place])

    def without(self, steps: Sequence[int]) -> Spikes:
        """Return the spikes at other steps than these."""
        return self._where(~np.isin(self.points.steps, list(steps)))

    def highest(self, count: int) -> Spikes:
        """Return the highest spikes, in the order of their height."""
        return self._where(np.argsort(-self.height, kind="stable")[:count])

    def _where(self, index: npt.NDArray[np.generic]) -> Spikes:
        return Spikes(Series(self.points.steps[index], self.points.values[index]), self.height[index])


NO_SPIKES = Spikes(Series.empty(), np.empty(0))


def norm_spikes(norms: Series) -> Spikes:
    """Find norms that are far above those of neighbouring steps.

    A spike is four robust standard deviations (of at least 5 %) above the median of the window around it, in logarithms.

    Args:
        norms: Finite norms above 0.
    """
    if len(norms) < MIN_POINTS_FOR_SPIKES:
        return NO_SPIKES
    logs = np.log(norms.values)
    above = logs - pd.Series(logs).rolling(SPIKE_WINDOW_NORMS, center=True, min_periods=1).median().to_numpy()
    stands_out = above > SPIKE_SIGMAS * robust_sigma(torch.from_numpy(above))
    return Spikes(Series(norms.steps[stands_out], norms.values[stands_out]), np.exp(above[stands_out]))


def is_norm_spike(norm: float, step: int, norms: Series) -> bool:
    """Return whether the norm of a step that was not logged is far above the norms that were logged last before it."""
    before = norms.between(None, step - 1).values[-SPIKE_WINDOW_NORMS:]
    if len(before) < MIN_POINTS_FOR_SPIKES or not norm > 0:
        return False
    logs = torch.from_numpy(np.log(before))
    return math.log(norm) > float(logs.median()) + SPIKE_SIGMAS * robust_sigma(logs)


def loss_spikes(losses: Series) -> Spikes:
    """Find losses that are far above those of the steps before, and of the steps after.

    Losses may have any sign, and they drift: so a spike is six robust standard deviations (of at least 1 % of the median) above
    both the median of the 15 losses before it and that of the 15 after it. A loss that falls, or that jumps to a new level, is
    above one of them only.

    Args:
        losses: Finite losses.
    """
    if len(losses) < MIN_POINTS_FOR_SPIKES:
        return NO_SPIKES
    medians = pd.Series(losses.values).rolling(SIDE_WINDOW_LOSSES, min_periods=MIN_LOSSES_BEFORE).median()
    before = medians.shift(1).to_numpy()
    after = medians.shift(-SIDE_WINDOW_LOSSES).ffill().fillna(medians.iloc[-1]).to_numpy()
    sigma = _local_sigma(losses.values, 0.5 * (before + after))
    height = np.divide(losses.values - np.maximum(before, after), sigma, out=np.full(len(losses), np.nan), where=sigma > 0)
    stands_out = height > LOSS_SPIKE_SIGMAS
    return Spikes(Series(losses.steps[stands_out], losses.values[stands_out]), height[stands_out])


def _local_sigma(values: Values, level: Values) -> Values:
    """Estimate the standard deviation of losses above their level in each part of the run; 0 where it cannot be told.

    The noise of a loss is often skewed. So the 90th percentile counts too, and not only the median of the deviations.
    """
    part = np.minimum(np.arange(len(values)) // NOISE_WINDOW_LOSSES, max(len(values) // NOISE_WINDOW_LOSSES - 1, 0))
    deviations, levels = pd.Series(values - level), pd.Series(level)
    estimates = [
        MAD_TO_SIGMA * deviations.abs().groupby(part).median(),
        deviations.groupby(part).quantile(UPPER_QUANTILE) / UPPER_QUANTILE_SIGMAS,
        MIN_RELATIVE_SIGMA * levels.groupby(part).median().abs(),
    ]
    sigmas: Values = np.fmax.reduce([estimate.to_numpy() for estimate in estimates])
    return sigmas[part]
