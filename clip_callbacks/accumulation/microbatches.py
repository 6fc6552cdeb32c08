"""Measurement of each micro-batch of an accumulation window, and removal of bad ones, without copying gradients.

Before each backward pass the gradients accumulated so far are set aside. After it, the new gradients are added to them, as autograd
would have done; or, if the new gradients are bad, they are discarded.

On several ranks a micro-batch is bad if it is bad on any rank, and then all ranks drop it. DDP averages gradients over ranks in the
last backward pass of a window only, and here that pass has the gradients of one micro-batch; those set aside are averaged after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clip_callbacks.accumulation.weights import count_samples
from clip_callbacks.core.gradients import gradients_of
from clip_callbacks.core.measurement import measure
from clip_callbacks.core.nonfinite import all_finite
from clip_callbacks.core.reduction import averaged, on_any_rank
from clip_callbacks.stats.noise_scale import WindowNorms
from clip_callbacks.trainer.buffer_copies import BufferCopies
from clip_callbacks.trainer.buffer_tracker import BufferTracker
from clip_callbacks.trainer.optimizer_context import OptimizerContext

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class MicroBatches:
    """The good and bad micro-batches of the current window.

    Args:
        module: The module in training.
        drops: If True, bad micro-batches are dropped; otherwise all are only measured.
        parallel: The DDP wrapper of the module, on several ranks.

    Attributes:
        norms: 2-norms of the gradients of the window's good micro-batches, with loss scale and division by N.
        good: Number of good micro-batches.
        dropped: Number of bad ones.
    """

    def __init__(
        self,
        module: LightningModule,
        *,
        drops: bool,
        parallel: DistributedDataParallel | None = None,
    ) -> None:
        self._contexts: Sequence[OptimizerContext] = ()
        self._tensors: list[Tensor] = []
        self._drops = drops
        self._parallel = parallel
        self._averages = False
        self._used: set[int] = set()
        self._size: int | None = None
        self._sizes: list[int | None] = []
        self.norms: list[float] = []
        self._written = BufferTracker(module) if drops else None
        self._buffers = BufferCopies(self._written) if self._written else None
        self._aside: list[tuple[Tensor, Tensor]] = []
        self.good = self.dropped = 0

    def attach(self, contexts: Sequence[OptimizerContext]) -> None:
        """Take up the parameters that the optimizers hold now, in the current window too."""
        self._contexts = contexts
        self._tensors = [tensor for context in contexts for tensor in context.table.tensors]

    def begin_batch(self, batch: Any) -> None:
        """Record the size of the micro-batch, and copy the buffers."""
        if self._written and self._buffers:
            self._written.begin_window()
            self._buffers.keep()
        self._size = count_samples(batch)

    def before_backward(self) -> None:
        """Set the gradients accumulated so far aside."""
        # Lightning runs all passes of a window but the last under `no_sync`.
        self._averages = self._parallel is not None and self._parallel.require_backward_grad_sync
        self._aside = [(tensor, tensor.grad) for tensor in self._tensors if tensor.grad is not None]
        for tensor, _ in self._aside:
            # None and not zeros: autograd then assigns the new gradient, where it would add to zeros.
            tensor.grad = None
        if self._averages and self._parallel is not None and self._parallel.find_unused_parameters:
            for tensor in self._tensors:  # DDP expects gradients where any backward pass of the window has left one
                if id(tensor) in self._used:
                    tensor.grad = torch.zeros_like(tensor)

    @torch.no_grad()
    def after_backward(self, losses: Sequence[Tensor], report: Callable[[OptimizerContext], None]) -> bool:
        """Add the new gradients to those set aside, or drop them.

        Args:
            losses: Losses of the micro-batch, except those with weight 0.
            report: Function that is called with each optimizer whose gradients are bad, before they are dropped.

        Returns:
            True if the micro-batch was dropped.
        """
        self._check_layouts()
        self._sizes.append(self._size)
        if self._parallel is not None:
            self._used |= {id(tensor) for tensor in self._tensors if tensor.grad is not None}
        # The gradients are read once: their norms tell whether they are finite, and serve the noise scale.
        measured = [measure(gradients_of(context.table), 2.0) for context in self._contexts]
        bad = [context for context, norms in zip(self._contexts, measured, strict=True) if not norms.is_finite]
        is_bad = self._drops and (bool(bad) or not all_finite(losses))
        if self._parallel is not None:
            # Losses differ between ranks, and under `no_sync` gradients do: all ranks must drop the same micro-batches.
            is_bad = on_any_rank(is_bad, self._tensors[0].device)
        if self._averages and self.good:  # in this pass DDP has averaged the new gradients only
            # even if this micro-batch is dropped: no later pass would average them
            self._average_those_aside()

        if is_bad:
            # a bad loss with finite gradients is no optimizer's own: the first one reports it
            for context in bad or self._contexts[:1]:
                report(context)
            self._drop()
        else:
            self.norms.append(float(measured[0].total))
            self._merge()
        self._aside = []
        self.good += not is_bad
        self.dropped += is_bad
        return is_bad

    def _check_layouts(self) -> None:
        if self._parallel is None:
            return
        if any(tensor.grad is not None and tensor.grad.layout is not torch.strided for tensor in self._tensors):
            raise ValueError(
                '`level` must be "window" with sparse gradients on several ranks, got "microbatch": the gradients of earlier '
                "micro-batches cannot be averaged. Use sparse=False, or one device."
            )

    def _average_those_aside(self) -> None:
        ours = {id(tensor): gradient for tensor, gradient in self._aside}
        means = averaged([ours.get(id(tensor)) for tensor in self._tensors], self._tensors)
        self._aside = [(tensor, mean) for tensor, mean in zip(self._tensors, means, strict=True) if mean is not None]

    def _drop(self) -> None:
        for tensor in self._tensors:
            tensor.grad = None
        for tensor, gradient in self._aside:
            tensor.grad = gradient
        if self._written and self._buffers:
            # finds buffers that have changed for the first time, in this very forward pass
            self._written.compare_contents()
            self._buffers.restore()

    def _merge(self) -> None:
        # The earlier sum plus the new gradient, as autograd accumulates, so that the bits are the same as without setting aside.
        dense = [(old, tensor.grad) for tensor, old in self._aside if tensor.grad is not None and old.layout is torch.strided]
        if dense:
            torch._foreach_add_([old for old, _ in dense], [new for _, new in dense])
        for tensor, old in self._aside:
            # Dense gradients were added above, in the memory of those set aside; sparse ones remain.
            if tensor.grad is None or old.layout is torch.strided:
                tensor.grad = old
            else:
                tensor.grad = old + tensor.grad

    def detach(self) -> None:
        """Remove all hooks."""
        if self._written:
            self._written.detach()

    def end_window(self) -> None:
        """Discard all results of the window, which is over."""
        self.good = self.dropped = 0
        self.norms = []
        self._sizes = []
        self._used = set()

    def window_norms(self, total: float, *, divisor: int, loss_scale: float) -> WindowNorms | None:
        """Return the norms of the window's micro-batches and of their mean; None unless all have one size.

        Args:
            total: 2-norm of the window's gradients, each micro-batch divided by ``divisor``.
            divisor: Number N that Lightning divided each loss by.
            loss_scale: Factor that the GradScaler multiplied each loss by.
        """
        # the estimate compares gradients of batches of two sizes: b and k * b
        if len(set(self._sizes)) != 1:
            return None
        small = [(norm * divisor / loss_scale) ** 2 for norm in self.norms]
        return WindowNorms(small, (total * divisor / max(len(small), 1)) ** 2, self._sizes[0])

    @property
    def scale(self) -> float:
        """Return the factor from a mean over all micro-batches to the mean over the good ones."""
        if not self.good:
            return 1.0
        return (self.good + self.dropped) / self.good

    @property
    def is_lost(self) -> bool:
        """Return whether every micro-batch of the window was dropped."""
        return self.dropped > 0 and self.good == 0
