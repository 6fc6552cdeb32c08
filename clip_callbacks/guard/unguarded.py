"""A fit without a guard, and the interface of guards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from clip_callbacks.core.actions import Action, StepOutcome
from clip_callbacks.core.limit_state import StateMismatch
from clip_callbacks.core.rules import NO_SPIKE_LIMITS, ClipState, SpikeLimits
from clip_callbacks.core.step import MeasuredStep
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.guard.run_state import HasLimitStates
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import KeptBatch, StepContext, StepMode

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


@dataclass(frozen=True)
class Resolution:
    """Decision on a measured step.

    Args:
        action: Change that is made to the gradients.
        outcome: Outcome of the step, if the action alone does not say it.
        is_called: If False, the optimizer is not called: a GradScaler found an overflow.
        holds_scale: If True, the GradScaler's scale and growth counter stay as they are, because no lower scale would make the step
            finite. A deferred step applies this only if it turns out to be bad.
    """

    action: Action
    outcome: StepOutcome | None = None
    is_called: bool = True
    holds_scale: bool = False


CLIP = Resolution(Action.CLIP)
"""The decision on a healthy step."""


class Unguarded:
    """Takes every step, whatever its gradients are, except a bad one under a GradScaler that leaves unscaling to us."""

    drops_micro_batches = False
    """Whether bad micro-batches are dropped from their window."""
    deferral: bool | None = None
    """Whether steps must be decided on the device; None decides there wherever it saves a host sync."""
    checks_losses = False
    """Whether a non-finite loss makes a step bad, whatever its gradients are."""
    takes_bad_steps = True
    """Whether steps are taken, whatever their gradients are."""
    is_stale = False
    """Whether there was a rollback in this batch, so that gradients of the batch belong to other weights."""
    keeps_batches = False
    """Whether a batch is kept until its step, because it may have to be run again."""
    spike_limits: SpikeLimits = NO_SPIKE_LIMITS
    """The limits above which a finite step is a spike."""

    def attach(
        self,
        module: LightningModule,
        contexts: Sequence[OptimizerContext],
        limits: Sequence[HasLimitStates],
    ) -> None:
        """Attach to the optimizers, before the first step or after one of them took up other parameters.

        Args:
            module: The module in training.
            contexts: One context for each optimizer.
            limits: Owners of other limits, whose states a rollback restores.

        Raises:
            ValueError: If sharded weights would have to be written into bundles.
        """

    def mismatch(self) -> StateMismatch:
        """Return the parts of a checkpoint that did not fit the optimizers."""
        return StateMismatch()

    def start_fit(self) -> None:
        """Find the files that bad steps are written to."""

    def keep_batch(self, batch: Any, batch_idx: int) -> KeptBatch | None:
        """Return a reference to a batch, to be kept until its step; None if it cannot be run again. Needs ``keeps_batches``."""
        return None

    def begin_batch(self, *, in_window: bool) -> None:
        """Prepare for a batch, before its forward pass.

        Args:
            in_window: If True, a window is open: there was a backward pass since the last step of any optimizer.
        """

    def end_pass(self, reached: Collection[int], begun: Collection[int]) -> None:
        """Note the end of a backward pass; called with several optimizers only.

        Args:
            reached: Indices of the optimizers whose gradients the pass has changed.
            begun: Indices of those among them whose window the pass has begun.
        """

    def begin_step(self, step: StepContext) -> None:
        """Prepare for a step, before it has any effect."""

    def limit_states(self, index: int) -> ClipState:
        """Return the states of those limits for an optimizer."""
        return ()

    def save_limit_states(self, index: int, states: ClipState) -> None:
        """Store those states for the next step."""

    def resolve(self, step: StepContext, measured: MeasuredStep) -> Resolution:
        """Decide on a measured step, before gradients or weights are changed.

        Raises:
            NonFiniteGradientError: Under the policy "raise", or at the last of ``max_consecutive`` bad batches in a row.
        """
        if step.loss_scale is None:
            return CLIP
        if step.mode is StepMode.ON_DEVICE:
            # Lightning does not unscale for fused optimizers, so that the scaler has not looked for overflows yet.
            return Resolution(Action.ON_DEVICE)
        if not measured.norms.is_finite:
            return Resolution(Action.SKIP, StepOutcome.OVERFLOWED, is_called=False)
        return CLIP

    def discard(self, step: StepContext) -> None:
        """Count an accumulation window without usable gradients.

        Raises:
            NonFiniteGradientError: At the last of ``max_consecutive`` bad batches in a row.
        """
        rank_zero_warn(f"{step.why_discarded} at {step}: the step is skipped.", stacklevel=2)

    def end_step(self, step: StepContext, report: StepRecord, *, is_called: bool) -> None:
        """Restore what the window of a skipped step has changed, or the whole run if a rollback was requested.

        Args:
            step: The step.
            report: Report of the step.
            is_called: If False, the optimizer is not called: a GradScaler found an overflow.
        """

    def end_deferred_step(self, step: StepContext, report: StepRecord) -> None:
        """Restore what the window of a deferred step has changed if the device skips it, without waiting for the device."""

    def abandon(self, step: StepContext, *, is_called: bool) -> None:
        """End a window without a step, because every ``training_step`` in it returned None.

        Args:
            step: The step that is not taken.
            is_called: If True, the optimizer is called nevertheless, without gradients.
        """

    def collect(self, step: StepContext, report: StepRecord) -> None:
        """Count a deferred step whose report has reached the host.

        Raises:
            NonFiniteGradientError: At the last of ``max_consecutive`` bad batches in a row.
        """

    def drop_micro_batch(self, step: StepContext) -> None:
        """Report a bad micro-batch before it is dropped; it is the only one in the step's window."""

    def count_dropped_micro_batch(self) -> None:
        """Count a micro-batch that was dropped."""

    def restore_pass(self, *, is_bad: bool) -> None:
        """Restore what the forward pass of a batch without a step has made non-finite.

        Args:
            is_bad: If True, the loss is not finite either, and everything that the pass has changed is restored.
        """

    def end_batch(self) -> None:
        """Finish a batch."""

    def abandon_windows(self, losses: Sequence[Tensor]) -> None:
        """Restore what the forward passes of windows without a step have made non-finite.

        Args:
            losses: Losses in windows that the epoch has left unfinished, or whose gradients other code has set to zero; empty if
                there are none. If one is not finite, everything that the windows have changed is restored.
        """

    def needs_host(self, context: OptimizerContext) -> bool:
        """Return whether the host must decide on the optimizer's next step, for a reason that has come up during the fit."""
        return False

    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        """Return why the host must decide on steps of an optimizer; None if it need not."""
        return None

    def step_metrics(self, context: OptimizerContext, report: StepRecord) -> dict[str, Tensor | float]:
        """Return the guard's metrics of a logged step."""
        return {}

    def count_metrics(self, context: OptimizerContext) -> dict[str, float]:
        """Return the counts of the run, by the names of metrics."""
        return {}

    def metric_names(self) -> list[str]:
        """Return the names of the guard's metrics of a logged step."""
        return []

    def skipped_steps_of(self, index: int) -> int | None:
        """Return the number of steps of an optimizer that were skipped so far; None without a guard."""
        return None

    def summary(self, contexts: Sequence[OptimizerContext]) -> list[str]:
        """Return lines that sum up the fit at its end."""
        return []

    def detach(self) -> None:
        """Hold the module and its optimizers no longer."""
