"""A fit without a guard; and what a guard is asked, and answers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from clip_callbacks.core.actions import Action, StepOutcome
from clip_callbacks.core.limit_state import StateMismatch
from clip_callbacks.core.limits import Limit
from clip_callbacks.core.rules import ClipState
from clip_callbacks.core.step import MeasuredStep
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.guard.run_state import HasLimitStates
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import KeptBatch, StepContext, StepMode

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


@dataclass(frozen=True)
class Resolution:
    """What is done about a measured step.

    Args:
        action: What is done to its gradients.
        outcome: What comes of the step, where that is more than the action says.
        is_called: Whether the optimizer is called; a GradScaler that found an overflow does not call it.
        holds_scale: Whether the GradScaler is to learn nothing of the step: no loss scale would cure it. Of a deferred step: if
            that turns out so.
    """

    action: Action
    outcome: StepOutcome | None = None
    is_called: bool = True
    holds_scale: bool = False


CLIP = Resolution(Action.CLIP)
"""A healthy step."""


class Unguarded:
    """Takes every step, whatever its gradients are; but a GradScaler that has left unscaling to us takes no bad one."""

    drops_micro_batches = False
    """Whether bad micro-batches are dropped from their window."""
    deferral: bool | None = None
    """Whether steps are to be decided on the device; None: where it pays."""
    judges_losses = False
    """Whether a loss that is not finite makes a step bad, whatever its gradients are."""
    is_stale = False
    """Whether the run has gone back in this batch, so that gradients of the batch mean nothing."""

    def attach(
        self,
        module: LightningModule,
        contexts: Sequence[OptimizerContext],
        limits: Sequence[HasLimitStates],
    ) -> None:
        """Meet the optimizers, before the first step or after one of them took on other parameters.

        Args:
            module: The module in training.
            contexts: Its optimizers.
            limits: Whatever else has limits, whose states go back in a rollback.

        Raises:
            ValueError: If weights are to be written that are sharded.
        """

    def mismatch(self) -> StateMismatch:
        """What of a checkpoint did not fit, once met the optimizers."""
        return StateMismatch()

    def start_fit(self) -> None:
        """Find where bad steps are written down."""

    def keep_batch(self, batch: Any, batch_idx: int) -> KeptBatch | None:
        """What is kept of a batch until its step: a reference, if it may have to be run again."""
        return None

    def begin_batch(self, *, in_window: bool) -> None:
        """A batch comes; its forward pass has not begun.

        Args:
            in_window: Whether there was a backward pass since the last step of any optimizer.
        """

    def end_pass(self, reached: Collection[int], begun: Collection[int]) -> None:
        """A backward pass is over; with several optimizers only.

        Args:
            reached: The numbers of the optimizers whose gradients it has changed.
            begun: Those of them whose window it has begun.
        """

    def begin_step(self, step: StepContext) -> None:
        """A step comes; nothing of it has had an effect."""

    def ceiling(self, step: StepContext) -> Limit | None:
        """The norm above which a finite step is skipped, as a limit."""
        return None

    def limit_states(self, index: int) -> ClipState:
        """The state of that limit for an optimizer."""
        return ()

    def save_limit_states(self, index: int, states: ClipState) -> None:
        """Keep it for the next step."""

    def resolve(self, step: StepContext, measured: MeasuredStep) -> Resolution:
        """Decide on a measured step, before anything is touched.

        Raises:
            NonFiniteGradientError: If the policy says so, or this is one bad step too many in a row.
        """
        if step.loss_scale is None:
            return CLIP
        if step.mode is StepMode.ON_DEVICE:
            return Resolution(Action.ON_DEVICE)
        return CLIP if measured.norms.is_finite else Resolution(Action.SKIP, StepOutcome.OVERFLOWED, is_called=False)

    def discard(self, step: StepContext) -> None:
        """Count a window of which nothing is left.

        Raises:
            NonFiniteGradientError: If this is one bad step too many in a row.
        """
        rank_zero_warn(f"{step.why_discarded} at {step}: the step is skipped.", stacklevel=2)

    def end_step(self, step: StepContext, report: StepRecord, *, is_called: bool) -> None:
        """Undo a skipped step, and more if bad ones do not end.

        Args:
            step: The step.
            report: What came of it.
            is_called: Whether the optimizer is called.
        """

    def end_deferred_step(self, step: StepContext, report: StepRecord) -> None:
        """Undo a step if it is skipped, which the host does not know."""

    def abandon(self, step: StepContext, *, is_called: bool) -> None:
        """Undo a step that is none, since every ``training_step`` of its window returned None.

        Args:
            step: The step.
            is_called: Whether the optimizer is called all the same.
        """

    def collect(self, step: StepContext, report: StepRecord) -> None:
        """Learn what came of a deferred step.

        Raises:
            NonFiniteGradientError: If this is one bad step too many in a row.
        """

    def drop_micro_batch(self, step: StepContext) -> None:
        """Tell of a micro-batch about to be dropped: that of the step's window."""

    def count_dropped_micro_batch(self) -> None:
        """Count a micro-batch that was dropped."""

    def undo_pass(self, *, is_bad: bool) -> None:
        """A batch is over in which nothing led to a step: undo what its forward pass has made bad.

        Args:
            is_bad: Whether its loss is not finite.
        """

    def end_batch(self) -> None:
        """The batch is over."""

    def end_epoch(self, losses: Sequence[Tensor]) -> None:
        """The epoch is over.

        Args:
            losses: Those of a window that nobody will step for, if the epoch was left in the middle of one.
        """

    def needs_host(self, context: OptimizerContext) -> bool:
        """Whether the host must decide on the next step of an optimizer, for a reason that has come up in the fit."""
        return False

    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        """Why the host must decide on steps of an optimizer, if it must."""
        return None

    def step_metrics(self, context: OptimizerContext, report: StepRecord) -> dict[str, float]:
        """What a logged step tells of the guard."""
        return {}

    def count_metrics(self, context: OptimizerContext) -> dict[str, float]:
        """What is counted over the run, by the names of metrics."""
        return {}

    def metric_names(self) -> list[str]:
        """The metrics of a logged step."""
        return []

    def skipped_steps_of(self, index: int) -> int | None:
        """How many steps of an optimizer were skipped so far; None if nobody counts."""
        return None

    def summary(self, contexts: Sequence[OptimizerContext]) -> list[str]:
        """Lines for the end of a fit."""
        return []

    def detach(self) -> None:
        """Let go of the module and its optimizers."""
