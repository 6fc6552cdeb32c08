"""The accumulation windows of a fit: what is in each, and what makes it a mean."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from clip_callbacks.accumulation.microbatches import InspectedMicroBatches, MicroBatches
from clip_callbacks.accumulation.rescaler import NoRescaling
from clip_callbacks.core.actions import StepOutcome
from clip_callbacks.core.step_report import StepReport
from clip_callbacks.stats.noise_scale import WindowNorms
from clip_callbacks.trainer.grad_scaler import grad_scaler
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import Discarded, KeptBatch, MicroBatch
from clip_callbacks.trainer.strategies import data_parallel

REMEMBERED = 1024
"""How many micro-batches of a window are remembered at most."""

KEPT_IN_MANUAL = 16
"""How many batches are kept in manual optimization, where nobody says how long a window is."""


class Windows:
    """The micro-batches since each optimizer's last step.

    Args:
        trainer: The Trainer.
        module: The module in training.
        rescaler: What makes a window's sum its mean.
        drops: Whether bad micro-batches are dropped.
        compares: Whether micro-batches are compared with their mean.
        restore_buffers: Whether a dropped micro-batch's effect on batch statistics is undone.

    Attributes:
        in_window: Whether there was a backward pass since the last step of any optimizer.
        has_backward: Whether there was one in this batch.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        rescaler: NoRescaling,
        *,
        drops: bool,
        compares: bool,
        restore_buffers: bool,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._rescaler = rescaler
        self._is_manual = not module.automatic_optimization
        self._drops = drops
        self._is_inspecting = drops or compares
        self._restore_buffers = restore_buffers
        self._inspected = MicroBatches()
        self._contexts: list[OptimizerContext] = []
        self._micro_batches: dict[int, deque[MicroBatch]] = {}
        self._open: set[int] = set()
        self._kept: KeptBatch | None = None
        self.in_window = self.has_backward = False

    def attach(self, contexts: Sequence[OptimizerContext], *, all_of_them: Sequence[OptimizerContext]) -> None:
        """Meet the optimizers, before the first step or after some of them took on other parameters.

        Args:
            contexts: Those that are new, or hold other parameters.
            all_of_them: All optimizers.
        """
        self._contexts = list(all_of_them)
        self._micro_batches = {
            context.index: self._micro_batches.get(context.index, deque(maxlen=REMEMBERED)) for context in all_of_them
        }
        self._rescaler.attach(contexts)
        if self._is_inspecting:
            self._inspected = InspectedMicroBatches(
                self._module,
                all_of_them,
                restore_buffers=self._restore_buffers,
                drops=self._drops,
                parallel=data_parallel(self._trainer),
            )

    def begin_batch(self, batch: Any, batch_idx: int, kept: KeptBatch | None) -> None:
        """Take up a batch, before its forward pass.

        Args:
            batch: The batch.
            batch_idx: Its number.
            kept: The batch as it is kept until its step, if it may have to be run again.
        """
        self._kept = kept
        self.has_backward = False
        self._rescaler.begin_batch(batch, batch_idx)
        self._inspected.begin_batch(batch)

    def replace_kept(self, kept: KeptBatch | None) -> None:
        """Keep the batch anew: LBFGS's closure runs it again, with other random numbers."""
        self._kept = kept

    @property
    def kept(self) -> KeptBatch | None:
        """The batch as it is kept until its step."""
        return self._kept

    def before_zero_grad(self) -> None:
        """Begin a new window: Lightning sets gradients to zero."""
        self._rescaler.begin_window()

    def before_backward(self, loss: Tensor) -> list[OptimizerContext]:
        """Remember the loss until the step, to be looked at only if the step is bad.

        Returns:
            The optimizers whose window begins with this micro-batch.
        """
        self.in_window = self.has_backward = True
        begun = []
        for context in self._contexts:
            window = self._micro_batches[context.index]
            if self._is_manual and not context.table.has_gradients:  # zero_grad began another window
                window.clear()
                self._open.discard(context.index)
            if context.index not in self._open:
                begun.append(context)
                self._open.add(context.index)
            window.append(MicroBatch(loss.detach(), self._kept))
            if self._is_manual and len(window) > KEPT_IN_MANUAL:  # an optimizer that steps seldom, or never
                window[-KEPT_IN_MANUAL - 1] = window[-KEPT_IN_MANUAL - 1]._replace(kept=None)
        self._inspected.before_backward()
        self._rescaler.before_backward(loss)
        return begun

    def after_backward(self, report: Callable[[OptimizerContext, MicroBatch], None]) -> bool:
        """Look at the micro-batch, and drop a bad one, if that is wanted.

        Args:
            report: Told of each optimizer with bad gradients, before they are dropped.

        Returns:
            Whether the micro-batch was dropped.
        """
        if not self._micro_batches:
            return False
        micro_batch = next(iter(self._micro_batches.values()))[-1]
        is_silent = self._rescaler.is_silent  # its loss may be NaN, and does not count
        losses = [] if is_silent else [micro_batch.loss]
        is_dropped = self._inspected.after_backward(losses, lambda context: report(context, micro_batch))
        if is_dropped or is_silent:
            for window in self._micro_batches.values():
                window.pop()
        if is_dropped:
            self._rescaler.drop_micro_batch()
        self._rescaler.after_backward()
        return is_dropped

    def scale(self, context: OptimizerContext) -> float | None:
        """What makes an optimizer's window a mean; None if all its weights are 0. On several ranks this may be a collective."""
        return self._rescaler.scale(context, self._inspected.scale)

    def discarded(self, scale: float | None) -> Discarded | None:
        """Why nothing of the window is left, if nothing is.

        Args:
            scale: What :meth:`scale` said.
        """
        if self._inspected.is_lost:
            return Discarded.DROPPED
        if scale is None:
            return Discarded.WEIGHTLESS
        return None

    def micro_batches(self, context: OptimizerContext) -> tuple[MicroBatch, ...]:
        """The micro-batches that wait for an optimizer's step."""
        return tuple(self._micro_batches[context.index])

    def clear(self, context: OptimizerContext) -> None:
        """Close the window of an optimizer: its step is decided."""
        self.in_window = False
        self._open.discard(context.index)
        self._micro_batches[context.index].clear()

    def end(self, report: StepReport | None) -> WindowNorms | None:
        """Forget what was found out about the window's micro-batches.

        Args:
            report: What came of the step; None if there was none.

        Returns:
            Norms of the micro-batches and of their mean, if they are known.
        """
        if not self._is_inspecting:
            return None
        norms = self._norms(report) if report is not None and report.outcome is StepOutcome.TAKEN else None
        self._inspected.end_window()
        return norms

    def _norms(self, report: StepReport) -> WindowNorms | None:
        """Norms of the micro-batches and of their mean, without Lightning's division by N and the loss scale."""
        scaler = grad_scaler(self._trainer)
        return self._inspected.window_norms(
            report.total.tolist()[0] / report.accumulation_scale,
            divisor=self._rescaler.divisor,
            loss_scale=scaler.get_scale() if scaler else 1.0,
        )

    def detach(self) -> None:
        """Let go of batches, losses and hooks."""
        self._kept = None
        for window in self._micro_batches.values():
            window.clear()
        self._open.clear()
        self.in_window = False
        self._rescaler.detach()
