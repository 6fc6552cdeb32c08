"""Arithmetic of accumulation windows: what makes the summed gradient the mean over the micro-batches in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Window:
    r"""The micro-batches between one ``zero_grad`` and the optimizer step, each with a weight :math:`w_i`.

    A trainer that divides every loss by :math:`N`, with each loss multiplied by its weight, leaves :math:`\sum_i w_i g_i / N`. The
    weighted mean :math:`\sum_i w_i g_i / \sum_i w_i` is that times :math:`N / \sum_i w_i`; with weights of 1, of k micro-batches,
    :math:`N / k`. Where :math:`N` changes inside the window, each later loss is first multiplied by :math:`N_i / N`.

    Attributes:
        divisor: N, what the first micro-batch's loss was divided by; 0 before it.
        count: k, the backward passes so far.
        weight: The sum of their weights.
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
        """What to multiply a loss by that was divided by ``divisor``, so that it counts as its weight says."""
        self.divisor = self.divisor or divisor
        return weight if divisor == self.divisor else weight * divisor / self.divisor

    def add(self, weight: float = 1.0) -> None:
        """Count one backward pass."""
        self._last = self.weight
        self.count += 1
        self.weight += weight

    def drop(self) -> None:
        """Leave the last backward pass out."""
        self.count -= 1
        self.weight = self._last

    def scale(self, total: float | None = None, ranks: int = 1) -> float:
        """What makes the accumulated gradient a weighted mean; 1 for an empty window.

        Args:
            total: The sum of the weights over all ranks, if they differ; None is that of this one.
            ranks: How many ranks the gradient was averaged over.
        """
        if total is None:
            total, ranks = self.weight, 1
        if not total:
            return 1.0
        return self.divisor * ranks / total
