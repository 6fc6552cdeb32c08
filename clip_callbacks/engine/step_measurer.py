"""Measurement of a step's gradients, with the limits of all parts and the loss of the step's window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from clip_callbacks.accumulation.windows import Windows
from clip_callbacks.core.reduction import mean_over_ranks
from clip_callbacks.core.rules import NO_SPIKE_LIMITS, ClipState, Plan
from clip_callbacks.core.step import MeasuredStep, measure_step
from clip_callbacks.engine.components import Components
from clip_callbacks.publishing.publisher import Publisher
from clip_callbacks.trainer.bypassing_steps import BypassingSteps
from clip_callbacks.trainer.grad_scaler import grad_scaler, loss_scale
from clip_callbacks.trainer.step_context import StepContext, StepMode

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class StepMeasurer:
    """Measures the gradients of each step of one fit, by one read for all limits.

    Args:
        trainer: The Trainer.
        components: The parts that take part in the fit.
        windows: The micro-batches that wait for a step.
        publisher: The publisher, which knows the logging steps.
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
        # monitors that read gradients before they are clipped: asked once, not at each step
        self._readers = [monitor for monitor in components.monitors if monitor.reads_before_write]
        self._windows = windows
        self._publisher = publisher
        self._bypassing_steps = bypassing_steps
        self._scaler = grad_scaler(trainer)
        self._is_manual = not trainer.lightning_module.automatic_optimization
        self._are_ranks = trainer.world_size > 1
        self._checks_losses = components.guard.checks_losses
        self._warned: set[str] = set()

    def measure(self, step: StepContext) -> tuple[MeasuredStep, ClipState]:
        """Measure the gradients; return the measurement, and the states of all limits that apply."""
        context, index = step.optimizer, step.optimizer.index
        if len(context.table) and not context.table.has_gradients and not self._bypassing_steps.is_bypassed(context):
            self._warn_once("No parameter has a gradient at the optimizer step: total_norm is 0. Was backward called?")
        if self._readers and step.is_new and self._publisher.is_logging_step:
            # monitors show the gradients before they are clipped
            for monitor in self._readers:
                monitor.before_write(step)
        # the guard's thresholds are further limits of the plan, so that one measurement serves all; their states come last
        spikes = self._guard.spike_limits(step)
        plan = Plan.of(context.table, self._clipper.rules_of(index), self._clipper.shadows_of(index), spikes)
        states, loss = self._clipper.limit_states(index), None
        if spikes != NO_SPIKE_LIMITS:
            states = (*states, *self._guard.limit_states(index))
            if spikes.loss_above is not None:
                loss = self._loss(step)
        losses = None
        # Ranks with copies of the parameters must decide alike, and their losses differ: those are propagated into the gradients
        # (`LossNanPropagator`). The reduction of sharded norms takes the losses along.
        if self._checks_losses and (not self._are_ranks or context.table.reduction):
            losses = step.losses
        measured = measure_step(
            context.table,
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
