"""Rescaling of windows to the mean over their micro-batches: the part that AccumulationRescaling makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from clip_callbacks.accumulation.manual_window import ManualWindow
from clip_callbacks.accumulation.weights import Weight, name_of
from clip_callbacks.accumulation.window import Window
from clip_callbacks.accumulation.window_weights import WindowWeights
from clip_callbacks.accumulation.zero_backward import zero_backward
from clip_callbacks.core.apply import drop_gradients
from clip_callbacks.core.metric_names import ACCUMULATION_SCALE
from clip_callbacks.core.reduction import reduces_in_backward
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.trainer.dataloader_iter import takes_dataloader_iter
from clip_callbacks.trainer.deepspeed import uses_deepspeed
from clip_callbacks.trainer.optimizer_context import OptimizerContext

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class NoRescaling:
    """Does not rescale: the stand-in for :class:`Rescaler` without AccumulationRescaling.

    Args:
        trainer: The Trainer.
        module: The module to train.
    """

    rescales = False
    """If True, it counts micro-batches, and its factors may differ from 1."""
    acts_on_backward = False
    """If True, :meth:`after_backward` has something to do, and backward passes need the current parameters of all optimizers."""
    has_zero_weight = False
    """If True, the last micro-batch has weight 0, so that its loss does not count."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self._is_manual = not module.automatic_optimization

    def attach(self, contexts: Sequence[OptimizerContext]) -> None:
        """Take up optimizers that are new, or hold other parameters."""

    @property
    def loss_weight(self) -> float:
        """The factor for the last loss in the sum over its window."""
        # Lightning has divided it by the number of micro-batches; in manual optimization the user divides losses, or does not
        return 1.0 if self._is_manual else float(self._trainer.accumulate_grad_batches)

    def loss_factor(self, count: int, scale: float) -> float:
        """Return the factor from the weighted sum of a window's losses to their mean.

        Args:
            count: Number of micro-batches that count.
            scale: Result of :meth:`scale`.
        """
        # the mean in an epoch's short last window too, although Lightning divides the gradients of that one by too much
        return 1.0 if self._is_manual or not count else 1.0 / count

    def begin_batch(self, batch_idx: int) -> None:
        """Set gradients to zero after a step if Lightning will not."""

    def begin_window(self) -> None:
        """Begin a new window: the gradients were set to zero."""

    def before_backward(self, loss: Tensor) -> None:
        """Count the micro-batch, and multiply its loss by its weight."""

    def after_backward(self) -> None:
        """Remove the hooks of the backward pass."""

    def drop_micro_batch(self) -> None:
        """Subtract the last micro-batch from the window: its gradient was dropped."""

    @property
    def divisor(self) -> int:
        """Return the number N that Lightning divided the losses of the window by."""
        return self._trainer.accumulate_grad_batches

    def scale(self, context: OptimizerContext, scale_of_kept: float) -> float | None:
        """Return the factor that makes an optimizer's gradients a mean; None if all weights of the window are 0, on all ranks.

        Args:
            context: The optimizer.
            scale_of_kept: Factor from a mean over all micro-batches to the mean over those that were not dropped.
        """
        if self._is_manual:
            return 1.0
        return scale_of_kept

    def step_metrics(self, context: OptimizerContext, report: StepRecord) -> dict[str, float]:
        """Return the metrics of a logging step."""
        return {}

    def count_metrics(self, context: OptimizerContext) -> dict[str, float]:
        """Return counts over the run: none."""
        return {}

    def metric_names(self) -> list[str]:
        """Return the names of the metrics of a logging step."""
        return []

    def detach(self) -> None:
        """Remove all hooks."""


class AnyRescaler(NoRescaling):
    """What both rescalers log."""

    rescales = True

    @override
    def step_metrics(self, context: OptimizerContext, report: StepRecord) -> dict[str, float]:
        return {ACCUMULATION_SCALE: report.accumulation_scale}

    @override
    def metric_names(self) -> list[str]:
        return [ACCUMULATION_SCALE]


