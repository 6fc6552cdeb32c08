"""AccumulationRescaling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.accumulation import Window
from clip_callbacks.apply import drop
from clip_callbacks.callbacks._lane import Lane
from clip_callbacks.callbacks._member import Member


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
        self._lanes: dict[int, Lane] = {}
        self._has_stepped = False

    def forget(self) -> None:
        """Begin a new run."""
        super().forget()
        self._window, self._manual, self._lanes = Window(), {}, {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers."""
        super().teardown(trainer, pl_module, stage)
        self._begin_window()
        self._manual, self._lanes = {}, {}

    def bind(self, lanes: Sequence[Lane], names: Sequence[str], *, renew: bool = False) -> None:
        """Have a window for each optimizer of manual optimization."""
        super().bind(lanes, names, renew=renew)
        self._manual |= {lane.index: ManualWindow(lane) for lane in lanes}
        self._lanes |= {lane.index: lane for lane in lanes}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set gradients to zero that a step has used and Lightning will not: it does so where N divides the batch's number.

        Where N has changed since, that is not the batch after the step.
        """
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._has_stepped and batch_idx % trainer.accumulate_grad_batches:
            for lane in self._lanes.values():
                drop(lane.table)
            self._begin_window()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begin a new window."""
        self._begin_window()

    def _begin_window(self) -> None:
        self._window.reset()
        self._has_stepped = False

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
            self._has_stepped = True
            return self._window.scale
        return self._manual[lane.index].scale if self.divide else 1.0


class ManualWindow:
    """Counts the backward passes that reached one optimizer since its gradients were last set to zero.

    Lightning has no hook for ``zero_grad`` in manual optimization, so the gradients themselves tell: they change in a backward pass
    that reaches them; changed between two passes and none or all zero, they were set to zero.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._count = 0
        self._seen = self._fingerprints()

    def before_backward(self) -> None:
        """See whether the gradients were set to zero since the last backward pass."""
        fingerprints = self._fingerprints()
        if fingerprints != self._seen and self._is_zero():
            self._count = 0
        self._seen = fingerprints

    def after_backward(self) -> None:
        """See whether the pass reached a gradient of this optimizer."""
        fingerprints = self._fingerprints()
        self._count += fingerprints != self._seen
        self._seen = fingerprints

    @property
    def scale(self) -> float:
        """1 / k; 1 before any backward pass."""
        return Window(divisor=1, count=self._count).scale

    def _gradients(self) -> list[Tensor | None]:
        return [tensor.grad for tensor in self._lane.table.tensors]

    def _is_zero(self) -> bool:
        return not any(bool(gradient.any()) for gradient in self._gradients() if gradient is not None)

    def _fingerprints(self) -> list[tuple[int, int] | None]:
        return [None if gradient is None else _fingerprint(gradient) for gradient in self._gradients()]


def _fingerprint(gradient: Tensor) -> tuple[int, int]:
    """Where a gradient's entries are, and how often they were written in place: neither reads an entry."""
    entries = gradient if gradient.layout is torch.strided else gradient._values()
    return entries.data_ptr(), gradient._version
