"""Weights of micro-batches that all ranks add up."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from clip_callbacks.accumulation.async_weight import AsyncWeight
from clip_callbacks.accumulation.weights import Weight

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class WindowWeights:
    """The weights of one run, in units of its first one, rounded down to a power of two.

    Weights count tokens: multiplied by thousands, a half-precision backward pass would overflow. The unit is the same on all
    ranks, and being a power of two it changes no bit otherwise. A weight that cannot be had on one rank is infinite until all ranks
    learn of it.

    Args:
        source: From a batch to its weight.
    """

    def __init__(self, source: Weight) -> None:
        self._source = source
        self._pending: AsyncWeight | None = None
        self._unit = 0.0
        self._error: Exception | None = None

    def ask(self, batch: Any, batch_idx: int) -> None:
        """Ask for the weight of a batch."""
        self._pending = AsyncWeight(self._source, batch, batch_idx)

    def read(self, trainer: Trainer) -> float:
        """The weight of the batch asked for last.

        Raises:
            Exception: What the source raised, or that it is no number of at least 0; on several ranks later, by :meth:`total`.
        """
        assert self._pending is not None
        weight = math.inf
        try:
            if not self._error:
                weight = self._pending.read()
        except Exception as error:
            if trainer.world_size == 1:
                raise
            # Raised here, it would leave the other ranks waiting in a collective: an infinite weight tells them.
            self._error = error
        if not self._unit:
            largest = self._agreed(_reduced(trainer, weight, "max"))
            if largest:
                self._unit = 2.0 ** math.floor(math.log2(largest))
        if not self._unit:
            return 0.0
        return weight / self._unit

    def total(self, trainer: Trainer, ours: float) -> float:
        """The sum over all ranks.

        Raises:
            Exception: What the source raised for one of this rank's batches.
            RuntimeError: If that was on another rank.
        """
        if self._error:  # the guard may have dropped the infinite weight
            ours = math.inf
        return self._agreed(_reduced(trainer, ours, "sum"))

    def _agreed(self, total: float) -> float:
        if math.isfinite(total):
            return total
        raise self._error or RuntimeError("`weight` failed on another rank: its message says on what.")


def _reduced(trainer: Trainer, number: float, reduce_op: Literal["sum", "max"]) -> float:
    """A number over all ranks."""
    if trainer.world_size == 1:
        return number
    ours = torch.tensor(number, dtype=torch.float64, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(ours, reduce_op=reduce_op))
