"""Limits that follow a schedule over optimizer steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_callbacks.core.arguments import as_count, as_finite
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitState, step_count


@dataclass(frozen=True)
class _Schedule(Limit):
    """From one limit to another in so many steps."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        """Check every argument."""
        for argument in ("start", "end"):
            object.__setattr__(self, argument, as_finite(getattr(self, argument), argument))
        as_count(self.steps, "steps", least=1)

    def init(self, blocks: int) -> LimitState:
        """No step yet."""
        return {"steps": step_count()}

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """One limit for all blocks."""
        done = (state["steps"].double() / self.steps).clamp(max=1.0)
        return self.start + (self.end - self.start) * self._course(done), {"steps": state["steps"] + 1}

    @staticmethod
    @abstractmethod
    def _course(done: Tensor) -> Tensor:
        """How much of the way is gone when so much of the time is, both from 0 to 1."""


@dataclass(frozen=True)
class LinearLimit(_Schedule):
    r"""A straight line from one limit to another, then that: the same for every block.

    .. math::
        \ell(t) = \text{start} + (\text{end} - \text{start}) \cdot \min(1, t / \text{steps})

    where t counts the optimizer steps taken before: a skipped step does not count.

    Args:
        start: The limit of the first step, above 0, in the unit of the gradients.
        end: The limit from step ``steps`` on, above 0.
        steps: How many optimizer steps the way takes, at least 1.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> limit, state = LinearLimit(10.0, 1.0, steps=9), LinearLimit(10.0, 1.0, steps=9).init(1)
        >>> for _ in range(3):
        ...     value, state = limit.step(BlockNorms(torch.ones(1)), state)
        >>> value
        tensor(8., dtype=torch.float64)
    """

    @staticmethod
    def _course(done: Tensor) -> Tensor:
        return done


@dataclass(frozen=True)
class CosineLimit(_Schedule):
    r"""Half a cosine wave from one limit to another, then that: the same for every block.

    .. math::
        \ell(t) = \text{start} + (\text{end} - \text{start}) \cdot \tfrac12 \bigl(1 - \cos(\pi \min(1, t / \text{steps}))\bigr)

    where t counts the optimizer steps taken before: a skipped step does not count.

    Args:
        start: The limit of the first step, above 0, in the unit of the gradients.
        end: The limit from step ``steps`` on, above 0.
        steps: How many optimizer steps the way takes, at least 1.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> CosineLimit(10.0, 1.0, steps=9).step(BlockNorms(torch.ones(1)), {"steps": torch.tensor(9)})[0]
        tensor(1., dtype=torch.float64)
    """

    @staticmethod
    def _course(done: Tensor) -> Tensor:
        return 0.5 * (1.0 - torch.cos(math.pi * done))
