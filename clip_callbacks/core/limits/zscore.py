"""A limit some standard deviations above the running mean of the norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from clip_callbacks.core.arguments import as_count, as_finite
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitOfOne, LimitState, step_of_one

Target: TypeAlias = Literal["reciprocal", "mean", "threshold"]
"""Norm that a spike is clipped to."""

MAX_RATIO_TO_MEAN = 10.0
"""Largest ratio to the mean so far of a norm that enters the state during the warm-up; a larger norm enters as that."""


@dataclass(frozen=True)
class ZScoreLimit(Limit):
    r"""ZClip: a limit on spikes, which are norms more than z standard deviations above the running mean of the block's norms.

    With the mean :math:`\mu` and the variance :math:`\sigma^2` of the block's norms before this step, a norm n is a spike if
    :math:`n > \mu + z \sigma`. Its limit depends on ``clip_to``:

    .. math::
        \ell = \mu + \frac{z^2 \sigma^2}{n - \mu} \;\text{("reciprocal")}, \qquad
        \ell = \mu \;\text{("mean")}, \qquad \ell = \mu + z \sigma \;\text{("threshold")}.

    All other norms have the limit :math:`\mu + z \sigma`. Then the clipped norm n enters the state:

    .. math::
        \mu \leftarrow \text{decay} \cdot \mu + (1 - \text{decay}) \, n, \qquad
        \sigma^2 \leftarrow \text{decay} \cdot \sigma^2 + (1 - \text{decay}) (n - \mu)^2 .

    The first ``warmup`` norms are not clipped, and :math:`\mu, \sigma^2` are their plain mean and variance, without a bias
    towards a start value. During the warm-up a norm enters the state as at most 10 times the mean so far.

    With z = 2.5 the normal distribution promises that 0.6 % of the norms are clipped; of normal norms about 1 % are, because the
    variance is a running one. But gradient norms are heavy-tailed, and of lognormal norms many times as many are clipped: see
    :class:`RobustZScoreLimit`. After a lasting jump of the norms, "reciprocal" and "mean" stay at the old level, because they let
    nothing else into the state; "threshold" follows.

    Source: Kumar, Owen, Chowdhury and Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv 2504.02507, equations 3
    to 9; "threshold" is the mode "percentile" of its code. Unlike there, no 1e-6 is added to :math:`\sigma`, which would matter for
    small losses, and there is no fixed limit beside it: ``TightestLimit(ZScoreLimit(), 1.0)`` has both.

    Args:
        z: Number of standard deviations above the mean at which a spike begins, above 0.
        decay: Share of the mean and the variance that is kept in each step, between 0 and 1.
        warmup: Number of norms of a block before it has a limit, at least 2.
        clip_to: Norm that a spike is clipped to: "reciprocal", which is closer to the mean the larger the spike, the "mean", or the
            "threshold".

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
        """Return means, variances and counts of 0."""
        nothing = torch.zeros(blocks, dtype=torch.float64, device="cpu")
        count = torch.zeros(blocks, dtype=torch.int64, device="cpu")
        return {"mean": nothing, "variance": nothing.clone(), "count": count}

    def _of_one(self, state: LimitState) -> LimitOfOne:
        """Return the limit in numbers of Python, for a single block on the host."""
        return _ZScoreOfOne(self, float(state["mean"]), float(state["variance"]), int(state["count"]))

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """Return the limit of each block, and the state after the step."""
        single = step_of_one(self, blocks, state)
        if single is not None:
            return single
        norms, mean, variance, count = blocks.norms.double(), state["mean"], state["variance"], state["count"]
        threshold = mean + self.z * variance.sqrt()
        is_warm = count >= self.warmup
        limits = torch.where(is_warm, self._limits(norms, mean, variance, threshold), torch.inf)
        # The first norm has no bound: the mean is still 0, and ten times 0 would let nothing in.
        seen = torch.minimum(norms, torch.where(is_warm | (count == 0), limits, MAX_RATIO_TO_MEAN * mean))
        # the weights 1 / n make plain means during the warm-up
        weight = torch.where(is_warm, 1.0 - self.decay, 1.0 / (count + 1).double())
        new_mean = mean + weight * (seen - mean)
        # The plain variance of the norms during the warm-up (Welford's update), and afterwards that of ZClip, equation 4.
        square = (seen - new_mean) * torch.where(is_warm, seen - new_mean, seen - mean)
        after = {"mean": new_mean, "variance": variance + weight * (square - variance), "count": count + 1}
        # a block without a gradient keeps all of its state, the count too
        return limits, {key: torch.where(norms > 0, value, state[key]) for key, value in after.items()}

    def _limits(self, norms: Tensor, mean: Tensor, variance: Tensor, threshold: Tensor) -> Tensor:
        """Return the limit of each block after the warm-up."""
        if self.clip_to == "threshold":
            return threshold
        of_spikes = mean
        if self.clip_to != "mean":
            of_spikes = mean + self.z**2 * variance / (norms - mean)
        # A norm at the mean divides by 0, and below it the sign changes. Neither is a spike, so that neither is selected.
        return torch.where(norms > threshold, of_spikes, threshold)


class _ZScoreOfOne(LimitOfOne):
    """The arithmetic of :meth:`ZScoreLimit.step` with numbers."""

    __slots__ = ("_count", "_limit", "_mean", "_variance")

    def __init__(self, limit: ZScoreLimit, mean: float, variance: float, count: int) -> None:
        self._limit, self._mean, self._variance, self._count = limit, mean, variance, count

    def step(self, value: float, *, are_losses: bool = False) -> tuple[float, LimitOfOne]:
        own, mean, variance, count = self._limit, self._mean, self._variance, self._count
        is_warm = count >= own.warmup
        if is_warm:
            bound = limit = self._of(value)
            weight = 1.0 - own.decay
        else:
            bound = limit = math.inf
            weight = 1.0 / (count + 1)
            if count:
                bound = MAX_RATIO_TO_MEAN * mean
        if value <= 0:
            return limit, self
        seen = min(value, bound)
        new_mean = mean + weight * (seen - mean)
        if is_warm:
            mean = new_mean
        square = (seen - new_mean) * (seen - mean)
        return limit, _ZScoreOfOne(own, new_mean, variance + weight * (square - variance), count + 1)

    def _of(self, value: float) -> float:
        """Return the limit of a value after the warm-up."""
        own, mean = self._limit, self._mean
        threshold = mean + own.z * math.sqrt(self._variance)
        if value <= threshold or own.clip_to == "threshold":
            return threshold
        if own.clip_to == "mean":
            return mean
        return mean + own.z**2 * self._variance / (value - mean)

    def state(self) -> LimitState:
        mean, variance = (torch.tensor([number], dtype=torch.float64, device="cpu") for number in (self._mean, self._variance))
        count = torch.tensor([self._count], dtype=torch.int64, device="cpu")
        return {"mean": mean, "variance": variance, "count": count}
