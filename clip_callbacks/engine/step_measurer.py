"""Measurement of a step's gradients, with the limits of all parts and the loss of the step's window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from clip_callbacks.accumulation.windows import Windows
from clip_callbacks.core.reduction import mean_over_ranks
from clip_callbacks.core.rules import NO_SPIKE_LIMITS, ClipState, Plan
from clip_callbacks.core.step import MeasuredStep, measure_step
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.engine.components import Components
from clip_callbacks.publishing.publisher import Publisher
from clip_callbacks.trainer.bypassing_steps import BypassingSteps
from clip_callbacks.trainer.grad_scaler import grad_scaler, loss_scale
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext, StepMode

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class StepMeasurer:
    """Measures the gradients of each step of one fit, by one read for all limits.

    Args:
        trainer: The Trainer.
        components: The parts that take part in the fit.
        windows: The micro-batches that wait for a step.
        publisher: The publisher, which knows when Lightning logs.
        bypassing_steps: The optimizers that step around Lightning.
    """

    def __init__(
        self,
        trainer: Trainer,
        components: Components,
        windows: Windows,
        publisher: Publisher,
        bypassing_steps: BypassingSteps,
    ) -> None:
        self._trainer = trainer
        self._clipper, self._guard = components.clipper, components.guard
        self._norm_type = components.norm_type
        self._plans: dict[tuple[int, bool], tuple[TensorTable, Plan, ClipState]] = {}
        # monitors that read gradients before they are clipped: asked once, not at each step
        self._readers = [monitor for monitor in components.monitors if monitor.reads_before_write]
        self._windows = windows
        self._publisher = publisher
        self._bypassing_steps = bypassing_steps
        self._scaler = grad_scaler(trainer)
        self._is_manual = not trainer.lightning_module.automatic_optimization
        self._are_ranks = trainer.world_size > 1
        self._checks_losses = components.guard.checks_losses
        self._last_batches: dict[int, int] = {}  # in which optimizers have stepped, by their numbers
        self._warned: set[str] = set()

    def measure(self, step: StepContext) -> tuple[MeasuredStep, ClipState]:
        """Measure the gradients; return the measurement, and the states of all limits that apply."""
        context, table = step.optimizer, step.optimizer.table
        # one look in a healthy step: all parameters are asked only where the first one has no gradient
        if table.tensors and table.tensors[0].grad is None and not table.has_gradients:
            self._warn_of_no_gradients(context)
        if self._readers and step.is_new:
            batches_to_next = 1
            if self._is_manual:
                batches_to_next = self._expected_batches_to_next(context.index)
            if self._publisher.batches_before_log < batches_to_next:
                # this step will be logged: monitors show the gradients before they are clipped
                for monitor in self._readers:
                    monitor.before_write(step)
        key = context.index, step.is_new
        bound = self._plans.get(key)
        # rules change only together with the table of their parameters
        if bound is None or bound[0] is not table:
            bound = self._plans[key] = self._bound(step)
        _, plan, states = bound
        if plan.remembers:
            states = self._states(context.index, plan)
        loss = losses = None
        if plan.loss_above is not None:
            loss = self._loss(step)
        # Ranks with copies of the parameters must decide alike, and their losses differ: those are propagated into the gradients
        # (`LossNanPropagator`). The reduction of sharded norms takes the losses along.
        if self._checks_losses and (not self._are_ranks or table.reduction):
            losses = step.losses
        measured = measure_step(
            table,
            plan,
            states,
            self._norm_type,
            scale=step.scale,
            loss_scale=step.loss_scale,
            deferred=step.mode is StepMode.ON_DEVICE,
            losses=losses,
            loss=loss,
        )
        return measured, states

    def _expected_batches_to_next(self, index: int) -> int:
        """Return after how many batches an optimizer is expected to step again: as many as since its last step.

        In manual optimization it may step in no batch that logs, as a GAN's generator that steps in every fifth one: then its last
        step before is logged.
        """
        batch = self._trainer.fit_loop.epoch_loop._batches_that_stepped
        since_last: int = batch - self._last_batches.get(index, batch)
        self._last_batches[index] = batch
        return max(since_last, 1)

    def _bound(self, step: StepContext) -> tuple[TensorTable, Plan, ClipState]:
        """Bind the limits to the parameters of an optimizer."""
        index, table, spikes = step.optimizer.index, step.optimizer.table, NO_SPIKE_LIMITS
        # The guard's thresholds are further limits of the plan, so that one measurement serves all. A line search may try points of
        # any norm, so that a step of LBFGS is judged at the point where it begins.
        if step.is_new:
            spikes = self._guard.spike_limits
        plan = Plan.of(table, self._clipper.rules_of(index), self._clipper.shadows_of(index), spikes)
        return table, plan, self._states(index, plan)

    def _states(self, index: int, plan: Plan) -> ClipState:
        """Return the states of the rules, of the shadows, and of the guard's thresholds if these are in the plan."""
        states = self._clipper.limit_states(index)
        if plan.skip_above is not None or plan.loss_above is not None:
            states = (*states, *self._guard.limit_states(index))
        return states

    def _warn_of_no_gradients(self, context: OptimizerContext) -> None:
        if not self._bypassing_steps.is_bypassed(context):
            self._warn_once("No parameter has a gradient at the optimizer step: total_norm is 0. Was backward called?")

    def _loss(self, step: StepContext) -> Tensor:
        """Return the loss of a step's window without the loss scale, shape ``(1,)``: over all ranks, unless the norms are reduced.

        One number is averaged over the ranks, in the collective of the norms if there is one.
        """
        loss = self._windows.loss(step.optimizer, step.scale)
        if self._is_manual and not self._windows.has_loss(step.optimizer):
            self._warn_once(
                "The loss of an optimizer step is not known, so that `loss_above` cannot judge it: no backward pass of its window "
                "went through Lightning. Call self.manual_backward(loss) instead of loss.backward()."
            )
        if self._scaler is not None:
            loss = loss / loss_scale(self._scaler).to(loss.device)
        if self._are_ranks and step.optimizer.table.reduction is None:
            loss = mean_over_ranks(loss, self._trainer.strategy.root_device)
        return loss

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            rank_zero_warn(text, stacklevel=2)
