"""AccumulationRescaling."""

# mypy: disable-error-code="override"
# hooks are given one Lightning's Trainer or the other's, which a type checker takes for strangers

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from clip_callbacks.accumulation.manual_window import ManualWindow
from clip_callbacks.accumulation.weights import name_of
from clip_callbacks.accumulation.window import Window
from clip_callbacks.accumulation.window_weights import Weighing
from clip_callbacks.accumulation.zero_backward import silence
from clip_callbacks.core.apply import drop
from clip_callbacks.core.reduction import reduces_in_backward
from clip_callbacks.engine.base import Member
from clip_callbacks.trainer.optimizer_context import Lane


class AccumulationRescaling(Member):
    r"""Makes the gradient of every accumulation window the mean over the micro-batches that really are in it.

    Lightning divides each loss by N = ``accumulate_grad_batches``, whatever the window holds; after k backward passes the
    gradient is multiplied by

    .. math:: \frac{N}{k} \qquad \text{or, with weights,} \qquad \frac{N R}{\sum_{r=1}^R \sum_{i=1}^{k} w_{ri}}

    before its norm is taken and clipped, so that a norm means the same in every window. A full window is not touched. Short
    are the last window of an epoch, one with micro-batches whose ``training_step`` returned None, and the first one after a
    resume inside a window. Where N changes inside a window, later losses are weighted so that all count the same.

    With a ``weight`` each loss is multiplied by the weight of its micro-batch, by a hook on it, and the window is divided by the
    sum of all weights on all R ranks, for which one number is reduced in each window. If a loss is a mean over what the weight
    counts, the gradient is that of the one large batch over all micro-batches and ranks. A micro-batch of weight 0 contributes
    nothing, even if its loss is NaN, as a mean over no label is; a window whose weights are all 0 is skipped like a bad step.

    In manual optimization nothing is divided by Lightning, and nothing is rescaled here unless ``divide`` is set: then the sum
    over the k calls of ``manual_backward`` since the optimizer's last ``zero_grad`` is divided by k, or by their weights' sum.

    Metric: ``grad/accumulation_scale``, where a window was rescaled.

    Args:
        weight: From a batch, as ``training_step`` gets it, to its weight, a number of at least 0:
            :class:`~clip_callbacks.LabelTokens`, :class:`~clip_callbacks.BatchSize`, or any function. None: all weigh the same.
        divide: Whether in manual optimization the sum over a window becomes a mean; for users who do not divide their losses.

    Raises:
        TypeError: If ``weight`` cannot be called.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> callbacks = [AccumulationRescaling(LabelTokens("labels"))]
        >>> trainer = Trainer(accumulate_grad_batches=4, callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    kind = "rescaling"

    def __init__(self, weight: Callable[[Any], float] | None = None, *, divide: bool = False) -> None:
        super().__init__()
        if weight is not None and not callable(weight):
            raise TypeError(f"`weight` must be a function from a batch to a number, or None, got {weight!r}.")
        self.weight = weight
        self.divide = divide
        self._window = Window()
        self._manual: dict[int, ManualWindow] = {}
        self._lanes: dict[int, Lane] = {}
        self._has_stepped = False
        self._weighing: Weighing | None = None
        self._last_weight = 1.0
        self._hooks: list[RemovableHandle] = []

    def begin(self) -> None:
        """Begin with no window, and no weight that failed: after an exception there was no teardown."""
        super().begin()
        self._begin_window()
        self._remove_hooks()
        self._manual, self._lanes, self._weighing, self._last_weight = {}, {}, None, 1.0

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook on a parameter: the backward pass may not have come to its end."""
        super().on_exception(trainer, pl_module, exception)
        self._remove_hooks()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse weights that nothing would divide by.

        Raises:
            ValueError: In manual optimization without ``divide``.
        """
        if self.weight and not pl_module.automatic_optimization and not self.divide:
            raise ValueError(
                f"`divide` must be True beside a `weight` in manual optimization, got weight={name_of(self.weight)}: nothing "
                "would be divided by the sum of the weights. Set divide=True, and do not divide your losses."
            )
        super().on_fit_start(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers."""
        super().teardown(trainer, pl_module, stage)
        self._begin_window()
        self._remove_hooks()
        self._manual, self._lanes = {}, {}

    def bind(self, lanes: Sequence[Lane], names: Sequence[str], *, renew: bool = False) -> None:
        """Have a window for each optimizer of manual optimization."""
        super().bind(lanes, names, renew=renew)
        self._manual |= {lane.index: ManualWindow(lane) for lane in lanes}
        self._lanes |= {lane.index: lane for lane in lanes}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask for the weight of the batch; set gradients to zero that a step has used and Lightning will not.

        Lightning does so where N divides the batch's number. Where N has changed since, that is not the batch after the step.
        """
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._has_stepped and batch_idx % trainer.accumulate_grad_batches:
            for lane in self._lanes.values():
                drop(lane.table)
            self._begin_window()
        if self.weight:
            self._weighing = self._weighing or Weighing(self.weight)
            self._weighing.ask(batch, batch_idx)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begin a new window."""
        self._begin_window()

    def _begin_window(self) -> None:
        self._window.reset()
        self._has_stepped = False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Count the micro-batch; weight its loss, by its own weight and if N has changed inside the window."""
        super().on_before_backward(trainer, pl_module, loss)
        self._remove_hooks()  # the backward pass before may have raised
        weight = self._last_weight = self._weighing.read(trainer) if self._weighing else 1.0
        if pl_module.automatic_optimization:
            factor = self._window.loss_weight(trainer.accumulate_grad_batches, weight)
            self._window.add(weight)
        else:
            factor = weight
            if self.divide and not reduces_in_backward(pl_module):
                raise ValueError(
                    "`divide` must be False where FSDP keeps gradients back, got True after set_requires_gradient_sync(False): "
                    "nothing tells of the backward passes between. Leave it at True, or divide your losses."
                )
            for window in self._manual.values() if self.divide else ():
                window.before_backward()
        if factor != 1.0:
            self._hooks += [loss.register_hook(lambda gradient: gradient * factor)]  # type: ignore[no-untyped-call]
        if not weight:
            self._hooks += silence(loss, [tensor for lane in self._lanes.values() for tensor in lane.table.tensors])

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the micro-batches that reached an optimizer of manual optimization."""
        super().on_after_backward(trainer, pl_module)
        self._remove_hooks()
        if not pl_module.automatic_optimization:
            for window in self._manual.values() if self.divide else ():
                window.after_backward(self._last_weight)

    @property
    def divisor(self) -> int:
        """N, what the losses of the window were divided by."""
        return self._window.divisor

    @property
    def is_silent(self) -> bool:
        """Whether the last micro-batch has weight 0, and its loss does not count."""
        return not self._last_weight

    def drop_micro_batch(self) -> None:
        """Leave the last micro-batch out, its count and its weight: the guard has dropped its gradient."""
        self._window.drop()

    def scale(self, trainer: Trainer, module: LightningModule, lane: Lane) -> float | None:
        """What makes the gradients of an optimizer's window a mean; None if the weights of the window are all 0, on all ranks."""
        if module.automatic_optimization:
            self._has_stepped = True
            return self._scale_of(trainer, self._window)
        return self._scale_of(trainer, self._manual[lane.index].window) if self.divide else 1.0

    def _scale_of(self, trainer: Trainer, window: Window) -> float | None:
        if self.weight is None:
            return window.scale()
        assert self._weighing is not None
        total = self._weighing.total(trainer, window.weight)
        return window.scale(total, trainer.world_size) if total or not window.count else None
