"""The clipping of one optimizer step: measure, choose an action, apply it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.core.actions import Action, StepOutcome
from clip_callbacks.core.apply import clamp_, drop_gradients, write, write_deferred, zero_nonfinite_
from clip_callbacks.core.arguments import as_norm_type
from clip_callbacks.core.decisions import Outcome, SkipThreshold, decide, describe, shadow, skip_threshold
from clip_callbacks.core.diagnosis import examine
from clip_callbacks.core.fused import accepts_factors, clear_fused_factors
from clip_callbacks.core.gradients import Gradients, gradients_of
from clip_callbacks.core.limits import LimitState, MaxNorm
from clip_callbacks.core.measurement import FALSE, TRUE, Measurement, measure
from clip_callbacks.core.nonfinite import NonFiniteGradientError, Policy, as_policy
from clip_callbacks.core.parameter_table import Parameters, ParameterTable, table_of
from clip_callbacks.core.rules import ClipRule, ClipState, Plan
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.core.step_report import StepReport
from clip_callbacks.core.tensor_table import TensorTable


def clip_step(
    parameters: ParameterTable | Parameters,
    state: ClipState | None = None,
    *,
    max_norm: MaxNorm = 1.0,
    rules: Sequence[ClipRule] | None = None,
    norm_type: float = 2.0,
    clip_value: float | None = None,
    nonfinite: Policy = "skip",
    skip_above: MaxNorm = None,
    shadow: Sequence[ClipRule] = (),
    scale: float = 1.0,
    fused: Optimizer | None = None,
    deferred: bool = False,
) -> tuple[StepReport, ClipState]:
    r"""Clip the gradients of one optimizer step in a plain loop or in Fabric.

    Call it between ``backward()`` and ``optimizer.step()``. It does what the callbacks do in a Trainer: it measures the gradients
    by one read, skips a step whose gradients are not finite, and clips by at most one write:

    .. math::
        g \leftarrow g \cdot \min\Bigl(1, \frac{\text{max\_norm}}{\lVert g \rVert_p + 10^{-6}}\Bigr)

    Args:
        parameters: A :class:`ParameterTable`, which saves time if it is made once; or whatever one can be made of: an optimizer,
            ``model.named_parameters()``, a mapping, tensors. Norms are added up in this order, which may change the last bit of
            the total norm.
        state: The state that the last call returned; None before the first.
        max_norm: The limit for the norm of all gradients: a number above 0, a :class:`Limit`, or None to measure without clipping.
        rules: Stages of clipping in order, in place of ``max_norm``, for other scopes or for several limits.
        norm_type: The order p of all norms, above 0; inf is the maximum norm.
        clip_value: Bound for every entry, applied after norm clipping: entries are clamped to ``[-clip_value, clip_value]``. This
            takes a second write.
        nonfinite: The policy for gradients that are not finite. "skip": set all gradients to None, so that ``optimizer.step()``
            changes nothing; "raise": raise an error; "zero": set non-finite entries to 0 (where ranks hold copies of a tensor, the
            whole tensor), then clip; "ignore": leave them, and clip nothing by a non-finite norm.
        skip_above: A number or :class:`Limit`. A finite step whose total norm before clipping is above it is skipped too.
        shadow: Rules to try on the same norms without touching gradients. The report says what each would have done alone.
        scale: A factor for all gradients, applied before all else: 1 / micro-batches turns a sum of gradients into their mean.
            Norms are those of the scaled gradients.
        fused: The optimizer that steps next, if it is a fused one of ``torch.optim``. Its kernel then applies the coefficient
            through ``optimizer.grad_scale``, without a write of its own, where one coefficient for all gradients is enough and the
            optimizer holds no other parameters. Results are equal but for rounding.
        deferred: If True, the host reads nothing, and the device decides about the step: there is no host sync. Needs one
            coefficient for all gradients (rules of scope "global" for all parameters, no ``clip_value``), and either "skip" with a
            ``fused`` optimizer, whose kernel then skips the step, or "ignore". The outcome is "pending". A finite gradient whose
            norm overflows its dtype counts as not finite.

    Returns:
        The report, and the state to pass to the next call and to save with a checkpoint. It is a tuple of dictionaries of tensors:
        one for each rule, then for each shadow rule, then for ``skip_above`` if given. The state passed in is not changed.

    Raises:
        NonFiniteGradientError: If a gradient is not finite and the policy is "raise"; it names the parameters.
        TypeError: If ``state`` is not a state, or ``parameters`` holds anything but tensors.
        ValueError: If an argument is out of its range, both ``max_norm`` and ``rules`` are given, the state is that of other
            rules, or the step cannot be deferred.

    Example::

        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> report, state = clip_step([weight], max_norm=1.0)
        >>> report.total_norm, weight.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    with torch.no_grad():  # a decorator costs three more calls
        table = table_of(parameters)
        plan = Plan.of(table, _rules(max_norm, rules), shadow, skip_above)
        state = plan.init() if state is None else state
        measured = measure_step(table, plan, state, as_norm_type(norm_type), scale=scale, deferred=deferred)
        record, state = apply_step(measured, state, _resolve(measured, nonfinite), clip_value=clip_value, fused=fused)
    return StepReport(record), state


