"""Limits so many standard deviations above the usual norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

import clip_callbacks.core.limits._window as last_norms
from clip_callbacks.core.arguments import as_count, as_finite
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitState

Target: TypeAlias = Literal["reciprocal", "mean", "threshold"]

ROOM = 10.0
"""How many times as large as the mean so far a norm may be that is learnt from before there is a limit."""

MAD_OF_A_NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""

EFFICIENCY_OF_THE_MAD = 0.37
"""Against the standard deviation, on normal data: n norms tell as much as 0.37 n would of the latter."""

MOST_WIDENING = 1.5
"""How many times as large as asked for a z-score may become for the uncertainty of a small window."""


@dataclass(frozen=True)
class ZScoreLimit(Limit):
    r"""ZClip: a norm more than z standard deviations above the running mean is a spike, and is cut.

    With mean :math:`\mu` and variance :math:`\sigma^2` of the block's norms before this step, a norm is a spike where
    :math:`n > \mu + z \sigma`, and its limit is, by ``clip_to``,

    .. math::
        \ell = \mu + \frac{z^2 \sigma^2}{n - \mu} \;\text{("reciprocal")}, \qquad
        \ell = \mu \;\text{("mean")}, \qquad \ell = \mu + z \sigma \;\text{("threshold")}.

    Other norms have the limit :math:`\mu + z \sigma`. Then, with the norm as clipped,

    .. math::
        \mu \leftarrow \text{decay} \cdot \mu + (1 - \text{decay}) \, n, \qquad
        \sigma^2 \leftarrow \text{decay} \cdot \sigma^2 + (1 - \text{decay}) (n - \mu)^2 .

    The first ``warmup`` norms are not limited, and :math:`\mu, \sigma^2` their plain mean and variance: no bias towards a start
    value. Before there is a limit a norm counts as at most 10 times the mean so far.

    For z = 2.5 the normal distribution promises 0.6 % of cut norms, and about 1 % of normal ones are, since the variance is a
    running one. Norms are heavy-tailed: of lognormal ones it cuts many times as many; see :class:`RobustZScoreLimit`. After a
    lasting jump of the norms "reciprocal" and "mean" hold on to the old level, since what they let through is the old level;
    "threshold" follows.

    Source: Kumar, Owen, Chowdhury and Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv 2504.02507, equations 3
    to 9; "threshold" is the mode "percentile" of its code. Unlike there, no 1e-6 beside :math:`\sigma`, which would matter for
    small losses, and no further fixed limit: ``TightestLimit(ZScoreLimit(), 1.0)`` has both.

    Args:
        z: How many standard deviations above the mean a spike begins, above 0.
        decay: Of mean and variance for each step, between 0 and 1.
        warmup: How many norms a block must have shown before it has a limit, at least 2.
        clip_to: What a spike is cut to: the further out, the closer to the mean ("reciprocal"); the "mean"; or the "threshold".

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> limit = ZScoreLimit(z=2.0, warmup=2)
        >>> state = limit.init(1)
        >>> for norm in (1.0, 3.0, 10.0):
        ...     value, state = limit.step(BlockNorms(torch.tensor([norm])), state)
        >>> value  # 2 + 2² · 1² / (10 - 2)
        tensor([2.5000], dtype=torch.float64)
    """

    z: float = 2.5
    decay: float = 0.97
    warmup: int = 25
    clip_to: Target = "reciprocal"

    def __post_init__(self) -> None:
        """Check every argument."""
        object.__setattr__(self, "z", as_finite(self.z, "z"))
        object.__setattr__(self, "decay", as_finite(self.decay, "decay", high=1.0))
        as_count(self.warmup, "warmup", least=2)
        if self.clip_to not in get_args(Target):
            raise ValueError(f"`clip_to` must be one of {', '.join(get_args(Target))}, got {self.clip_to!r}.")

    def init(self, blocks: int) -> LimitState:
        """Nothing seen."""
        nothing = torch.zeros(blocks, dtype=torch.float64)
        return {"mean": nothing, "variance": nothing.clone(), "count": torch.zeros(blocks, dtype=torch.int64)}

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """A limit for each block."""
        norms, mean, variance, count = blocks.norms.double(), state["mean"], state["variance"], state["count"]
        threshold = mean + self.z * variance.sqrt()
        is_warm = count >= self.warmup
        limits = torch.where(is_warm, self._cut(norms, mean, variance, threshold), torch.inf)
        seen = torch.minimum(norms, torch.where(is_warm | (count == 0), limits, ROOM * mean))
        weight = torch.where(is_warm, 1.0 - self.decay, 1.0 / (count + 1).double())
        new_mean = mean + weight * (seen - mean)
        # of the norms of the warm-up the plain variance, afterwards that of ZClip, equation 4
        square = (seen - new_mean) * torch.where(is_warm, seen - new_mean, seen - mean)
        after = {"mean": new_mean, "variance": variance + weight * (square - variance), "count": count + 1}
        return limits, {key: torch.where(norms > 0, value, state[key]) for key, value in after.items()}

    def _cut(self, norms: Tensor, mean: Tensor, variance: Tensor, threshold: Tensor) -> Tensor:
        if self.clip_to == "threshold":
            return threshold
        cut = mean if self.clip_to == "mean" else mean + self.z**2 * variance / (norms - mean)
        return torch.where(norms > threshold, cut, threshold)


@dataclass(frozen=True)
class RobustZScoreLimit(Limit):
    r"""So many robust standard deviations above the median, in log space: gradient norms are heavy-tailed.

    .. math::
        \ell_b = \exp\bigl(m + z' \cdot \max(1.4826 \cdot \text{MAD}, \text{floor})\bigr)

    with median m and median absolute deviation of the logarithms of the block's last n norms, up to ``window``, this step's not
    included. The deviation of so few norms is uncertain, and so :math:`z'` lies above z as Student's t of
    :math:`\nu = 0.37 (n - 1)` degrees of freedom above the normal distribution (0.37 is the efficiency of the MAD):

    .. math::
        z' = z + \frac{z^3 + z}{4 \nu} + \frac{5 z^5 + 16 z^3 + 3 z}{96 \nu^2}

    but at most 1.5 z: so few norms cannot vouch for larger ones.

    Thus it cuts about as many lognormal norms, of whatever scale and spread, as the normal distribution promises: for z = 2.5
    0.6 %, for z = 3 0.13 %. Up to half of the window may be spikes.

    A norm enters the window as clipped. After a lasting jump of the norms the limit follows within one window or two.

    Remembers ``16 * window`` bytes for each block.

    Source: the "modified z-score" of Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993; the quantile of Student's t
    by Abramowitz and Stegun, 26.7.5. The logarithm, the floor and the widening are ours.

    Args:
        z: How many standard deviations above the median a spike begins, above 0.
        window: How many norms of each block are remembered, at least 2.
        warmup: How many norms a block must have shown before it has a limit, at least 2.
        floor: The least standard deviation of the logarithms, 0 or more: with 0.05, norms up to 13 % above the median are no spikes
            for z = 2.5, however alike the norms are.

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

    def __post_init__(self) -> None:
        """Check every argument."""
        object.__setattr__(self, "z", as_finite(self.z, "z"))
        object.__setattr__(self, "floor", as_finite(self.floor, "floor", low_too=True))
        as_count(self.window, "window", least=2)
        as_count(self.warmup, "warmup", least=2)
        if self.warmup > self.window:
            raise ValueError(f"`warmup` must be at most `window`, got {self.warmup} and {self.window}: it holds no more.")

    def init(self, blocks: int) -> LimitState:
        """An empty window."""
        return last_norms.empty(self.window, blocks)

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """A limit for each block."""
        norms = blocks.norms.double()
        median = last_norms.quantile(state, 0.5)
        spread = (MAD_OF_A_NORMAL * last_norms.deviation(state, median)).clamp(min=self.floor)
        limits = torch.where(
            state["count"] >= self.warmup, (median + self._widened(last_norms.held(state)) * spread).exp(), math.inf
        )
        return limits, last_norms.add(torch.minimum(norms, limits).log(), norms > 0, state)

    def _widened(self, count: Tensor) -> Tensor:
        """The z-score for a deviation that is known from so many norms."""
        z, freedom = self.z, EFFICIENCY_OF_THE_MAD * (count - 1).clamp(min=1).double()
        widened = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom.square())
        return widened.clamp(max=MOST_WIDENING * z)