class DeepSpeedRescaler(AnyRescaler):
    """Undoes the second division of losses by N = ``accumulate_grad_batches`` under DeepSpeed, all of whose windows are full.

    Args:
        trainer: The Trainer.
        module: The module to train.
    """

    def weigh(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: there are no weights."""

    @override
    def scale(self, context: OptimizerContext, scale_of_kept: float) -> float | None:
        return float(self._trainer.accumulate_grad_batches)


class Rescaler(AnyRescaler):
    """Rescales the gradients of windows to the weighted mean over their micro-batches.

    Args:
        trainer: The Trainer.
        module: The module to train.
        weight: Function from a batch to its weight; None stands for equal weights.
        divide: If True, the sum over a window of manual optimization is divided, too.

    Raises:
        ValueError: If ``weight`` is given in manual optimization without ``divide``, or with ``training_step(dataloader_iter)``.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, weight: Weight | None, *, divide: bool) -> None:
        super().__init__(trainer, module)
        if weight and not module.automatic_optimization and not divide:
            raise ValueError(
                f"`divide` must be True beside a `weight` in manual optimization, got weight={name_of(weight)}: "
                "the gradients would not be divided by the sum of the weights. Set divide=True, and do not divide your losses."
            )
        if weight and takes_dataloader_iter(module):
            raise ValueError(
                f"`weight` must be None beside {type(module).__name__}.training_step(dataloader_iter), got "
                f"weight={name_of(weight)}: training_step fetches batches itself, so callbacks cannot compute weights in advance. "
                "Write training_step(self, batch, batch_idx), or leave `weight` out if all micro-batches have one size."
            )
        self._module = module
        self._divides_manually = self._is_manual and divide
        self._weights = WindowWeights(weight) if weight else None
        self._window = Window()
        self._manual: dict[int, ManualWindow] = {}
        self._contexts: dict[int, OptimizerContext] = {}
        self._has_stepped = False
        self._last_weight = self._loss_weight = 1.0
        self.has_zero_weight = False
        self.acts_on_backward = self._weights is not None or self._divides_manually
        self._hooks: list[RemovableHandle] = []

    @override
    def attach(self, contexts: Sequence[OptimizerContext]) -> None:
        self._contexts |= {context.index: context for context in contexts}
        if self._divides_manually:
            # by optimizer, so that an open window goes on when parameters are added
            known = {window.context.optimizer: window for window in self._manual.values()}
            for context in contexts:
                self._manual[context.index] = window = known.get(context.optimizer) or ManualWindow(context)
                window.continue_with(context)

    @override
    def begin_batch(self, batch_idx: int) -> None:
        # Lightning does so at batches whose number is divisible by N. If N has changed, that is not the batch after the step.
        if self._has_stepped and batch_idx % self._trainer.accumulate_grad_batches:
            for context in self._contexts.values():
                drop_gradients(context.table)
            self.begin_window()

    def weigh(self, batch: Any, batch_idx: int) -> None:
        """Compute the weight of a batch, if there are weights."""
        if self._weights:
            self._weights.ask(batch, batch_idx)

    @override
    def begin_window(self) -> None:
        self._window.reset()
        self._has_stepped = False

    @override
    def before_backward(self, loss: Tensor) -> None:
        if self._hooks:  # of the last backward pass, if it has raised
            self.detach()
        weight = 1.0
        if self._weights:
            weight = self._weights.read(self._trainer)
        self._last_weight, self.has_zero_weight = weight, not weight
        if self._is_manual:
            factor = self._factor_of_manual_loss(weight)
        else:
            factor = self._window.loss_weight(self._trainer.accumulate_grad_batches, weight)
            self._window.add(weight)
        self._loss_weight = factor
        if factor != 1.0:
            # a hook of the tensor, because no return value of on_before_backward replaces the loss
            self._hooks += [loss.register_hook(lambda gradient: gradient * factor)]  # type: ignore[no-untyped-call]
        if not weight:
            self._hooks += zero_backward(loss, [tensor for context in self._contexts.values() for tensor in context.table.tensors])

    def _factor_of_manual_loss(self, weight: float) -> float:
        # asked at each pass, because modules switch the synchronization inside training_step
        if self._divides_manually and not reduces_in_backward(self._module):
            raise ValueError(
                "`divide` must be False where FSDP keeps gradients back, got True after set_requires_gradient_sync(False) or "
                "set_requires_all_reduce(False): backward passes before the last one cannot be counted. Leave the call out, or "
                "divide your losses."
            )
        for window in self._manual.values():
            window.before_backward()
        return weight

    @override
    def after_backward(self) -> None:
        if self._hooks:
            self.detach()
        for window in self._manual.values():
            window.after_backward(self._last_weight)

    @property
    def divisor(self) -> int:
        """Return the number N that Lightning divided the losses of the window by."""
        return self._window.divisor

    @property
    def loss_weight(self) -> float:
        """The factor for the last loss, which is that of its gradient."""
        return self._loss_weight

    @override
    def loss_factor(self, count: int, scale: float) -> float:
        # the factor of the gradients: it holds the weights of all ranks, so that the mean over ranks is the weighted one
        return scale

    @override
    def drop_micro_batch(self) -> None:
        self._window.drop()

    @override
    def scale(self, context: OptimizerContext, scale_of_kept: float) -> float | None:
        if not self._is_manual:
            self._has_stepped = True
            window = self._window
        elif self._divides_manually:
            window = self._manual[context.index].window
        else:
            return 1.0
        if self._weights is None:
            return window.scale()
        # One collective for each window: gradients are averaged over ranks, so that the weights of all ranks count.
        total = self._weights.total(self._trainer, window.weight)
        if not total and window.count:
            return None
        return window.scale(total, self._trainer.world_size)

    @override
    def detach(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def make_rescaler(
    trainer: Trainer, module: LightningModule, weight: Weight | None, *, divide: bool
) -> Rescaler | DeepSpeedRescaler:
    """Make the part of one fit; arguments are those of :class:`Rescaler`."""
    if uses_deepspeed(trainer):
        return DeepSpeedRescaler(trainer, module)
    return Rescaler(trainer, module, weight, divide=divide)
