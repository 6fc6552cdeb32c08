"""The two halves of an optimizer step's clipping: measure, and apply an action. Between them the caller chooses the action."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.core.actions import Action, StepOutcome
from clip_callbacks.core.apply import drop_gradients, write, write_deferred, zero_nonfinite_
from clip_callbacks.core.decisions import Outcome, decide, describe, shadow
from clip_callbacks.core.fused import accepts_factors, clear_fused_factors
from clip_callbacks.core.gradients import Gradients, gradients_of
from clip_callbacks.core.measurement import FALSE, TRUE, Measurement, measure
from clip_callbacks.core.nonfinite import Policy
from clip_callbacks.core.rules import ClipState, Plan
from clip_callbacks.core.spikes import NO_THRESHOLDS, Thresholds, evaluate
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.core.tensor_table import TensorTable

ACTIONS: dict[Policy, Action] = {"skip": Action.SKIP, "zero": Action.ZERO, "ignore": Action.CLIP}
"""The action of each policy on gradients that are not finite. "raise" has none."""


@dataclass(eq=False)
class MeasuredStep:
    """The norms of one step, and all that :func:`apply_step` needs to act on them.

    Args:
        plan: The stages of clipping.
        gradients: The gradients, not changed yet.
        norms: The measured norms.
        scale: The factor for all gradients that turns a window's sum into its mean.
        loss_scale: The factor that the loss was multiplied by; None is 1.
        thresholds: The limits above which the step is a spike.
        threshold_states: The states of these limits after the step.
    """

    plan: Plan
    gradients: Gradients
    norms: Measurement
    scale: float
    loss_scale: Tensor | None
    thresholds: Thresholds = NO_THRESHOLDS
    threshold_states: ClipState = ()

    @property
    def table(self) -> TensorTable:
        """The parameters."""
        return self.gradients.table

    @property
    def is_spike(self) -> bool:
        """Whether a finite step is a spike. This must not be read of a deferred step."""
        return self.thresholds is not NO_THRESHOLDS and bool(self.thresholds.is_exceeded)


def measure_step(
    table: TensorTable,
    plan: Plan,
    state: ClipState,
    norm_type: float = 2.0,
    *,
    scale: float = 1.0,
    loss_scale: Tensor | None = None,
    deferred: bool = False,
    losses: Sequence[Tensor] | None = None,
    loss: Tensor | None = None,
) -> MeasuredStep:
    """Measure the gradients of one step, and change nothing: the first half of :func:`clip_step`.

    Call it under ``torch.no_grad()``, as :func:`apply_step`.

    Args:
        table: The parameters.
        plan: The stages of clipping.
        state: The state that :func:`apply_step` returned for the step before; ``plan.init()`` before the first.
        norm_type: The order p of all norms.
        scale: A factor for all gradients, applied before all else.
        loss_scale: The factor that the loss was multiplied by, a tensor of one entry; None is 1.
        deferred: If True, nothing is read on the host.
        losses: The losses of the step. A non-finite one makes the step bad, whatever its gradients are. None, on all ranks alike,
            if losses are not checked.
        loss: The loss of the window, as for :func:`~clip_callbacks.core.measurement.measure`; needed if the plan limits it.

    Raises:
        ValueError: If the step is deferred although it has more than one factor.
    """
    gradients = gradients_of(table)
    # without gradients there is nothing on a device to wait for: the host decides
    deferred = deferred and gradients.exist
    # A fused kernel takes one `grad_scale` for all gradients, and a product with several factors reads them on the host (`apply`).
    if deferred and plan.spec.local:
        raise ValueError(ONE_FACTOR)
    norms = measure(
        gradients, norm_type, scale=scale, loss_scale=loss_scale, spec=plan.spec, deferred=deferred, losses=losses, loss=loss
    )
    if plan.skip_above is None and plan.loss_above is None:
        return MeasuredStep(plan, gradients, norms, scale, loss_scale)
    *_, held = plan.parts(state)
    # Evaluated before the action is chosen, which depends on it (`is_spike`). The new states wait for `apply_step`.
    return MeasuredStep(plan, gradients, norms, scale, loss_scale, *evaluate(plan, norms, held))


def apply_step(
    step: MeasuredStep, state: ClipState, action: Action, *, clip_value: float | None = None, fused: Optimizer | None = None
) -> tuple[StepRecord, ClipState]:
    """Carry out an action on the gradients of a measured step: the second half of :func:`clip_step`.

    Args:
        step: The measured step.
        state: The state that it was measured with.
        action: The action.
        clip_value: Bound for every entry, applied after norm clipping.
        fused: The optimizer that steps next, as for :func:`clip_step`.

    Returns:
        The record, and the state for the next step.

    Raises:
        ValueError: If the device cannot decide about a deferred step.
    """
    clear_fused_factors(fused)  # an earlier step may have set some and never been taken
    norms = step.norms
    if norms.is_deferred:
        return _apply_on_device(step, state, action, clip_value, fused)
    # of the gradients as they came: after zeroing, a second measurement finds them finite
    finite, outcome = norms.finite, StepOutcome.TAKEN
    if not norms.is_finite:
        if action is Action.SKIP:
            # the state of before: nothing learns from a non-finite step, not even the thresholds
            return _skip(step), state
        outcome = StepOutcome.IGNORED
    if action is Action.ZERO:
        step, outcome = _without_nonfinite(step, state), StepOutcome.ZEROED
        norms = step.norms
        if step.is_spike:  # nobody could choose the action with the finite entries alone in view
            action = Action.SKIP
    plan = step.plan
    rule_state, shadow_state, _ = plan.parts(state)
    if action is Action.SKIP:
        # only the thresholds learn from a spike: else a lasting higher level would be skipped forever
        return replace(_skip(step), finite=finite), (*rule_state, *shadow_state, *step.threshold_states)

    shadows: tuple[Outcome, ...] = ()
    if shadow_state:
        shadows, shadow_state = shadow(plan.shadows, norms, shadow_state)
    outcomes, factors, rule_state = decide(plan.rules, norms, rule_state)
    write(step.gradients, factors, float(norms.scale), fused, clip_value, by_unit=plan.by_unit)
    if outcome is StepOutcome.TAKEN:  # limits never learn from a bad step, not even from one whose bad entries were zeroed
        state = (*rule_state, *shadow_state, *step.threshold_states)
    return _record(step, outcomes, factors, finite, FALSE, shadows, outcome), state


def _apply_on_device(
    step: MeasuredStep, state: ClipState, action: Action, clip_value: float | None, fused: Optimizer | None
) -> tuple[StepRecord, ClipState]:
    """Leave the decision to the device: a fused optimizer applies the factor, and skips the step if gradients are not finite."""
    if clip_value is not None:
        raise ValueError(ONE_FACTOR)
    gradients, norms = step.gradients, step.norms
    usable = None
    if accepts_factors(fused, gradients):
        usable = fused
    skipped = None
    if action is Action.ON_DEVICE:
        skipped = norms.finite.logical_not()
    if action is not Action.CLIP and step.thresholds.exist:
        spike = step.thresholds.is_exceeded
        skipped = spike if skipped is None else skipped.logical_or(spike)
        # the limits that clip must not learn from a spike that is skipped
        norms = replace(norms, counts=norms.finite.logical_and(spike.logical_not()))
    if skipped is not None and usable is None:
        raise ValueError(NOT_DEFERRABLE.format("got another one, or none"))

    rule_state, shadow_state, _ = step.plan.parts(state)
    shadows, shadow_state = shadow(step.plan.shadows, norms, shadow_state)
    outcomes, factors, rule_state = decide(step.plan.rules, norms, rule_state)
    write_deferred(gradients, factors, norms.scale, usable, skipped)
    # All states are returned: where the step must leave no trace, the device has selected the old ones (`_state_after`).
    record = _record(step, outcomes, factors, norms.finite, FALSE if skipped is None else skipped, shadows, StepOutcome.PENDING)
    return record, (*rule_state, *shadow_state, *step.threshold_states)


ONE_FACTOR = (
    '`deferred` needs rules of scope "global" for all parameters and no `clip_value`: one factor for all gradients. '
    "Set deferred=False, which costs one host sync."
)

NOT_DEFERRABLE = (
    '`deferred` needs nonfinite="skip" and a fused optimizer of torch.optim as `fused`, or "ignore" and no `skip_above`, {}: '
    "without the host only a fused optimizer can skip a step. Set deferred=False, which costs one host sync."
)


def _without_nonfinite(step: MeasuredStep, state: ClipState) -> MeasuredStep:
    """Set non-finite entries to 0, and measure again."""
    norms = step.norms
    zero_nonfinite_(step.gradients, norms.parameter_norms)
    # Without the losses: a non-finite one would mark the new norms as non-finite, and adaptive limits are shown such norms as 0.
    return measure_step(step.table, step.plan, state, norms.norm_type, scale=step.scale, loss_scale=step.loss_scale)


def _skip(step: MeasuredStep) -> StepRecord:
    """Set all gradients to None. The record has the measured norms, and no decision."""
    drop_gradients(step.table)
    norms = step.norms
    # adaptive thresholds of a non-finite step were computed from numbers of 0, and say nothing
    thresholds = step.thresholds if norms.is_finite else NO_THRESHOLDS
    return StepRecord(
        norms.total,
        norms.parameter_norms,
        outcomes=describe(step.plan.rules, norms),
        factors=None,
        norm_type=norms.norm_type,
        finite=norms.finite,
        skipped=TRUE,
        accumulation_scale=step.scale,
        thresholds=thresholds,
        outcome=StepOutcome.SKIPPED,
    )


def _record(
    step: MeasuredStep,
    outcomes: tuple[Outcome, ...],
    factors: Tensor | None,
    finite: Tensor,
    skipped: Tensor,
    shadows: tuple[Outcome, ...],
    outcome: StepOutcome,
) -> StepRecord:
    norms = step.norms
    return StepRecord(
        norms.total,
        norms.parameter_norms,
        outcomes,
        factors,
        norm_type=norms.norm_type,
        finite=finite,
        skipped=skipped,
        accumulation_scale=step.scale,
        unit_norms=norms.norms if step.plan.by_unit else None,
        shadows=shadows,
        thresholds=step.thresholds,
        outcome=outcome,
    )
