"""Weights of micro-batches, summed over all ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from clip_callbacks.accumulation.async_weight import AsyncWeight
from clip_callbacks.accumulation.weights import Weight

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class WindowWeights:
    """The weights of one run, relative to the first one, rounded down to a power of 2.

    Weights may count thousands of tokens, and a loss multiplied by thousands would overflow in a half-precision backward pass. The
    unit is equal on all ranks, and because it is a power of 2, dividing by it is exact. If the weight of one rank cannot be
    computed, it is infinite, until a collective tells the other ranks.

    Args:
        source: Function from a batch to its weight.
    """

    def __init__(self, source: Weight) -> None:
        self._source = source
        self._pending: AsyncWeight | None = None
        self._unit = 0.0
        self._error: Exception | None = None

    def ask(self, batch: Any, batch_idx: int) -> None:
        """Compute the weight of a batch, without waiting for the device."""
        self._pending = AsyncWeight(self._source, batch, batch_idx)

    def read(self, trainer: Trainer) -> float:
        """Return the weight of the last batch, in units.

        Raises:
            Exception: If the source has raised it, or returned no finite number of at least 0. On several ranks, :meth:`total`
                raises it later.
        """
        assert self._pending is not None
        weight = math.inf
        try:
            if not self._error:
                weight = self._pending.read()
        except Exception as error:
            if trainer.world_size == 1:
                raise
            # Raised here, the other ranks would wait in a collective forever. The infinite weight tells them.
            self._error = error
        if not self._unit:
            # On all ranks, until some rank has seen a weight above 0: they leave this branch together.
            largest = self._agreed(_reduced(trainer, weight, "max"))
            if largest:
                self._unit = 2.0 ** math.floor(math.log2(largest))
        # every weight so far was 0, on every rank
        if not self._unit:
            return 0.0
        return weight / self._unit

    def total(self, trainer: Trainer, ours: float) -> float:
        """Return the sum of this rank's weights and those of all others.

        Args:
            trainer: The Trainer.
            ours: Sum of this rank's weights in the window.

        Raises:
            Exception: If the source has raised it for a batch of this rank.
            RuntimeError: If the source has raised on another rank.
        """
        if self._error:  # the infinite weight may be gone with a dropped micro-batch
            ours = math.inf
        return self._agreed(_reduced(trainer, ours, "sum"))

    def _agreed(self, total: float) -> float:
        if math.isfinite(total):
            return total
        raise self._error or RuntimeError("`weight` failed on another rank. The error message of that rank says why.")


def _reduced(trainer: Trainer, number: float, reduce_op: Literal["sum", "max"]) -> float:
    """Return the sum or the maximum of a number over all ranks."""
    if trainer.world_size == 1:
        return number
    # float32 counts tokens exactly up to 2**24 only
    ours = torch.tensor(number, dtype=torch.float64, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(ours, reduce_op=reduce_op))
