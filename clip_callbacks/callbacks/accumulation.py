"""AccumulationRescaling."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.accumulation import Window
from clip_callbacks.callbacks._member import Member


class AccumulationRescaling(Member):
    r"""Makes the gradient of every accumulation window the mean over the micro-batches that really are in it.

    Lightning divides each loss by N = ``accumulate_grad_batches``, whatever the window holds; after k backward passes the
    gradient is multiplied by

    .. math:: \frac{N}{k}

    before its norm is taken and clipped, so that a norm means the same in every window. A full window is not touched. Short
    are the last window of an epoch, one with micro-batches whose ``training_step`` returned None, and the first one after a
    resume inside a window. Where N changes inside a window, later losses are weighted so that all count the same.

    Metric: ``grad/accumulation_scale``, where a window was rescaled.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> callbacks = [AccumulationRescaling()]
        >>> trainer = Trainer(accumulate_grad_batches=4, callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    kind = "rescaling"

    def __init__(self) -> None:
        super().__init__()
        self._window = Window()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:  # noqa: ARG002
        """Begin a new window."""
        self._window.reset()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Weight the loss if N has changed inside the window."""
        super().on_before_backward(trainer, pl_module, loss)
        weight = self._window.loss_weight(trainer.accumulate_grad_batches)
        if weight != 1.0:
            loss.register_hook(lambda gradient: gradient * weight)  # type: ignore[no-untyped-call]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Count the micro-batch."""
        self._window.add()

    def scale(self, trainer: Trainer) -> float:  # noqa: ARG002
        """What makes the gradients of this window a mean."""
        return self._window.scale
