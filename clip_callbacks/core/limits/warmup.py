"""A limit with another one in the first steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from clip_callbacks.core.arguments import as_count
from clip_callbacks.core.limits._nested import each_of_one, init_each, joined_state, step_each
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitOfOne, LimitState, step_count
from clip_callbacks.core.limits.fixed import as_limit


@dataclass(frozen=True)
class WarmupLimit(Limit):
    r"""One limit for the first steps, and another one from then on.

    .. math::
        \ell_b(t) = \begin{cases} \ell_b^{\text{warmup}}(t) & t < \text{steps} \\ \ell_b(t) & \text{otherwise} \end{cases}

    where t is the number of optimizer steps taken before this one. Both limits see every step: an adaptive ``limit`` learns the
    usual norms while a fixed ``warmup_limit`` keeps the first steps short.

    Args:
        limit: Limit after the warm-up; a number is a fixed limit.
        steps: Length of the warm-up in optimizer steps, at least 1; skipped steps do not count.
        warmup_limit: Limit during the warm-up; a number is a fixed limit, and inf is none.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> limit = WarmupLimit(5.0, steps=1, warmup_limit=0.5)
        >>> first, state = limit.step(BlockNorms(torch.ones(1)), limit.init(1))
        >>> first, limit.step(BlockNorms(torch.ones(1)), state)[0]
        (tensor([0.5000]), tensor([5.]))
    """

    limit: float | Limit
    steps: int = field(kw_only=True)
    warmup_limit: float | Literal["inf"] | Limit = field(kw_only=True)

    def __post_init__(self) -> None:
        """Check every argument."""
        # converted once, so that a number and its FixedLimit make equal limits, of one kind in checkpoints
        object.__setattr__(self, "limit", as_limit(self.limit, "limit"))
        object.__setattr__(self, "warmup_limit", as_limit(self.warmup_limit, "warmup_limit"))
        as_count(self.steps, "steps", least=1)

    @property
    def _both(self) -> dict[str, Limit]:
        return {"warmup_limit": as_limit(self.warmup_limit), "limit": as_limit(self.limit)}

    @property
    def uses_weights(self) -> bool:
        """Whether either limit needs the norms of the parameters."""
        return any(limit.uses_weights for limit in self._both.values())

    @property
    def takes_losses(self) -> bool:
        """Whether both limits take losses."""
        return all(limit.takes_losses for limit in self._both.values())

    def init(self, blocks: int) -> LimitState:
        """Return a step count of 0, and the states of both limits."""
        return {"steps": step_count()} | init_each(self._both, blocks)

    def _of_one(self, state: LimitState) -> LimitOfOne | None:
        """Return the limit in numbers of Python, for a single block on the host; None if either limit has no such form."""
        both = each_of_one(self._both, state)
        if both is None:
            return None
        return _WarmupOfOne(self.steps, both, int(state["steps"]))

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """Return the limit of each block, and the state after the step."""
        found, after = step_each(self._both, blocks, state)
        # selected on the device: an `if` would read the count on the host
        limits = torch.where(state["steps"] < self.steps, found["warmup_limit"], found["limit"])
        return limits, {"steps": state["steps"] + 1} | after


class _WarmupOfOne(LimitOfOne):
    """The arithmetic of :meth:`WarmupLimit.step` with numbers."""

    __slots__ = ("_both", "_done", "_steps")

    def __init__(self, steps: int, both: dict[str, LimitOfOne], done: int) -> None:
        self._steps, self._both, self._done = steps, both, done

    def step(self, value: float, *, are_losses: bool = False) -> tuple[float, LimitOfOne]:
        found, after = {}, {}
        for name, each in self._both.items():
            found[name], after[name] = each.step(value, are_losses=are_losses)
        limit = found["warmup_limit" if self._done < self._steps else "limit"]
        return limit, _WarmupOfOne(self._steps, after, self._done + 1)

    def state(self) -> LimitState:
        return {"steps": torch.tensor(self._done, dtype=torch.int64, device="cpu")} | joined_state(self._both)
