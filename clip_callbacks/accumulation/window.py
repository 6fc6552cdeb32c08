"""Arithmetic of accumulation windows: the factor from the accumulated gradient to the mean over its micro-batches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Window:
    r"""The micro-batches between ``zero_grad`` and the optimizer step, each with a weight :math:`w_i`.

    If the Trainer divides every loss by :math:`N`, and each loss is multiplied by its weight, the accumulated gradient is
    :math:`\sum_i w_i g_i / N`. The factor from it to the weighted mean :math:`\sum_i w_i g_i / \sum_i w_i` is
    :math:`N / \sum_i w_i`; for k micro-batches with weights of 1, :math:`N / k`. If :math:`N` changes to :math:`N_i` inside the
    window, later losses are multiplied by :math:`N_i / N`.

    Attributes:
        divisor: Number N that the first micro-batch's loss was divided by; 0 before it.
        count: Number k of backward passes so far.
        weight: Sum of their weights.
    """

    divisor: int = 0
    count: int = 0
    weight: float = 0.0
    _last: float = 0.0

    def reset(self) -> None:
        """Begin a new window: the gradients were set to zero."""
        self.divisor = self.count = 0
        self.weight = self._last = 0.0

    def loss_weight(self, divisor: int, weight: float = 1.0) -> float:
        """Return the factor for a loss, so that its micro-batch counts in proportion to its weight.

        Args:
            divisor: Number that this loss was divided by.
            weight: Weight of the micro-batch.
        """
        # trainer.accumulate_grad_batches may be set at any batch: a window keeps the N of its first one.
        self.divisor = self.divisor or divisor
        if divisor == self.divisor:
            return weight
        return weight * divisor / self.divisor

    def add(self, weight: float = 1.0) -> None:
        """Count one backward pass."""
        # kept and not subtracted later: an infinite weight, which marks an error, would leave inf - inf = NaN
        self._last = self.weight
        self.count += 1
        self.weight += weight

    def drop(self) -> None:
        """Subtract the last backward pass."""
        self.count -= 1
        self.weight = self._last

    def scale(self, total: float | None = None, ranks: int = 1) -> float:
        """Return the factor from the accumulated gradient to the weighted mean; 1 for an empty window.

        Args:
            total: Sum of the weights over all ranks, if weights differ between ranks; None stands for that of this rank.
            ranks: Number of ranks that the gradient was averaged over.
        """
        if total is None:
            total, ranks = self.weight, 1
        # an empty window, or weights that are all 0: such a step is discarded elsewhere
        if not total:
            return 1.0
        return self.divisor * ranks / total
