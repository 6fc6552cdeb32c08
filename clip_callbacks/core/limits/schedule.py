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
    """Limit that goes from one value to another and stays there."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        """Check every argument."""
        for argument in ("start", "end"):
            object.__setattr__(self, argument, as_finite(getattr(self, argument), argument))
        as_count(self.steps, "steps", least=1)

    @property
    def takes_losses(self) -> bool:
        """True, because it does not depend on the norms."""
        return True

    def init(self, blocks: int) -> LimitState:
        """Return a step count of 0."""
        return {"steps": step_count()}

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """Return the limit of all blocks, float64, 0-dim, and the state after the step."""
        # a tensor to the end: in a deferred step the count is on the device, and the host must not read it
        elapsed = (state["steps"].double() / self.steps).clamp(max=1.0)
        return self.start + (self.end - self.start) * self._completed(elapsed), {"steps": state["steps"] + 1}

    @staticmethod
    @abstractmethod
    def _completed(elapsed: Tensor) -> Tensor:
        """Return the fraction of the change that is completed after a fraction of the steps, both from 0 to 1."""


@dataclass(frozen=True)
class LinearLimit(_Schedule):
    r"""A limit that moves linearly from one value to another and then stays there, equal for all blocks.

    .. math::
        \ell(t) = \text{start} + (\text{end} - \text{start}) \cdot \min(1, t / \text{steps})

    where t is the number of optimizer steps taken before this one; skipped steps do not count.

    Args:
        start: Limit of the first step, above 0, in the unit of the gradients.
        end: Limit after ``steps`` optimizer steps, above 0, in the unit of the gradients.
        steps: Number of optimizer steps from ``start`` to ``end``, at least 1.

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
    def _completed(elapsed: Tensor) -> Tensor:
        return elapsed


@dataclass(frozen=True)
class CosineLimit(_Schedule):
    r"""A limit that moves along half a cosine wave from one value to another and then stays there, equal for all blocks.

    .. math::
        \ell(t) = \text{start} + (\text{end} - \text{start}) \cdot \tfrac12 \bigl(1 - \cos(\pi \min(1, t / \text{steps}))\bigr)

    where t is the number of optimizer steps taken before this one; skipped steps do not count.

    Args:
        start: Limit of the first step, above 0, in the unit of the gradients.
        end: Limit after ``steps`` optimizer steps, above 0, in the unit of the gradients.
        steps: Number of optimizer steps from ``start`` to ``end``, at least 1.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> CosineLimit(10.0, 1.0, steps=9).step(BlockNorms(torch.ones(1)), {"steps": torch.tensor(9)})[0]
        tensor(1., dtype=torch.float64)
    """

    @staticmethod
    def _completed(elapsed: Tensor) -> Tensor:
        return 0.5 * (1.0 - torch.cos(math.pi * elapsed))
