"""Accumulation windows of manual optimization, detected from the gradients."""

from __future__ import annotations

from torch import Tensor

from clip_callbacks.accumulation.window import Window
from clip_callbacks.core.reduction import Reduction, on_any_rank, shard_of
from clip_callbacks.trainer.fingerprints import gradient_fingerprints
from clip_callbacks.trainer.optimizer_context import OptimizerContext


class ManualWindow:
    """Counts the backward passes that reached one optimizer since its gradients were last set to zero.

    Lightning has no hook for ``zero_grad`` in manual optimization, so that both events are detected from the gradients. A backward
    pass has reached the optimizer if gradients changed in it. The gradients were set to zero if they changed between two backward
    passes and are None or all zero. Where ranks hold shards, the decision is collective.
    """

    def __init__(self, context: OptimizerContext) -> None:
        self.context = context
        # in manual optimization Lightning divides no loss
        self.window = Window(divisor=1)
        self._seen = gradient_fingerprints(self.context.table)

    def continue_with(self, context: OptimizerContext) -> None:
        """Go on with another context of the same optimizer, whose parameters may be others."""
        self.context = context

    def before_backward(self) -> None:
        """Begin a new window if the gradients were set to zero since the last backward pass."""
        present = gradient_fingerprints(self.context.table)
        is_sharded = self._reduction is not None
        # An empty shard never changes. Where ranks hold shards, only the entries decide, in one collective for all of them.
        has_gradients = (not is_sharded and present == self._seen) or not self._is_zero()
        # a collective in each pass, whatever this rank sees: ranks must agree on where a window begins
        if is_sharded:
            has_gradients = self._agreed(has_gradients)
        if not has_gradients:
            self.window = Window(divisor=1)
        # taken after any zero_grad: whatever differs at the end of the pass was written by it
        self._seen = present

    def after_backward(self, weight: float) -> None:
        """Count the backward pass if it has changed a gradient of this optimizer."""
        present = gradient_fingerprints(self.context.table)
        if self._agreed(present != self._seen):
            self.window.add(weight)
        self._seen = present

    @property
    def _reduction(self) -> Reduction | None:
        return self.context.table.reduction

    def _agreed(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank; an empty shard never sets it."""
        if self._reduction:
            return on_any_rank(flag, self._reduction.counts.device)
        return flag

    def _gradients(self) -> list[Tensor]:
        """Return this rank's shards of all gradients that are not None."""
        gradients = (tensor.grad for tensor in self.context.table.tensors)
        return [shard_of(gradient) for gradient in gradients if gradient is not None]

    def _is_zero(self) -> bool:
        # Stops at the first gradient with an entry. NaN counts as one, so that a bad pass does not look like zero_grad.
        return not any(bool(gradient.any()) for gradient in self._gradients())
