"""Accumulation windows of manual optimization, which only the gradients tell of."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_callbacks.accumulation.window import Window
from clip_callbacks.core.reduction import Reduction, on_any_rank, shard_of
from clip_callbacks.trainer.optimizer_context import OptimizerContext


class ManualWindow:
    """Counts the backward passes that reached one optimizer since its gradients were last set to zero.

    Lightning has no hook for ``zero_grad`` in manual optimization, so the gradients themselves tell: they change in a backward pass
    that reaches them; changed between two passes and none or all zero, they were set to zero. Where ranks hold shards they agree on
    both, by a flag each.
    """

    def __init__(self, context: OptimizerContext) -> None:
        self._context = context
        self.window = Window(divisor=1)
        self._seen = self._fingerprints()

    def before_backward(self) -> None:
        """See whether the gradients were set to zero since the last backward pass."""
        fingerprints = self._fingerprints()
        is_sharded = self._reduction is not None
        # An empty shard never changes: where ranks hold shards, only entries tell, and one collective for all of them.
        has_gradients = (not is_sharded and fingerprints == self._seen) or not self._is_zero()
        if is_sharded:
            has_gradients = self._agreed(has_gradients)
        if not has_gradients:
            self.window = Window(divisor=1)
        self._seen = fingerprints

    def after_backward(self, weight: float) -> None:
        """See whether the pass reached a gradient of this optimizer."""
        fingerprints = self._fingerprints()
        if self._agreed(fingerprints != self._seen):
            self.window.add(weight)
        self._seen = fingerprints

    @property
    def _reduction(self) -> Reduction | None:
        return self._context.table.reduction

    def _agreed(self, flag: bool) -> bool:
        """Whether it holds on any rank: an empty shard tells nothing."""
        if self._reduction:
            return on_any_rank(flag, self._reduction.counts.device)
        return flag

    def _gradients(self) -> list[Tensor]:
        """This rank's shards of the gradients that there are."""
        gradients = (tensor.grad for tensor in self._context.table.tensors)
        return [shard_of(gradient) for gradient in gradients if gradient is not None]

    def _is_zero(self) -> bool:
        return not any(bool(gradient.any()) for gradient in self._gradients())

    def _fingerprints(self) -> dict[int, tuple[int, int, int]]:
        """Those of the gradients that there are, by their parameter's place in the table."""
        wholes = [tensor.grad for tensor in self._context.table.tensors]
        return {place: _fingerprint(gradient) for place, gradient in enumerate(wholes) if gradient is not None}


def _fingerprint(gradient: Tensor) -> tuple[int, int, int]:
    """Where a gradient's entries are, and how often it, or this rank's shard, was written in place: neither reads an entry."""
    shard = shard_of(gradient)
    entries = shard if shard.layout is torch.strided else shard._values()
    return entries.data_ptr(), gradient._version, shard._version
