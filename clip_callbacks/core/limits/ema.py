"""A limit relative to a running mean of the norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clip_callbacks.core.arguments import as_count, as_finite, as_max_norm
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitOfOne, LimitState, step_count, step_of_one


@dataclass(frozen=True)
class EmaLimit(Limit):
    r"""AdaGC: a multiple of the running mean of the block's own clipped norms.

    .. math::
        \ell_b = \text{factor} \cdot \gamma_b, \qquad
        \gamma_b \leftarrow \text{decay} \cdot \gamma_b + (1 - \text{decay}) \min(n_b, \ell_b)

    with the norm :math:`n_b` of block b before clipping, all in the unit of the gradients. In the first ``warmup`` steps all blocks
    are clipped together by their common norm N, and :math:`\gamma_b` is the least clipped norm so far:

    .. math::
        \ell_b = n_b \cdot \frac{\text{max\_norm}}{N}, \qquad \gamma_b \leftarrow \min\bigl(\gamma_b, \min(n_b, \ell_b)\bigr) .

    Meant for ``scope="parameter"``. In one step a limit grows by a share of at most (factor - 1) (1 - decay), which is 0.1 % with
    the defaults. So blocks with unusually small gradients during the warm-up, as below layers that are initialized to zero, learn
    slowly for a long time.

    Source: Wang and others, "AdaGC: Improving Training Stability for Large Language Model Pretraining", arXiv 2502.11034, algorithm
    1. Unlike there, a block's mean begins with its first norm above 0, whenever that comes.

    Args:
        factor: Ratio of the limit to the mean, above 0; the paper uses 1.05.
        decay: Share of the mean that is kept in each step, between 0 and 1.
        warmup: Number of first steps in which all blocks are clipped together, at least 0.
        max_norm: Limit of the common norm during the warm-up, above 0, in the unit of the gradients; inf is no limit.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> limit = EmaLimit(factor=1.5, decay=0.5, warmup=1, max_norm=5.0)
        >>> first, state = limit.step(BlockNorms(torch.tensor([6.0, 8.0])), limit.init(2))
        >>> second, state = limit.step(BlockNorms(torch.tensor([2.0, 9.0])), state)
        >>> first, second
        (tensor([3., 4.], dtype=torch.float64), tensor([4.5000, 6.0000], dtype=torch.float64))
    """

    factor: float = 1.05
    decay: float = 0.98
    warmup: int = 100
    max_norm: float | Literal["inf"] = 1.0

    def __post_init__(self) -> None:
        """Check every argument."""
        # as numbers, also where a configuration file has text; the class is frozen
        object.__setattr__(self, "factor", as_finite(self.factor, "factor"))
        object.__setattr__(self, "decay", as_finite(self.decay, "decay", high=1.0))
        as_count(self.warmup, "warmup", least=0)
        object.__setattr__(self, "max_norm", as_max_norm(self.max_norm))

    def init(self, blocks: int) -> LimitState:
        """Return means of inf, which stand for no mean yet, and a step count of 0."""
        return {"mean": torch.full((blocks,), math.inf, dtype=torch.float64, device="cpu"), "steps": step_count()}

    def _of_one(self, state: LimitState) -> LimitOfOne:
        """Return the limit in numbers of Python, for a single block on the host."""
        return _EmaOfOne(self, float(state["mean"]), int(state["steps"]))

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """Return the limit of each block, and the state after the step."""
        single = step_of_one(self, blocks, state)
        if single is not None:
            return single
        norms, mean = blocks.norms.double(), state["mean"]
        has_gradient = norms > 0
        is_warming_up = state["steps"] < self.warmup
        # without any gradient the total is 0, and 0 * inf is NaN: blocks of norm 0 have no limit here
        together = torch.where(has_gradient, norms * (float(self.max_norm) / blocks.total), math.inf)
        limits = torch.where(is_warming_up, together, self.factor * mean)
        seen = torch.minimum(norms, limits)
        # Both updates are computed and one is selected: an `if` on the step count would read it on the host.
        least = torch.minimum(mean, seen)
        # inf is no mean yet: the block's first norm, whenever it comes, is its first mean
        running = torch.where(mean < math.inf, self.decay * mean + (1.0 - self.decay) * seen, seen)
        # A norm of 0 in the warm-up would make the mean 0, and a limit of 0 would keep it there for good.
        after = torch.where(has_gradient, torch.where(is_warming_up, least, running), mean)
        return limits, {"mean": after, "steps": state["steps"] + 1}


class _EmaOfOne(LimitOfOne):
    """The arithmetic of :meth:`EmaLimit.step` with numbers."""

    __slots__ = ("_limit", "_mean", "_steps")

    def __init__(self, limit: EmaLimit, mean: float, steps: int) -> None:
        self._limit, self._mean, self._steps = limit, mean, steps

    def step(self, value: float, *, are_losses: bool = False) -> tuple[float, LimitOfOne]:
        own, mean, is_warming_up = self._limit, self._mean, self._steps < self._limit.warmup
        limit = own.factor * mean
        if is_warming_up:
            # the norm of the only block is that of all blocks together
            limit = math.inf
            if value > 0:
                limit = value * (float(own.max_norm) / value)
        if value > 0:
            seen = min(value, limit)
            if is_warming_up:
                mean = min(mean, seen)
            elif mean < math.inf:
                mean = own.decay * mean + (1.0 - own.decay) * seen
            else:
                mean = seen
        return limit, _EmaOfOne(own, mean, self._steps + 1)

    def state(self) -> LimitState:
        mean = torch.tensor([self._mean], dtype=torch.float64, device="cpu")
        return {"mean": mean, "steps": torch.tensor(self._steps, dtype=torch.int64, device="cpu")}
