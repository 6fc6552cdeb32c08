"""Rollback to the last good weights when bad steps do not end: when a copy is made, and when it is restored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import LBFGS
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from clip_callbacks.core.actions import StepOutcome
from clip_callbacks.core.nonfinite import all_finite, has_arithmetic
from clip_callbacks.core.reduction import on_any_rank, shard_of
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.core.tensor_table import learns
from clip_callbacks.guard.options import Rollback
from clip_callbacks.guard.restore import SkippedStepRestorer
from clip_callbacks.guard.run_state import HasLimitStates, RunCopy, RunState
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.scheduler_hold import SchedulerHold
from clip_callbacks.trainer.step_context import StepContext

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class NoRestorer:
    """Restores nothing: the stand-in for a RunRestorer in a run without rollbacks."""

    step: int | None = None
    """The optimizer step before which the copy was made; None if there is none."""
    factor = 1.0
    """Factor for the copy's learning rates at the next rollback."""
    since = ""
    """Event since which there is no copy, for the error message."""
    is_fresh = False
    """Whether there was a rollback in this batch, so that the rest of the batch does not count."""

    def attach(self, contexts: Sequence[OptimizerContext], restorer: SkippedStepRestorer) -> None:
        """Attach to the optimizers, before the first step or after they have taken up or given up parameters."""

    def request(self) -> None:
        """Request a rollback at the end of this optimizer step."""

    def begin_batch(self, *, in_window: bool) -> None:
        """Prepare for a batch, before its forward pass.

        Args:
            in_window: If True, a window is open: there was a backward pass since the last step.
        """

    def begin_step(self) -> None:
        """Prepare for a step, before it has any effect."""

    def restore(self, step: StepContext) -> None:
        """Restore the copy, if a rollback was requested."""

    def end_step(self, step: StepContext, report: StepRecord) -> None:
        """Copy the run before a good step is taken, if a new copy is due."""

    def end_batch(self) -> None:
        """Restore what the rest of a batch has changed after a rollback."""

    def detach(self) -> None:
        """Remove all hooks."""


