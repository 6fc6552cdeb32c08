"""A limit some robust standard deviations above the median of the last norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

import clip_callbacks.core.limits._window as norm_window
from clip_callbacks.core.arguments import as_choice, as_count, as_finite
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitState

MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution, divided by its median absolute deviation (MAD)."""

MAD_EFFICIENCY = 0.37
"""Efficiency of the MAD on normal data: n norms tell as much of the spread as 0.37 n would through the standard deviation."""

Scale: TypeAlias = Literal["log", "linear"]
"""Scale on which the median and the deviation are taken: that of the values' logarithms, or that of the values."""

MAX_WIDENING = 1.5
"""Largest ratio of the z-score in use to the one asked for, for the uncertainty of a small window."""


@dataclass(frozen=True)
class RobustZScoreLimit(Limit):
    r"""A limit z robust standard deviations above the median of the block's last norms, on a logarithmic scale.

    .. math::
        \ell_b = \exp\bigl(m + z' \cdot \max(1.4826 \cdot \text{MAD}, \text{floor})\bigr)

    with the median m and the median absolute deviation (MAD) of the logarithms of the block's last n norms, at most ``window``,
    without this step's; or, with ``scale="linear"``, of the values themselves, which may then be losses of any sign:

    .. math::
        \ell_b = m + z' \cdot \max(1.4826 \cdot \text{MAD}, \text{floor} \cdot |m|)

    The logarithm is there because gradient norms are heavy-tailed. The MAD of few norms is uncertain, so
    that :math:`z'` is larger than z, as quantiles of Student's t distribution are larger than those of the normal distribution,
    with :math:`\nu = 0.37 (n - 1)` degrees of freedom (0.37 is the efficiency of the MAD):

    .. math::
        z' = z + \frac{z^3 + z}{4 \nu} + \frac{5 z^5 + 16 z^3 + 3 z}{96 \nu^2}

    but at most 1.5 z: with so few norms, larger quantiles are not reliable yet.

    So the share of lognormal norms that is clipped is about what the normal distribution promises, for any scale and spread: 0.6 %
    with z = 2.5, and 0.13 % with z = 3. Up to half of the norms in the window may be spikes.

    A norm enters the window as it is clipped. After a lasting jump of the norms the limit follows within one or two windows.

    The state takes ``16 * window`` bytes for each block.

    Source: the "modified z-score" of Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993; the expansion of Student's t
    from Abramowitz and Stegun, equation 26.7.5. The logarithm, the floor and the use of Student's t are additions of this package.

    Args:
        z: Number of standard deviations above the median at which a spike begins, above 0.
        window: Number of norms that are kept for each block, at least 2.
        warmup: Number of norms of a block before it has a limit, at least 2 and at most ``window``.
        floor: Least standard deviation of the logarithms, 0 or more: with 0.05 and z = 2.5, norms up to 13 % above the median are
            never spikes, however equal the norms are. On the linear scale, the least standard deviation as a share of the median.
        scale: "log" for norms, and for losses above 0: a loss of 0 or below is never above the limit, and leaves no trace. "linear"
            for losses of any sign.

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
        """Return an empty window for each block."""
        return norm_window.empty(self.window, blocks)

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """Return the limit of each block, and the state after the step."""
        values = blocks.norms.double()
        median = norm_window.quantile(state, 0.5)
        spread = MAD_TO_SIGMA * norm_window.deviation(state, median)
        # Median and deviation of an empty window are inf and NaN. They are computed all the same, and selected away.
        limits = median + self._widened(norm_window.held(state)) * self._at_least(spread, median)
        limits = torch.where(state["count"] >= self.warmup, limits.exp() if self.scale == "log" else limits, math.inf)
        entering = torch.minimum(values, limits)
        # A norm of 0 belongs to a block without a gradient, while a loss of 0 is one like any other, if not to a logarithm.
        takes_all = blocks.are_losses and self.scale == "linear"
        is_new = torch.ones_like(values, dtype=torch.bool) if takes_all else values > 0
        # the logarithm of a value that does not enter may be -inf or NaN
        return limits, norm_window.add(entering.log() if self.scale == "log" else entering, is_new, state)

    def _at_least(self, spread: Tensor, median: Tensor) -> Tensor:
        """Return the standard deviation in use, shape ``(B,)``: the floor is a share of the values, on either scale."""
        return spread.clamp(min=self.floor) if self.scale == "log" else spread.maximum(self.floor * median.abs())

    def _widened(self, count: Tensor) -> Tensor:
        """Return z' for a deviation that is estimated from ``count`` norms, int64, shape ``(B,)``."""
        # as of two norms at least: fewer have no degree of freedom, and this would divide by 0
        z, freedom = self.z, MAD_EFFICIENCY * (count - 1).clamp(min=1).double()
        widened = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom.square())
        return widened.clamp(max=MAX_WIDENING * z)
