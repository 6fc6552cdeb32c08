"""What a run of the window did: each micro-batch, and all together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clip_callbacks.replay.module_recorder import Call
from clip_callbacks.replay.ranges import Range


@dataclass
class MicroBatch:
    """What one micro-batch did.

    Args:
        batch_idx: Its number in the epoch.
        recorded: The loss of the run, as its backward got it; None if there was none.
        loss: The loss now.
        calls: Of modules.
        gradients: Of parameters, after it, by name: what the window has added up so far.
        norm: Of what it has added.
        operations: Of autograd, between the modules and the loss.
        notes: What is not seen, or not as it was.
    """

    batch_idx: int
    recorded: Tensor | None
    loss: Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    gradients: dict[str, Range] = field(default_factory=dict)
    norm: float = math.nan
    operations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def bad_gradients(self) -> dict[str, Range]:
        """Those that are not finite."""
        return {name: span for name, span in self.gradients.items() if not span.is_finite}

    @property
    def has_finite_loss(self) -> bool:
        """Whether it has; without a loss too."""
        return self.loss is None or bool(self.loss.isfinite().all())

    @property
    def is_bad(self) -> bool:
        """Whether its loss, or any gradient after it, is not finite."""
        return not self.has_finite_loss or bool(self.bad_gradients)

    @property
    def has_same_loss(self) -> bool | None:
        """Whether the loss is that of the run, bit for bit; None if nothing is known."""
        if self.loss is None or self.recorded is None:
            return None
        left, right = self.loss.reshape(()), self.recorded.reshape(())
        return left.dtype == right.dtype and bool(torch.equal(left, right) or (left.isnan() & right.isnan()))


@dataclass
class Outcome:
    """What a run of the window did.

    Args:
        micro_batches: Each, in order.
        total_norm: Of the gradients that the bad optimizer would have stepped with.
        notes: What is not as it was.
    """

    micro_batches: list[MicroBatch] = field(default_factory=list)
    total_norm: float = math.nan
    notes: list[str] = field(default_factory=list)

    @property
    def is_nonfinite(self) -> bool:
        """Whether any loss or gradient is."""
        return any(micro.is_bad for micro in self.micro_batches)

    @property
    def guilty(self) -> int:
        """The place of the first bad micro-batch, or, if all are finite, of the one that has added most."""
        places = range(len(self.micro_batches))
        bad = next((place for place in places if self.micro_batches[place].is_bad), None)
        return bad if bad is not None else max(places, key=lambda place: self.micro_batches[place].norm)