class RunRestorer(NoRestorer):
    """Keeps one copy of the weights and everything that belongs to them, and restores it.

    Args:
        trainer: The Trainer.
        module: The module in training.
        limits: Owners of limits, whose states are restored too.
        schedules: Hold on the learning-rate schedules.
        options: Number of steps between copies, and factor for learning rates.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        limits: Sequence[HasLimitStates],
        schedules: SchedulerHold,
        options: Rollback,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._schedules = schedules
        self._options = options
        self._contexts: Sequence[OptimizerContext] = ()
        self.run = RunState(trainer, module, (), limits, schedules)
        self._copy: RunCopy | None = None
        self._good_steps = self._restored_times = 0
        self._is_candidate = self._is_requested = self._is_lost = self._has_checked_states = False
        self._packed: set[int] = set()
        self._handles: list[RemovableHandle] = []
        self.is_fresh = False

    @override
    def attach(self, contexts: Sequence[OptimizerContext], restorer: SkippedStepRestorer) -> None:
        self._contexts, self._restorer = contexts, restorer
        # Only one of several optimizers asks about the others' parameters, where packed codes must not pass for NaN.
        if len(contexts) > 1:
            self._packed = {id(tensor) for context in contexts for tensor in context.table.tensors if _may_be_packed(tensor)}
        # If adapting raises, there is no copy rather than one of other parameters.
        copy, self._copy = self._copy, None
        if copy is None:
            self.run.attach(contexts)
            self.run.check()
            return
        self._copy = self.run.carry_over(copy, contexts)
        self._is_lost = self._copy is None
        if self._copy is not None:
            # the groups that are now in the copy have the factors of earlier rollbacks in their rates
            self._restored_times = 0

    @property
    def step(self) -> int | None:  # type: ignore[override]
        """The optimizer step before which the copy was made; None if there is none."""
        return self._copy.step if self._copy else None

    @property
    def factor(self) -> float:  # type: ignore[override]
        """Factor for the copy's learning rates at the next rollback, which may be one of several to the same copy."""
        return self._options.lr_factor ** (self._restored_times + 1)

    @property
    def since(self) -> str:  # type: ignore[override]
        """Event since which there is no copy, for the error message."""
        if self._is_lost:
            return " since the optimizers took up other parameters"
        if self._trainer.ckpt_path:
            return " since the resume"
        return ""

    @override
    def request(self) -> None:
        self._is_requested = True

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        self.is_fresh = False
        if self._good_steps and not self._has_checked_states:  # states exist after the first step; an error is best raised then
            self._has_checked_states = True
            self.run.check()
        self._take_up_schedules()
        if in_window:
            return
        # decided before the forward pass, because the copy needs the buffers from before it
        self._is_candidate = self._copy is None or self._good_steps >= self._options.every_n_steps
        if self._is_candidate:
            self.run.keep_buffers()

    @override
    def begin_step(self) -> None:
        if self._is_candidate:
            self.run.keep_limits()

    @override
    def restore(self, step: StepContext) -> None:
        """Restore the copy if a rollback was requested, and once more after the step, because the optimizer is called nevertheless.

        LBFGS moves the parameters in that call, and other optimizers count their steps in their groups.
        """
        if not self._is_requested:
            return
        self._take_up_schedules()
        self._is_requested, self.is_fresh = False, True
        self._restored_times += 1
        self._good_steps = 0
        optimizer = step.optimizer.optimizer
        # A hook of torch may run in the middle of the step too, once for each class with a `step`; to restore twice does no harm.
        # A GradScaler that skips does not call the optimizer, and nothing has to be restored once more.
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self._restore()))
        # the line search of LBFGS goes on with directions of its own, and is restored when it returns
        if not isinstance(optimizer, LBFGS):
            self._restore()
            self._restorer.reset()

    @override
    def end_step(self, step: StepContext, report: StepRecord) -> None:
        if self.is_fresh:
            assert self._copy is not None
            # in manual optimization the module steps its schedules itself
            if self._module.automatic_optimization:
                self._schedules.hold_for_rollback(self._trainer, self._copy.mark)
            return
        if not step.is_new:
            return
        # Of several steps in the batch only the first can be copied: later ones come after weights have moved.
        is_first, self._is_candidate = self._is_candidate, False
        # Only finite gradients show that the weights from before the step, which are copied, are good.
        if report.outcome is not StepOutcome.TAKEN or not step.optimizer.table.has_gradients:
            return
        if is_first and not self.run.has_new_tensors and self._others_are_good(step.optimizer):
            self._copy = None  # if the copy fails, the memory holds parts of both
            self._copy = self.run.copy()
            self._good_steps = self._restored_times = 0
        self._good_steps += 1

    @override
    def end_batch(self) -> None:
        self.detach()
        if not self.is_fresh or self._copy is None:
            return
        # After the step, `scaler.update()` has lowered the scale, or the module's own code has gone on with the batch.
        if self._module.automatic_optimization:
            self.run.restore_scaler(self._copy)
        else:
            self._restore()

    @override
    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _others_are_good(self, context: OptimizerContext) -> bool:
        """Return whether the other optimizers' parameters may be copied: the gradients of this step say nothing about them."""
        others = [other for other in self._contexts if other is not context]
        if not others:
            return True
        if any(other.report is not None and other.report.outcome is not StepOutcome.TAKEN for other in others):
            return False
        # Their gradients were good at a step before, which may have made these weights non-finite.
        rows = [row for other in others for row in zip(other.table.tensors, other.table.shards, strict=True)]
        shards = [shard.detach() for tensor, shard in rows if id(tensor) not in self._packed and has_arithmetic(shard)]
        are_finite = not shards or all_finite(torch._foreach_norm(shards))  # norms, because those of a weight of 1e30 overflow
        if self._trainer.world_size == 1:
            return are_finite
        # shards differ between ranks, and all ranks must copy at the same step
        return not on_any_rank(not are_finite, context.table.shards[0].device)

    def _take_up_schedules(self) -> None:
        """Copy the present schedules if they have replaced others: the states of those would not fit."""
        # load_state_dict would write attributes of one class of schedules into another
        if self._copy is not None and self.run.has_other_schedules(self._copy):
            self._restored_times = 0
            self._copy = self.run.with_present_schedules(self._copy)

    def _restore(self) -> None:
        assert self._copy is not None
        self.run.restore(self._copy, self._options.lr_factor**self._restored_times)


@torch.no_grad()
def _may_be_packed(parameter: Tensor) -> bool:
    """Return whether a frozen parameter is non-finite from the beginning: it may hold packed codes instead of numbers."""
    shard = shard_of(parameter)
    return not learns(parameter) and has_arithmetic(shard) and not all_finite(torch._foreach_norm([shard]))
