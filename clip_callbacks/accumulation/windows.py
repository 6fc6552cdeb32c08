"""The accumulation windows of a fit: the micro-batches in each, and the factors that make their sums means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from clip_callbacks.accumulation.optimizer_window import OptimizerWindow
from clip_callbacks.accumulation.rescaler import NoRescaling
from clip_callbacks.core.actions import StepOutcome
from clip_callbacks.core.reduction import reduces_in_backward, shard_of
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.stats.noise_scale import WindowNorms
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import Discarded, KeptBatch, MicroBatch, StepContext

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

ReportMicroBatch: TypeAlias = Callable[[OptimizerContext, tuple[MicroBatch, ...]], None]
"""Function of an optimizer with bad gradients and of their micro-batch; no micro-batch if a step was taken in between."""


class Windows:
    """The micro-batches since each optimizer's last step.

    Args:
        trainer: The Trainer.
        module: The module in training.
        rescaler: The part that rescales windows.

    Attributes:
        kept: The current batch, if it is kept until its step because it may have to be run again.
        in_window: True after a backward pass, until the next step of any optimizer.
        has_backward: True after a backward pass in this batch.
        has_step: True after a step in this batch.
        acts_on_backward: If True, :meth:`after_backward` has something to do, and backward passes need the current parameters of
            all optimizers.
        looks_at_gradients: If True, :meth:`end_pass` needs them, too: a pass may not reach all optimizers.
    """

    _scale_of_kept: float = 1.0
    """The factor from a mean over all micro-batches to the mean over those that were not dropped."""

    def __init__(self, trainer: Trainer, module: LightningModule, rescaler: NoRescaling) -> None:
        self._trainer = trainer
        self._module = module
        self._rescaler = rescaler
        self._is_manual = not module.automatic_optimization
        self._contexts: Sequence[OptimizerContext] = ()
        self._windows: dict[int, OptimizerWindow] = {}
        self._newest: MicroBatch | None = None
        self._sharing: dict[int, list[int]] = {}
        self._are_sharded = self.looks_at_gradients = False
        self.kept: KeptBatch | None = None
        self._rescales, self.acts_on_backward = rescaler.rescales, rescaler.acts_on_backward
        self.in_window = self.has_backward = self.has_step = False

    def attach(self, changed: Sequence[OptimizerContext], contexts: Sequence[OptimizerContext]) -> None:
        """Take up optimizers, before the first step or when some of them have changed.

        Args:
            changed: Optimizers that are new, or hold other parameters.
            contexts: All optimizers.
        """
        self._contexts = contexts
        are_several = len(contexts) > 1
        self._sharing = _sharing(contexts) if are_several else {}
        self._are_sharded = any(context.table.reduction is not None for context in contexts)
        self.looks_at_gradients = are_several or (self._is_manual and not self._are_sharded and self._has_other_parameters())
        self._windows = {context.index: self._windows.get(context.index) or OptimizerWindow() for context in contexts}
        self._rescaler.attach(changed)

    def _has_other_parameters(self) -> bool:
        """Return whether the module has parameters that no optimizer holds: a loss may be of these alone."""
        held = {id(tensor) for context in self._contexts for tensor in context.table.tensors}
        return any(id(parameter) not in held for parameter in self._module.parameters())

    def begin_batch(self, batch: Any, batch_idx: int, kept: KeptBatch | None) -> None:
        """Begin a batch, before its forward pass.

        Args:
            batch: The batch.
            batch_idx: The number of the batch in its epoch.
            kept: The batch again, if it is kept until its step because it may have to be run again.
        """
        self.kept = kept
        self.has_backward = self.has_step = False
        if self._rescales:
            self._rescaler.begin_batch(batch_idx)

    def keep_again(self, kept: KeptBatch | None) -> None:
        """Take another copy of the current batch, for a further closure call."""
        self.kept = kept

    def before_backward(self, loss: Tensor) -> None:
        """Record the loss until the step."""
        self.in_window = self.has_backward = True
        if self._rescaler.rescales:
            self._rescaler.before_backward(loss)
        if type(loss) is not Tensor:
            # a plain tensor: limits may keep losses, and a checkpoint with another class needs that class to be loaded
            loss = shard_of(loss).as_subclass(Tensor)
        # Without its graph, which would outlive the backward pass; not read, because that would wait for the device. `data` is
        # as good as `detach`, without an operator to dispatch.
        self._newest = micro_batch = MicroBatch(loss.data, self.kept, self._rescaler.loss_weight)
        for context in self._contexts:
            window = self._windows[context.index]
            if self._is_manual:
                self._begin_manual_pass(context, window)
            if len(window.micro_batches) == window.max_length:
                window.shorten()
            window.micro_batches.append(micro_batch)

    def _begin_manual_pass(self, context: OptimizerContext, window: OptimizerWindow) -> None:
        """Begin a new window if all gradients are None: Lightning has no hook for ``zero_grad`` in manual optimization."""
        # Gradients of zero, after zero_grad(set_to_none=False), are not looked for: to read them would wait for the device.
        if not context.table.has_gradients:
            window.clear()
        window.forget_batch()
        if self.looks_at_gradients:
            window.begin_pass(context.table)

    def end_pass(self) -> tuple[set[int], set[int]]:
        """Find out which optimizers have gradients that the backward pass has changed; the loss is theirs alone.

        Returns:
            The numbers of these optimizers, and the numbers of those whose window has begun with this pass.
        """
        reached, begun = set(), set()
        newest = self._newest
        if newest is not None:
            # A copy of the loss, which is the module's own in manual optimization; after the pass, up to which it may be scaled.
            self._newest = newest._replace(loss=newest.loss.clone())
        # a pass may leave the gradients of shards to a later one
        reaches_all = not self.looks_at_gradients or (self._are_sharded and not reduces_in_backward(self._module))
        for context in self._contexts:
            window = self._windows[context.index]
            if reaches_all or window.is_reached(context.table):
                reached.add(context.index)
                if not window.is_open:
                    begun.add(context.index)
                window.reach(newest, self._newest)
            else:
                # a bad loss must not make the step of an optimizer bad that the pass has not reached
                window.remove(newest)
        return reached, begun

    def after_backward(self, report: ReportMicroBatch) -> bool:
        """End a backward pass: measure the micro-batch and drop it if it is bad, if that was asked for.

        Args:
            report: Function that is called for each optimizer with bad gradients, before they are dropped.

        Returns:
            True if the micro-batch was dropped.
        """
        if self._rescaler.has_zero_weight:
            self._remove_newest(is_weightless=True)
        self._rescaler.after_backward()
        return False

    def _remove_newest(self, *, is_weightless: bool = False) -> None:
        """Remove the last micro-batch from all windows that have it."""
        for window in self._windows.values():
            window.remove(self._newest, is_weightless=is_weightless)

    def of_step(self, context: OptimizerContext) -> tuple[tuple[MicroBatch, ...], float, Discarded | None]:
        """Return the window that an optimizer steps with. Collective with weights on several ranks.

        Args:
            context: The optimizer.

        Returns:
            The micro-batches; the factor that makes their gradients a mean; the reason for which their gradients must be discarded,
            or None.
        """
        window = self._windows[context.index]
        micro_batches, reason = tuple(window.micro_batches), window.discarded
        scale: float | None = 1.0
        if self._rescales:
            scale = self._rescaler.scale(context, self._scale_of_kept)
        if scale is None:  # all weights of the window are 0
            return micro_batches, 1.0, reason or Discarded.WEIGHTLESS
        return micro_batches, scale, reason

    def has_loss(self, context: OptimizerContext) -> bool:
        """Return whether any backward pass of an optimizer's window went through Lightning."""
        return self._windows[context.index].is_known

    def loss(self, context: OptimizerContext, scale: float) -> Tensor:
        """Return the loss that an optimizer's gradient belongs to: the weighted mean over the micro-batches of its window.

        Nothing is read on the host.

        Args:
            context: The optimizer.
            scale: The factor from :meth:`of_step`.

        Returns:
            The loss of this rank, multiplied by the loss scale, shape ``(1,)``; NaN if it is not known.
        """
        return self._windows[context.index].loss(partial(self._rescaler.loss_factor, scale=scale))

    def discard_others(self, step: StepContext, outcome: StepOutcome) -> None:
        """Discard the windows of optimizers that share parameters and a micro-batch with a skipped step.

        Args:
            step: The skipped step.
            outcome: Its outcome.
        """
        reason = Discarded.OVERFLOWED if outcome is StepOutcome.OVERFLOWED else Discarded.SHARED
        for index in self._sharing.get(step.optimizer.index, ()):
            # by identity: the same backward pass has reached both
            if any(mine is theirs for mine in step.micro_batches for theirs in self._windows[index].micro_batches):
                self._windows[index].discard(reason)

    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        """Return why steps of an optimizer cannot be decided on the device; None if they can."""
        if self._sharing.get(context.index):
            return "it shares parameters with other optimizers, whose windows a skipped step discards"
        return None

    def clear(self, context: OptimizerContext) -> None:
        """End the window of an optimizer: its step is decided."""
        self.in_window, self.has_step = False, True
        self._newest = None
        self._windows[context.index].clear()

    @property
    def is_idle(self) -> bool:
        """Return whether this batch contributes to no step: ``training_step`` returned None, or only ran a forward pass.

        In manual optimization a step without a backward pass is one after ``loss.backward()``, of which Lightning does not know.
        """
        return not self.has_backward and not (self._is_manual and self.has_step)

    @property
    def is_zeroed(self) -> bool:
        """Whether other code has set the gradients of the open window to None; known in automatic optimization on one rank only.

        Ranks must divide their windows alike, and another one may have kept its gradients.
        """
        if self._is_manual or self._trainer.world_size > 1:
            return False
        return not any(context.table.has_gradients for context in self._contexts)

    def abandon(self) -> list[Tensor]:
        """Discard windows that get no step; in manual optimization they may continue in the next epoch.

        Returns:
            The losses in them.
        """
        losses = [each.loss for window in self._windows.values() for each in window.micro_batches]
        if not self._is_manual:
            self.in_window = False
            for window in self._windows.values():
                window.clear()
            self._rescaler.begin_window()
            self.end(None)
        return losses

    def end(self, report: StepRecord | None) -> WindowNorms | None:
        """Discard the measurements of the window's micro-batches.

        Args:
            report: Report of the step; None if there was none.

        Returns:
            Norms of the micro-batches and of their mean; None if they are not known.
        """
        return None

    def detach(self) -> None:
        """Release batches and losses, and remove all hooks."""
        self.kept = self._newest = None
        for window in self._windows.values():
            window.clear()
        self.in_window = False
        self._rescaler.detach()


def _sharing(contexts: Sequence[OptimizerContext]) -> dict[int, list[int]]:
    """Return, by the number of each optimizer, the numbers of others that share parameters with it."""
    held = {context.index: set(map(id, context.table.tensors)) for context in contexts}
    return {index: [other for other in held if other != index and held[other] & held[index]] for index in held}