def _rules(max_norm: MaxNorm, rules: Sequence[ClipRule] | None) -> Sequence[ClipRule]:
    if rules is None:
        try:
            return _rule_for_all(max_norm)
        except TypeError:  # a user's limit without a hash
            return (ClipRule(max_norm),)
    if max_norm != 1.0:
        raise ValueError(
            f"`rules` must not be given beside `max_norm`, got rules and max_norm={max_norm!r}. Each rule has its own max_norm."
        )
    return rules


@lru_cache(maxsize=64, typed=True)  # True is equal to 1.0, and no limit
def _rule_for_all(max_norm: MaxNorm) -> tuple[ClipRule]:
    """The rule of a plain ``max_norm``: the same object at every step, by which a table finds the plan that it made before."""
    return (ClipRule(max_norm),)


def _resolve(step: MeasuredStep, nonfinite: Policy) -> Action:
    """Choose the action on a measured step under a policy.

    Raises:
        NonFiniteGradientError: If gradients are not finite and the policy is "raise".
        ValueError: If there is no such policy, or it needs the host to read a deferred step.
    """
    if step.norms.is_deferred:
        if nonfinite == "ignore":
            return Action.CLIP
        if nonfinite != "skip":
            raise ValueError(_NOT_DEFERRABLE.format(f"got {nonfinite!r}"))
        return Action.ON_DEVICE
    if step.norms.is_finite:
        return Action.CLIP
    policy = as_policy(nonfinite, "nonfinite")
    if policy == "raise":
        raise NonFiniteGradientError(examine(step.table).describe())
    return ACTIONS[policy]


ACTIONS: dict[Policy, Action] = {"skip": Action.SKIP, "zero": Action.ZERO, "ignore": Action.CLIP}
"""The action of each policy on gradients that are not finite. "raise" has none."""


@dataclass(frozen=True, eq=False)
class MeasuredStep:
    """The norms of one step, and all that :func:`apply_step` needs to act on them.

    Args:
        plan: The stages of clipping.
        gradients: The gradients, not changed yet.
        norms: The measured norms.
        scale: The factor for all gradients that turns a window's sum into its mean.
        loss_scale: The factor that the loss was multiplied by; None is 1.
        threshold: The skip threshold, if there is one.
        threshold_state: The state of the skip threshold's limit after the step, in a tuple; empty without one.
    """

    plan: Plan
    gradients: Gradients
    norms: Measurement
    scale: float
    loss_scale: Tensor | None
    threshold: SkipThreshold | None
    threshold_state: tuple[LimitState, ...]

    @property
    def table(self) -> TensorTable:
        """The parameters."""
        return self.gradients.table

    @property
    def is_spike(self) -> bool:
        """Whether the norm of a finite step is above the skip threshold. This must not be read of a deferred step."""
        return self.threshold is not None and bool(self.threshold.is_exceeded)


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
    """
    gradients = gradients_of(table)
    deferred = deferred and gradients.exist
    norms = measure(gradients, norm_type, scale=scale, loss_scale=loss_scale, spec=plan.spec, deferred=deferred, losses=losses)
    if plan.skip_above is None:
        return MeasuredStep(plan, gradients, norms, scale, loss_scale, None, ())
    *_, held = plan.parts(state)
    threshold, after = skip_threshold(plan.skip_above, norms, held[0])
    if deferred:  # the limits that clip must not learn from a spike, which only the device can tell
        norms = replace(norms, counts=norms.finite.logical_and(threshold.is_exceeded.logical_not()))
    return MeasuredStep(plan, gradients, norms, scale, loss_scale, threshold, (after,))


def apply_step(
    step: MeasuredStep, state: ClipState, action: Action, *, clip_value: float | None = None, fused: Optimizer | None = None
) -> tuple[StepRecord, ClipState]:
    """Carry out an action on the gradients of a measured step: the second half of :func:`clip_step`.

    A finite step whose norm is above the skip threshold is skipped, whatever the action is.

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
    if step.norms.is_deferred:
        return _apply_on_device(step, state, action, clip_value, fused)
    finite, outcome = step.norms.finite, StepOutcome.TAKEN
    if not step.norms.is_finite:
        if action is Action.SKIP:
            return _skip(step), state
        outcome = StepOutcome.IGNORED
    if action is Action.ZERO:
        step, outcome = _without_nonfinite(step, state), StepOutcome.ZEROED
    rule_state, shadow_state, _ = step.plan.parts(state)
    if action is Action.SKIP or step.is_spike:
        # only the skip threshold learns from a spike: else a lasting higher level of the norm would be skipped forever
        return replace(_skip(step), finite=finite), (*rule_state, *shadow_state, *step.threshold_state)

    gradients, norms = step.gradients, step.norms
    shadows: tuple[Outcome, ...] = ()
    if shadow_state:
        shadows, shadow_state = shadow(step.plan.shadows, norms, shadow_state)
    outcomes, factors, rule_state = decide(step.plan.rules, norms, rule_state)
    write(gradients, factors, float(norms.scale), _usable(fused, gradients, clip_value), by_unit=step.plan.by_unit)
    if clip_value is not None:
        clamp_(gradients.tensors, clip_value)
    if outcome is StepOutcome.TAKEN:  # limits never learn from a bad step, not even from one whose bad entries were zeroed
        state = (*rule_state, *shadow_state, *step.threshold_state)
    return _record(step, outcomes, factors, finite, FALSE, shadows, outcome), state


