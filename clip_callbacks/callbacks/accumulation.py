"""The callback AccumulationRescaling."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from clip_callbacks.accumulation.rescaler import make_rescaler
from clip_callbacks.core.arguments import as_flag
from clip_callbacks.engine.base import GradientCallback
from clip_callbacks.engine.components import Parts
from clip_callbacks.engine.engine import StepEngine
from clip_callbacks.trainer.checks import CallbackFacts
from clip_callbacks.trainer.idle_hooks import hide_hooks

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class AccumulationRescaling(GradientCallback):
    r"""Makes the gradient of every accumulation window the mean over the micro-batches that are really in it.

    Lightning divides each loss by N = ``accumulate_grad_batches``, whatever the number k of micro-batches in the window. This
    callback multiplies the accumulated gradient by

    .. math:: \frac{N}{k} \qquad \text{or, with weights,} \qquad \frac{N R}{\sum_{r=1}^R \sum_{i=1}^{k} w_{ri}}

    before its norm is measured and clipped, so that norms are comparable between windows. Without weights, full windows are not
    changed. Windows are short at the end of an epoch, if ``training_step`` returned None, and after a resume inside a window. If N
    changes inside a window, later losses are multiplied so that all micro-batches count equally.

    With a ``weight`` each loss is multiplied by the weight of its micro-batch, by a hook on the loss, and the window is divided by
    the sum of all weights on all R ranks. That takes one collective of one number for each window. If each loss is a mean over
    what the weight counts, the gradient is that of one large batch over all micro-batches and ranks. A micro-batch of weight 0
    contributes nothing, even if its loss is NaN, as a mean over no labels is; a window whose weights are all 0 is skipped like a
    bad step.

    In manual optimization Lightning divides no loss, and this callback rescales nothing unless ``divide`` is set: then the sum over
    the k calls of ``manual_backward`` since the optimizer's last ``zero_grad`` is divided by k, or by the sum of their weights.

    Metric: ``grad/accumulation_scale``, the factor, on logging steps whose window was rescaled.

    Args:
        weight: Function from the batch that ``training_step`` gets to its weight, a number of at least 0:
            :class:`~clip_callbacks.LabelTokens`, :class:`~clip_callbacks.BatchSize`, or your own. None: all weights are equal.
        divide: If True, the sum over a window of manual optimization is divided, too; for modules that do not divide their losses.

    Raises:
        TypeError: If ``weight`` is not callable.
        ValueError: At fit start, if the optimizer is LBFGS, if ``weight`` is given in manual optimization without ``divide`` or
            with ``training_step(dataloader_iter)``; in training, if a weight is not a finite number of at least 0.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> callbacks = [AccumulationRescaling(LabelTokens("labels"))]
        >>> trainer = Trainer(accumulate_grad_batches=4, callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    _kind = "rescaling"

    def __init__(self, weight: Callable[[Any], float] | None = None, *, divide: bool = False) -> None:
        super().__init__()
        if weight is not None and not callable(weight):
            raise TypeError(f"`weight` must be a function from a batch to a number, or None, got {weight!r}.")
        self.weight = weight
        self.divide = as_flag(divide, "divide")

    def _facts(self) -> CallbackFacts:
        options = {"weight": self.weight, "divide": self.divide}
        return CallbackFacts(self._kind, self._stable_key, is_weighted=self.weight is not None, options=options)

    def _make_parts(self, trainer: Trainer, module: LightningModule, saved: dict[str, Any]) -> Parts:
        # If a checkpoint brings a state in the middle of a fit, the part stays, and with it the current window.
        if self._engine is None:
            self._part = make_rescaler(trainer, module, self.weight, divide=self.divide)
        return Parts(rescaler=self._part, histories=saved.get("history", {}))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compute the weight of the batch, after callbacks before this one may have changed it."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._part:
            self._part.weigh(batch, batch_idx)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begin a new window."""
        if self._part:
            self._part.begin_window()

    def _hide_hooks(self, engine: StepEngine) -> None:
        super()._hide_hooks(engine)
        if self._driver is not self and self.weight is None:
            hide_hooks(self, {"on_train_batch_start"}, AccumulationRescaling)

    def _parts_state(self) -> dict[str, Any]:
        return {}
