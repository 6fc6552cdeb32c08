"""Going back to the last good weights when bad steps do not end: when a copy is made, and when it is put back."""

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
from clip_callbacks.guard.restore import SkippedStepRestorer
from clip_callbacks.guard.run_state import HasLimitStates, RunCopy, RunState
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.scheduler_hold import SchedulerHold
from clip_callbacks.trainer.step_context import StepContext

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class NoRollback:
    """Never goes back."""

    step: int | None = None
    """The optimizer step before which the copy was made; None if there is none."""
    factor = 1.0
    """What the next return multiplies the copy's learning rates by."""
    since = ""
    """For the message that there is no copy: since when."""
    is_fresh = False
    """Whether the run has gone back in this batch: what else comes of the batch does not count."""

    def attach(self, contexts: Sequence[OptimizerContext], restorer: SkippedStepRestorer) -> None:
        """Meet the optimizers, before the first step or after they have taken up or given up parameters."""

    def ask(self) -> None:
        """Go back at the end of this optimizer step."""

    def begin_batch(self, *, in_window: bool) -> None:
        """A batch comes.

        Args:
            in_window: Whether there was a backward pass since the last step.
        """

    def begin_step(self) -> None:
        """A step comes; nothing of it has had an effect."""

    def go_back(self, step: StepContext) -> None:
        """Put everything back, if it was asked for."""

    def end_step(self, step: StepContext, report: StepRecord) -> None:
        """Copy what led to a good step, which is about to be taken, if it is time to."""

    def end_batch(self) -> None:
        """Undo what the rest of a batch did to what was put back."""

    def detach(self) -> None:
        """Take all hooks off."""


class Rollback(NoRollback):
    """Keeps one copy of the weights and all that goes with them, and puts it back.

    Args:
        trainer: The Trainer.
        module: The module in training.
        limits: Whatever has limits: their states go back too.
        schedules: What holds schedules.
        every: Good steps between copies.
        lr_factor: What learning rates are multiplied by, at each return.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        limits: Sequence[HasLimitStates],
        schedules: SchedulerHold,
        *,
        every: int,
        lr_factor: float,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._schedules = schedules
        self._every = every
        self._lr_factor = lr_factor
        self._contexts: Sequence[OptimizerContext] = ()
        self.run = RunState(trainer, module, (), limits, schedules)
        self._copy: RunCopy | None = None
        self._good_steps = self._returns = 0
        self._is_candidate = self._is_asked = self._is_lost = self._has_checked_states = False
        self._packed: set[int] = set()
        self._handles: list[RemovableHandle] = []
        self.is_fresh = False

    @override
    def attach(self, contexts: Sequence[OptimizerContext], restorer: SkippedStepRestorer) -> None:
        self._contexts, self._restorer = contexts, restorer
        if len(contexts) > 1:
            self._packed = {id(tensor) for context in contexts for tensor in context.table.tensors if _looks_packed(tensor)}
        copy, self._copy = self._copy, None
        if copy is None:
            self.run.meet(contexts)
            self.run.check()
            return
        self._copy = self.run.carry_over(copy, contexts)
        self._is_lost = self._copy is None
        if self._copy is not None:
            self._returns = 0

    @property
    def step(self) -> int | None:  # type: ignore[override]
        """The optimizer step before which the copy was made; None if there is none."""
        return self._copy.step if self._copy else None

    @property
    def factor(self) -> float:  # type: ignore[override]
        """What the next return multiplies the copy's learning rates by: it may be one of several to the same copy."""
        return self._lr_factor ** (self._returns + 1)

    @property
    def since(self) -> str:  # type: ignore[override]
        """For the message that there is no copy: since when."""
        if self._is_lost:
            return " since the optimizers took up other parameters"
        if self._trainer.ckpt_path:
            return " since the resume"
        return ""

    @override
    def ask(self) -> None:
        self._is_asked = True

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        self.is_fresh = False
        if self._good_steps and not self._has_checked_states:  # after the first step, not in the middle of the run
            self._has_checked_states = True
            self.run.check()
        self._take_up_other_schedules()
        if in_window:
            return
        self._is_candidate = self._copy is None or self._good_steps >= self._every
        if self._is_candidate:
            self.run.keep_buffers()

    @override
    def begin_step(self) -> None:
        if self._is_candidate:
            self.run.keep_limits()

    @override
    def go_back(self, step: StepContext) -> None:
        """Put everything back if it was asked for, and once more after the step, which is taken all the same.

        LBFGS moves on in it, and others count their steps in their groups.
        """
        if not self._is_asked:
            return
        self._take_up_other_schedules()
        self._is_asked, self.is_fresh = False, True
        self._returns += 1
        self._good_steps = 0
        optimizer = step.optimizer.optimizer
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self._restore()))
        if not isinstance(optimizer, LBFGS):
            self._restore()
            self._restorer.reset()

    @override
    def end_step(self, step: StepContext, report: StepRecord) -> None:
        if self.is_fresh:
            assert self._copy is not None
            if self._module.automatic_optimization:
                self._schedules.rewind(self._trainer, self._copy.mark)
            return
        if not step.is_new:
            return
        is_first, self._is_candidate = self._is_candidate, False
        if report.outcome is not StepOutcome.TAKEN or not step.optimizer.table.has_gradients:
            return
        if is_first and not self.run.has_grown and self._others_are_good(step.optimizer):
            self._copy = None  # what is in memory is no longer that of the old one
            self._copy = self.run.copy()
            self._good_steps = self._returns = 0
        self._good_steps += 1

    @override
    def end_batch(self) -> None:
        self.detach()
        if not self.is_fresh or self._copy is None:
            return
        if self._module.automatic_optimization:
            self.run.restore_scaler(self._copy)
        else:
            self._restore()

    @override
    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _others_are_good(self, context: OptimizerContext) -> bool:
        """Whether what other optimizers hold may be copied with this one's weights: it has no part in these gradients."""
        others = [other for other in self._contexts if other is not context]
        if not others:
            return True
        if any(other.report is not None and other.report.outcome is not StepOutcome.TAKEN for other in others):
            return False
        rows = [row for other in others for row in zip(other.table.tensors, other.table.shards, strict=True)]
        shards = [shard.detach() for tensor, shard in rows if id(tensor) not in self._packed and has_arithmetic(shard)]
        are_finite = not shards or all_finite(torch._foreach_norm(shards))  # of norms: a weight of 1e30 is as lost as a NaN
        if self._trainer.world_size == 1:
            return are_finite
        return not on_any_rank(not are_finite, context.table.shards[0].device)

    def _take_up_other_schedules(self) -> None:
        """Take up schedules that came in the place of others: what those were before is of no use to them."""
        if self._copy is not None and self.run.has_other_schedules(self._copy):
            self._returns = 0
            self._copy = self.run.with_present_schedules(self._copy)

    def _restore(self) -> None:
        assert self._copy is not None
        self.run.restore(self._copy, self._lr_factor**self._returns)


@torch.no_grad()
def _looks_packed(parameter: Tensor) -> bool:
    """Whether a frozen parameter was no good as a number from the beginning: there may be codes in it."""
    shard = shard_of(parameter)
    return not learns(parameter) and has_arithmetic(shard) and not all_finite(torch._foreach_norm([shard]))