def _apply_on_device(
    step: MeasuredStep, state: ClipState, action: Action, clip_value: float | None, fused: Optimizer | None
) -> tuple[StepRecord, ClipState]:
    """Leave the decision to the device: a fused optimizer applies the factor, and skips the step if it is told to."""
    gradients, norms = step.gradients, step.norms
    usable = _usable(fused, gradients, clip_value)
    if step.plan.spec.local or clip_value is not None:
        raise ValueError(
            '`deferred` needs rules of scope "global" for all parameters and no `clip_value`: one factor for all gradients. '
            "Set deferred=False, which costs one host sync."
        )
    skipped = step.threshold.is_exceeded if step.threshold else None
    if action is Action.ON_DEVICE:
        skipped = (norms.finite if norms.counts is None else norms.counts).logical_not()
    if skipped is not None and usable is None:
        raise ValueError(_NOT_DEFERRABLE.format("got another one, or none"))

    rule_state, shadow_state, _ = step.plan.parts(state)
    shadows, shadow_state = shadow(step.plan.shadows, norms, shadow_state)
    outcomes, factors, rule_state = decide(step.plan.rules, norms, rule_state)
    write_deferred(gradients, factors, norms.scale, usable, skipped)
    record = _record(step, outcomes, factors, norms.finite, FALSE if skipped is None else skipped, shadows, StepOutcome.PENDING)
    return record, (*rule_state, *shadow_state, *step.threshold_state)


_NOT_DEFERRABLE = (
    '`deferred` needs nonfinite="skip" and a fused optimizer of torch.optim as `fused`, or "ignore" and no `skip_above`, {}: '
    "without the host only a fused optimizer can skip a step. Set deferred=False, which costs one host sync."
)


def _usable(fused: Optimizer | None, gradients: Gradients, clip_value: float | None) -> Optimizer | None:
    """Return the fused optimizer if its kernel can multiply these gradients, else None."""
    if clip_value is not None or not accepts_factors(fused, gradients):  # entries are clamped after the product
        return None
    return fused


def _without_nonfinite(step: MeasuredStep, state: ClipState) -> MeasuredStep:
    """Set non-finite entries to 0, and measure again."""
    norms = step.norms
    zero_nonfinite_(step.gradients, norms.parameter_norms)
    return measure_step(step.table, step.plan, state, norms.norm_type, scale=step.scale, loss_scale=step.loss_scale)


def _skip(step: MeasuredStep) -> StepRecord:
    """Set all gradients to None. The record has the measured norms, and no decision."""
    drop_gradients(step.table)
    norms = step.norms
    limit = step.threshold.limit if step.threshold and norms.is_finite else None
    return StepRecord(
        norms.total,
        norms.parameter_norms,
        describe(step.plan.rules, norms),
        None,
        norms.norm_type,
        norms.finite,
        TRUE,
        step.scale,
        skip_limit=limit,
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
    norms, threshold = step.norms, step.threshold
    return StepRecord(
        norms.total,
        norms.parameter_norms,
        outcomes,
        factors,
        norms.norm_type,
        finite,
        skipped,
        step.scale,
        norms.norms if step.plan.by_unit else None,
        shadows,
        threshold.limit if threshold else None,
        outcome,
    )
