"""AccumulationRescaling."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.accumulation import Window
from clip_callbacks.callbacks._member import Member
from clip_callbacks.callbacks._pass import Lane


class AccumulationRescaling(Member):
    r"""Makes the gradient of every accumulation window the mean over the micro-batches that really are in it.

    Lightning divides each loss by N = ``accumulate_grad_batches``, whatever the window holds; after k backward passes the
    gradient is multiplied by

    .. math:: \frac{N}{k}

    before its norm is taken and clipped, so that a norm means the same in every window. A full window is not touched. Short
    are the last window of an epoch, one with micro-batches whose ``training_step`` returned None, and the first one after a
    resume inside a window. Where N changes inside a window, later losses are weighted so that all count the same.

    In manual optimization nothing is divided by Lightning, and nothing is rescaled here unless ``divide`` is set: then the sum
    over the k calls of ``manual_backward`` since the optimizer's last ``zero_grad`` is divided by k.

    Metric: ``grad/accumulation_scale``, where a window was rescaled.

    Args:
        divide: Whether in manual optimization the sum over a window becomes a mean; for users who do not divide their losses.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> callbacks = [AccumulationRescaling()]
        >>> trainer = Trainer(accumulate_grad_batches=4, callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    kind = "rescaling"

    def __init__(self, *, divide: bool = False) -> None:
        super().__init__()
        self.divide = divide
        self._window = Window()
        self._manual: dict[int, ManualWindow] = {}

    def bind(self, lanes: Sequence[Lane], names: Sequence[str], *, renew: bool = False) -> None:
        """Have a window for each optimizer of manual optimization."""
        super().bind(lanes, names, renew=renew)
        self._manual |= {lane.index: ManualWindow(lane) for lane in lanes}

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begin a new window."""
        self._window.reset()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Weight the loss if N has changed inside the window."""
        super().on_before_backward(trainer, pl_module, loss)
        if not pl_module.automatic_optimization:
            for window in self._manual.values() if self.divide else ():
                window.before_backward()
            return
        weight = self._window.loss_weight(trainer.accumulate_grad_batches)
        if weight != 1.0:
            loss.register_hook(lambda gradient: gradient * weight)  # type: ignore[no-untyped-call]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the micro-batch."""
        super().on_after_backward(trainer, pl_module)
        if pl_module.automatic_optimization:
            self._window.add()
            return
        for window in self._manual.values() if self.divide else ():
            window.after_backward()

    def drop_micro_batch(self) -> None:
        """Leave the last micro-batch out: the guard has dropped its gradient."""
        self._window.drop()

    def scale(self, module: LightningModule, lane: Lane) -> float:
        """What makes the gradients of an optimizer's window a mean."""
        if module.automatic_optimization:
            return self._window.scale
        return self._manual[lane.index].scale if self.divide else 1.0


class ManualWindow:
    """Counts the backward passes that reached one optimizer since its gradients were last set to zero.

    Lightning has no hook for ``zero_grad`` in manual optimization, so the gradients themselves tell: their version counters move
    in a backward pass that reaches them, and between two passes only if somebody sets them to zero.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._count = 0
        self._seen = self._versions()

    def before_backward(self) -> None:
        """See whether the gradients were set to zero since the last backward pass."""
        versions = self._versions()
        if versions != self._seen:
            self._count = 0
        self._seen = versions

    def after_backward(self) -> None:
        """See whether the pass reached a gradient of this optimizer."""
        versions = self._versions()
        self._count += versions != self._seen
        self._seen = versions

    @property
    def scale(self) -> float:
        """1 / k; 1 before any backward pass."""
        return Window(divisor=1, count=self._count).scale

    def _versions(self) -> list[tuple[int, int] | None]:
        gradients = (tensor.grad for tensor in self._lane.table.tensors)
        return [None if gradient is None else (id(gradient), gradient._version) for gradient in gradients]
