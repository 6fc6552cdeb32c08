"""Arithmetic of accumulation windows: what makes the summed gradient the mean over the micro-batches in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Window:
    r"""The micro-batches between one ``zero_grad`` and the optimizer step.

    A trainer that divides every loss by :math:`N` leaves :math:`\sum_i g_i / N` after :math:`k` backward passes; the mean is that
    times :math:`N / k`. Where :math:`N` changes inside the window, each later loss is first multiplied by :math:`N_i / N`, so that
    all of them weigh the same.

    Attributes:
        divisor: N, what the first micro-batch's loss was divided by; 0 before it.
        count: k, the backward passes so far.
    """

    divisor: int = 0
    count: int = 0

    def reset(self) -> None:
        """Begin a new window: the gradients were set to zero."""
        self.divisor = self.count = 0

    def loss_weight(self, divisor: int) -> float:
        """What to multiply a loss by that was divided by ``divisor``, so that it weighs as the window's first did."""
        self.divisor = self.divisor or divisor
        return divisor / self.divisor

    def add(self) -> None:
        """Count one backward pass."""
        self.count += 1

    def drop(self) -> None:
        """Leave the last backward pass out."""
        self.count -= 1

    @property
    def scale(self) -> float:
        """N / k: what makes the accumulated gradient a mean; 1 for a full window and for an empty one."""
        return self.divisor / self.count if self.count else 1.0
