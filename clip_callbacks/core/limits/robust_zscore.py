"""A limit some robust standard deviations above the median of the last norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

import clip_callbacks.core.limits._tail as upper_tail
import clip_callbacks.core.limits._window as norm_window
from clip_callbacks.core.arguments import as_choice, as_count, as_finite
from clip_callbacks.core.limits._window_of_one import WindowOfOne
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitOfOne, LimitState, step_of_one

MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution, divided by its median absolute deviation (MAD)."""

MAD_EFFICIENCY = 0.37
"""Efficiency of the MAD on normal data: n norms tell as much of the spread as 0.37 n would through the standard deviation."""

Scale: TypeAlias = Literal["log", "linear"]
"""Scale on which the median and the deviation are taken: that of the values' logarithms, or that of the values."""

MAX_WIDENING = 1.5
"""Largest ratio of the z-score in use to the one asked for, for the uncertainty of a small window."""

FROM_FAR_TO_EXTREME = upper_tail.FAR, upper_tail.EXTREME
"""Robust standard deviations above the median between which a value counts for the tail."""

MAX_WIDENING_OF_TAIL = 3.0
"""Largest ratio of the z-score in use to the one asked for, for a heavy tail too."""


@dataclass(frozen=True)
class RobustZScoreLimit(Limit):
    r"""A limit z robust standard deviations above the median of the block's last values, on a logarithmic or a linear scale.

    With ``scale="log"``, for norms, which are heavy-tailed:

    .. math::
        \ell_b = \exp\bigl(m + z' \cdot \max(1.4826 \cdot \text{MAD}, \text{floor})\bigr)

    with the median m and the median absolute deviation (MAD) of the logarithms of the block's last n norms, at most ``window``,
    without this step's. The MAD of few norms is uncertain, so that :math:`z'` is larger than z, as quantiles of Student's t
    distribution are larger than those of the normal distribution, with :math:`\nu = 0.37 (n - 1)` degrees of freedom (0.37 is the
    efficiency of the MAD):

    .. math::
        z' = z + \frac{z^3 + z}{4 \nu} + \frac{5 z^5 + 16 z^3 + 3 z}{96 \nu^2}

    but at most 1.5 z: with so few norms, larger quantiles are not reliable yet.

    So the share of lognormal norms that is clipped is about what the normal distribution promises, for any scale and spread: 0.6 %
    with z = 2.5, and 0.13 % with z = 3. Up to half of the norms in the window may be spikes.

    With ``scale="linear"``, for losses, which may have any sign, m and MAD are those of the values themselves:

    .. math::
        \ell_b = m + z'' \cdot \max(1.4826 \cdot \text{MAD}, \text{floor} \cdot |m|), \qquad
        z'' = \min\bigl(z' \cdot \exp(h z^2 / 2),\ 3 z\bigr)

    where h is the weight of the upper tail, as in Tukey's h distribution, 0 for a normal one. It is estimated from the share p of
    the values, in about the last 1000, that lie more than 2.5 robust standard deviations above the median of their time, and not
    above both the limit and 6 standard deviations: :math:`h = 1.4 \cdot 2 \ln(2.5 / q) / q^2` with :math:`q = -\Phi^{-1}(p)`,
    between 1 and 2.5. At first p is 2 %, as if of 100 values, which takes tails for heavy until some hundred values are known.

    So the share of ordinary losses above the limit is less than twice the share of a normal distribution beyond z, for z from 2 to
    4, measured on 6 million losses of the steps 500 to 2500: normal ones, also falling or slowly rising, and those with Student's
    t of 10, 7 or 5 degrees of freedom. With 3 degrees of freedom it is so for z up to 3, and with z = 4 it is 14 times that share,
    because the limit stays within 3 z, above which hardly any spike would be found. (:math:`z'` alone would give 80 times with 5
    degrees of freedom, and 250 times with 3.) Of jumps by 8 robust standard deviations, z = 4 finds 97 % in normal losses, 57 %
    with 10 degrees of freedom and 8 % with 5; z = 3 finds 100 %, 99 % and 90 %. More than 4 is rarely useful.

    A value enters the window as it is clipped. After a lasting jump the limit follows within one or two windows.

    The state takes ``16 * window`` bytes for each block.

    Source: the "modified z-score" of Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993; the expansion of Student's t
    from Abramowitz and Stegun, equation 26.7.5; the h distribution of Tukey, "Exploratory Data Analysis", 1977. The logarithm, the
    floor, the use of Student's t and the estimate of h are additions of this package.

    Args:
        z: Number of standard deviations above the median at which a spike begins, above 0. For losses take 4.
        window: Number of values that are kept for each block, at least 2.
        warmup: Number of values of a block before it has a limit, at least 2 and at most ``window``.
        floor: Least standard deviation, 0 or more. On the logarithmic scale it is one of logarithms: with 0.05 and z = 2.5, norms
            up to 13 % above the median are never spikes, however equal the norms are. On the linear scale it is a share of the
            median; for losses, which vary less than norms, take 0.01. While the deviation is 0 on the linear scale, because most
            losses are equal and the floor is 0 or their median, there is no limit.
        scale: "log" for norms, and for losses above 0: a loss of 0 or below is never above the limit, and leaves no trace. "linear"
            for losses of any sign. Scaled values give scaled limits on both; on the linear scale with a floor of 0, shifted values
            also give shifted limits.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> limit = RobustZScoreLimit(z=2.0, warmup=3)
        >>> state = limit.init(1)
        >>> for norm in (0.5, 1.0, 2.0, 1000.0):
        ...     value, state = limit.step(BlockNorms(torch.tensor([norm])), state)
        >>> value.item() > 7.8093  # exp(log 1 + 2 · 1.4826 · log 2), and more for so few norms
        True
    """

    z: float = 2.5
    window: int = 128
    warmup: int = 25
    floor: float = 0.05
    scale: Scale = "log"

    def __post_init__(self) -> None:
        """Check every argument."""
        object.__setattr__(self, "z", as_finite(self.z, "z"))
        object.__setattr__(self, "floor", as_finite(self.floor, "floor", low_too=True))
        object.__setattr__(self, "scale", as_choice(self.scale, "scale", get_args(Scale)))
        as_count(self.window, "window", least=2)
        as_count(self.warmup, "warmup", least=2)
        if self.warmup > self.window:
            raise ValueError(
                f"`warmup` must be at most `window`, got {self.warmup} and {self.window}: a window holds no more norms."
            )

    @property
    def takes_losses(self) -> bool:
        """True on both scales; on the logarithmic one, losses of 0 or below are never above the limit, and leave no trace."""
        return True

    def init(self, blocks: int) -> LimitState:
        """Return an empty window for each block and, on the linear scale, the first share of values far above the median."""
        window = norm_window.empty(self.window, blocks)
        return window if self.scale == "log" else window | {"tail": upper_tail.empty(blocks)}

    def _of_one(self, state: LimitState) -> LimitOfOne:
        """Return the limit in numbers of Python, for a single block on the host."""
        window = WindowOfOne.of(state)
        return _LogarithmsOfOne(self, window) if self.scale == "log" else _ValuesOfOne(self, window, float(state["tail"]))

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """Return the limit of each block, and the state after the step."""
        single = step_of_one(self, blocks, state)
        if single is not None:
            return single
        return self._of_logarithms(blocks, state) if self.scale == "log" else self._of_values(blocks, state)

    def _of_logarithms(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        norms = blocks.norms.double()
        median, deviation = self._measured(state)
        (z,) = _widened(state, self.z)
        limits = (median + z * deviation.clamp(min=self.floor)).exp()
        limits = torch.where(state["count"] >= self.warmup, limits, math.inf)
        # The logarithm of a number of 0 or below is -inf or NaN, which never enters: such a number is not new.
        return limits, norm_window.add(torch.minimum(norms, limits).log(), norms > 0, state)

    def _of_values(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        values, is_warm = blocks.norms.double(), state["count"] >= self.warmup
        median, deviation = self._measured(state)
        deviation = deviation.maximum(self.floor * median.abs())
        z, far, extreme = _widened(state, self.z, *FROM_FAR_TO_EXTREME)
        z = (z * upper_tail.widening(state["tail"], self.z)).clamp(max=MAX_WIDENING_OF_TAIL * self.z)
        # Losses that are all 0, or mostly, have no deviation, not even a floor: whatever is above 0 would be a spike.
        limits = torch.where(is_warm & (deviation > 0), median + z * deviation, math.inf)
        # a norm of 0 is that of a block without a gradient, while a loss of 0 is one like any other
        is_new = torch.ones_like(is_warm) if blocks.are_losses else values > 0
        # A spike says nothing about the tail of ordinary values: spikes in one of a hundred steps would hide those that follow.
        is_far = (values > median + far * deviation) & (values <= limits.maximum(median + extreme * deviation))
        tail = upper_tail.add(state["tail"], is_far, state["count"] - self.warmup)
        after = norm_window.add(torch.minimum(values, limits), is_new, state)
        return limits, after | {"tail": torch.where(is_new & is_warm, tail, state["tail"])}

    def _measured(self, state: LimitState) -> tuple[Tensor, Tensor]:
        """Return the median and the robust standard deviation of each window, shape ``(B,)``."""
        # inf and NaN for an empty window: they are computed on all the same, and selected away
        median, deviation = norm_window.median_and_deviation(state)
        return median, MAD_TO_SIGMA * deviation


def _widened(state: LimitState, *zs: float) -> list[Tensor]:
    """Return the z-scores in use for a deviation that is estimated from so few values, each of shape ``(B,)``."""
    # as of two values at least: fewer have no degree of freedom, and this would divide by 0
    inverse = (MAD_EFFICIENCY * (norm_window.held(state) - 1).clamp(min=1).double()).reciprocal()
    terms = [(z, *_expansion(z)) for z in zs]
    return [(z + inverse * (first + inverse * second)).clamp(max=MAX_WIDENING * z) for z, first, second in terms]


class _LogarithmsOfOne(LimitOfOne):
    """The arithmetic of :meth:`RobustZScoreLimit._of_logarithms` with numbers."""

    __slots__ = ("_limit", "_window")

    def __init__(self, limit: RobustZScoreLimit, window: WindowOfOne) -> None:
        self._limit, self._window = limit, window

    def step(self, value: float, *, are_losses: bool = False) -> tuple[float, LimitOfOne]:
        own, window, limit = self._limit, self._window, math.inf
        if window.count >= own.warmup:
            median, deviation = window.median_and_deviation()
            limit = _exp(median + _widened_of_one(window.held, own.z) * max(MAD_TO_SIGMA * deviation, own.floor))
        if value <= 0:
            return limit, self
        return limit, _LogarithmsOfOne(own, window.added(math.log(min(value, limit))))

    def state(self) -> LimitState:
        return self._window.state()


class _ValuesOfOne(LimitOfOne):
    """The arithmetic of :meth:`RobustZScoreLimit._of_values` with numbers."""

    __slots__ = ("_limit", "_tail", "_window")

    def __init__(self, limit: RobustZScoreLimit, window: WindowOfOne, tail: float) -> None:
        self._limit, self._window, self._tail = limit, window, tail

    def step(self, value: float, *, are_losses: bool = False) -> tuple[float, LimitOfOne]:
        own, window, tail, limit = self._limit, self._window, self._tail, math.inf
        if window.count >= own.warmup:
            median, deviation = window.median_and_deviation()
            deviation = max(MAD_TO_SIGMA * deviation, own.floor * abs(median))
            held, most = window.held, MAX_WIDENING_OF_TAIL * own.z
            if deviation > 0:
                z = _widened_of_one(held, own.z) * upper_tail.widening_of_one(tail, own.z)
                limit = median + min(z, most) * deviation
            far = median + _widened_of_one(held, upper_tail.FAR) * deviation
            # most values are not far, and need no look at the other bound
            is_far = far < value <= max(limit, median + _widened_of_one(held, upper_tail.EXTREME) * deviation)
            tail = upper_tail.add_of_one(tail, is_far, window.count - own.warmup)
        if value <= 0 and not are_losses:
            return limit, self
        return limit, _ValuesOfOne(own, window.added(min(value, limit)), tail)

    def state(self) -> LimitState:
        return self._window.state() | {"tail": torch.tensor([self._tail], dtype=torch.float64, device="cpu")}


@lru_cache(maxsize=4096)  # of a full window the same at each step
def _widened_of_one(held: int, z: float) -> float:
    inverse, (first, second) = 1.0 / (MAD_EFFICIENCY * max(held - 1, 1)), _expansion(z)
    return min(z + inverse * (first + inverse * second), MAX_WIDENING * z)


@cache
def _expansion(z: float) -> tuple[float, float]:
    """Return the coefficients of 1 / nu and of its square in the expansion of Student's t."""
    return (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96


def _exp(power: float) -> float:
    try:
        return math.exp(power)
    except OverflowError:  # where torch returns inf
        return math.inf
