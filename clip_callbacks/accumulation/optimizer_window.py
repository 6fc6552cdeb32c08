"""The micro-batches since one optimizer's last step, and the loss that its gradient belongs to."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from clip_callbacks.core.losses import as_checked, entry_of, weighted_sum
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.trainer.fingerprints import GradientFingerprints, gradient_fingerprints, gradients_changed
from clip_callbacks.trainer.step_context import Discarded, MicroBatch

MAX_BATCHES_IN_MANUAL = 16
"""Largest number of kept batches of a window in manual optimization, where the length of a window is not known."""


class OptimizerWindow:
    """The accumulation window of one optimizer.

    Attributes:
        micro_batches: The micro-batches; of a long window the first one stands for many, and has the sum of their losses.
        is_open: True if a backward pass has reached the optimizer; known in manual optimization only.
        is_weightless: True if a micro-batch of weight 0 was left out: its loss does not count.
        discarded: The reason for which the gradients must be discarded, or None.
    """

    max_length = 1024
    """Largest number of micro-batches that are told apart."""

    def __init__(self) -> None:
        self.micro_batches: deque[MicroBatch] = deque()
        self._more = 0  # micro-batches that the first one stands for, beside itself
        self._before_pass: GradientFingerprints = {}
        self.is_open = self.is_weightless = False
        self.discarded: Discarded | None = None

    @property
    def is_known(self) -> bool:
        """Whether a loss is known, be it one of weight 0."""
        return self.is_weightless or bool(self.micro_batches)

    def loss(self, factor_of: Callable[[int], float]) -> Tensor:
        """Return the loss that the gradient belongs to, without the host reading it.

        Args:
            factor_of: Function from the number of micro-batches to the factor of the weighted sum of their losses.

        Returns:
            The loss, multiplied by the loss scale, shape ``(1,)``; NaN if it is not known.
        """
        if not self.micro_batches:
            # weights of 0, on this rank only, add nothing to the mean over all ranks
            return torch.full((1,), 0.0 if self.is_weightless else math.nan, dtype=torch.float32, device="cpu")
        factor = factor_of(len(self.micro_batches) + self._more)
        newest = self.micro_batches[-1]
        if len(self.micro_batches) == 1 and newest.weight * factor == 1.0:
            loss = entry_of(newest.loss)
        else:
            loss = _sum(self.micro_batches) * factor
        if newest.loss.dtype is torch.float64:
            return loss
        return loss.float()

    def shorten(self) -> None:
        """Make one micro-batch of the older half of very many, with the sum of their losses: a window may be of any length."""
        older = [self.micro_batches.popleft() for _ in range(self.max_length // 2)]
        # a sum would not tell an infinite float16 loss, which is taken as finite, from a bad one
        self.micro_batches.appendleft(MicroBatch(_sum([each._replace(loss=as_checked(each.loss)) for each in older]), None))
        self._more += len(older) - 1

    def forget_batch(self) -> None:
        """Release the batch of an old micro-batch, in manual optimization, where the optimizer may step seldom or never."""
        if len(self.micro_batches) >= MAX_BATCHES_IN_MANUAL:
            self.micro_batches[-MAX_BATCHES_IN_MANUAL] = self.micro_batches[-MAX_BATCHES_IN_MANUAL]._replace(kept=None)

    def begin_pass(self, table: TensorTable) -> None:
        """Note the gradients before a backward pass."""
        self._before_pass = gradient_fingerprints(table)

    def is_reached(self, table: TensorTable) -> bool:
        """Return whether the pass that has ended has changed the gradients."""
        return gradients_changed(table, self._before_pass)

    def reach(self, newest: MicroBatch | None, copied: MicroBatch | None) -> None:
        """Note that a backward pass has reached the optimizer.

        Args:
            newest: The micro-batch of the pass.
            copied: A copy of it whose loss the module cannot write to.
        """
        self.is_open = True
        if copied is not None and self.micro_batches and self.micro_batches[-1] is newest:
            self.micro_batches[-1] = copied

    def remove(self, micro_batch: MicroBatch | None, *, is_weightless: bool = False) -> None:
        """Remove the last micro-batch, if it is this one.

        Args:
            micro_batch: It is not there if a callback before us has stepped already, or if the pass did not reach the optimizer.
            is_weightless: If True, it has weight 0: its loss does not count, and may be NaN.
        """
        if self.micro_batches and self.micro_batches[-1] is micro_batch:
            self.micro_batches.pop()
            self.is_weightless |= is_weightless

    def discard(self, reason: Discarded) -> None:
        """Have the gradients discarded at the step."""
        self.discarded = reason

    def clear(self) -> None:
        """Begin a new window."""
        self.micro_batches.clear()
        self._more = 0
        self.is_open = self.is_weightless = False
        self.discarded = None


def _sum(micro_batches: Collection[MicroBatch]) -> Tensor:
    return weighted_sum([each.loss for each in micro_batches], [each.weight for each in micro_batches])
