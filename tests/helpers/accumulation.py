"""Runs whose windows of micro-batches are noted."""

from __future__ import annotations

from tests.helpers.training import GradientTape


class Recorder(GradientTape):
    """Keeps the gradient of every optimizer step."""

    def __init__(self, feed, returns_none=(), **options):
        super().__init__(feed, **options)
        self.returns_none = set(returns_none)
        self.gradients = []

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.returns_none else super().training_step(batch, batch_idx)

    def configure_gradient_clipping(self, *_, **__):
        self.gradients.append([round(x, 5) for x in self.weight.grad.tolist()] if self.weight.grad is not None else None)


class Manual(GradientTape):
    def __init__(self, feed, *, to_none=True, window=2):
        super().__init__(feed)
        self.automatic_optimization = False
        self.gradients = []
        self.to_none, self.window = to_none, window

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if batch_idx % self.window == 0:
            optimizer.zero_grad(set_to_none=self.to_none)
        self.manual_backward((self.weight * batch[0][0]).sum())
        if (batch_idx + 1) % self.window == 0 or self.trainer.is_last_batch:
            optimizer.step()
            self.gradients.append(self.weight.grad.tolist())
