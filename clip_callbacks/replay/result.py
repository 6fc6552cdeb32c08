"""The result of running a window once: losses, module calls and gradients of each micro-batch, and the norm of all gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clip_callbacks.replay.module_calls import ModuleCall
from clip_callbacks.replay.ranges import ValueRange
from clip_callbacks.replay.recorded_step import LOSS, NORM, ExceededLimit


@dataclass
class MicroBatchResult:
    """The result of running one micro-batch.

    Args:
        batch_idx: Number of the batch in its epoch.
        recorded_loss: Loss of the training run, as its backward pass got it; None if the bundle has none.
        loss: Loss of the replay; None if there was no backward pass.
        calls: Calls of modules, in the order in which they began.
        gradients: Ranges of the gradients that the window has accumulated up to this micro-batch, by parameter.
        norm: Norm of the gradients that this micro-batch added.
        operations: Names of the autograd operations between the last modules and the loss.
        notes: Remarks on what could not be recorded.
    """

    batch_idx: int
    recorded_loss: Tensor | None
    loss: Tensor | None = None
    calls: list[ModuleCall] = field(default_factory=list)
    gradients: dict[str, ValueRange] = field(default_factory=dict)
    norm: float = math.nan
    operations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def nonfinite_gradients(self) -> dict[str, ValueRange]:
        """The ranges of the non-finite gradients."""
        return {name: values for name, values in self.gradients.items() if not values.is_finite}

    @property
    def has_finite_loss(self) -> bool:
        """Whether the loss is finite, or missing."""
        return self.loss is None or bool(self.loss.isfinite().all())

    @property
    def is_finite(self) -> bool:
        """Whether the loss, and all gradients after the micro-batch, are finite."""
        return self.has_finite_loss and not self.nonfinite_gradients

    @property
    def has_same_loss(self) -> bool | None:
        """Whether the loss has the same bits as in the training run; None if one of both is missing."""
        if self.loss is None or self.recorded_loss is None:
            return None
        left, right = self.loss.reshape(()), self.recorded_loss.reshape(())
        return left.dtype == right.dtype and bool(torch.equal(left, right) or (left.isnan() & right.isnan()))


@dataclass
class WindowResult:
    """The result of running a window.

    Args:
        micro_batches: Results of the micro-batches, in order.
        total_norm: Norm of the gradients with which the optimizer of the bad step would have stepped.
        loss: Loss of the window, without the loss scale: the mean over its micro-batches; in manual optimization the sum over the
            backward passes since the last optimizer step.
        notes: Remarks on what differs from the training run.
    """

    micro_batches: list[MicroBatchResult] = field(default_factory=list)
    total_norm: float = math.nan
    loss: float = math.nan
    notes: list[str] = field(default_factory=list)

    @property
    def is_finite(self) -> bool:
        """Whether all losses and gradients are finite."""
        return all(micro.is_finite for micro in self.micro_batches)

    @property
    def suspect_index(self) -> int:
        """Index of the first non-finite micro-batch; if all are finite, of the one that added the largest gradients."""
        indices = range(len(self.micro_batches))
        nonfinite = next((index for index in indices if not self.micro_batches[index].is_finite), None)
        if nonfinite is not None:
            return nonfinite
        return max(indices, key=lambda index: self.micro_batches[index].norm)

    def value_of(self, quantity: str) -> float:
        """Return the value of a quantity that may have a limit."""
        return self.total_norm if quantity == NORM else self.loss

    def fails(self, exceeded: Sequence[ExceededLimit]) -> bool:
        """Return whether the step is bad: non-finite, or a spike.

        Args:
            exceeded: Limits that the recorded spike has exceeded; empty if the recorded step was non-finite.
        """
        return not self.is_finite or self.exceeds(exceeded)

    def exceeds(self, exceeded: Sequence[ExceededLimit], share: float = 1.0) -> bool:
        """Return whether each of these limits is exceeded by a share of the window's value.

        Losses with the bits of the recorded ones exceed the limit as those did, where the run has weighted them, or averaged them
        over ranks.
        """
        if not exceeded:
            return False
        has_same_losses = share == 1.0 and all(micro.has_same_loss for micro in self.micro_batches)
        is_above = {each.quantity: self.value_of(each.quantity) * share > each.limit for each in exceeded}
        return all(above or (quantity == LOSS and has_same_losses) for quantity, above in is_above.items())
