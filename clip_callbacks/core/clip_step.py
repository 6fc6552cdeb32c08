"""The public function for plain loops and Fabric."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.optim import Optimizer

from clip_callbacks.core.actions import Action
from clip_callbacks.core.arguments import as_finite, as_max_norm, as_norm_type
from clip_callbacks.core.diagnosis import examine
from clip_callbacks.core.fused import accepts_factors, starts_momentum
from clip_callbacks.core.gradients import gradients_of
from clip_callbacks.core.limits import Limit, MaxNorm, as_limit
from clip_callbacks.core.nonfinite import POLICIES, NonFiniteGradientError, Policy, as_policy
from clip_callbacks.core.parameter_table import Parameters, ParameterTable, table_of
from clip_callbacks.core.rules import NO_SPIKE_LIMITS, ClipRule, ClipState, Plan, SpikeLimits, check_rules, check_shadow
from clip_callbacks.core.step import ACTIONS, NOT_DEFERRABLE, MeasuredStep, apply_step, measure_step
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
    shadow: Sequence[float | Limit | ClipRule] = (),
    scale: float = 1.0,
    fused: Optimizer | None = None,
    deferred: bool = False,
) -> tuple[StepReport, ClipState]:
    r"""Clip the gradients of one optimizer step in a plain loop or in Fabric.

    Call it between ``backward()`` and ``optimizer.step()``; with a GradScaler, after ``scaler.unscale_(optimizer)``. It does what
    the callbacks do in a Trainer: it measures the gradients by one read, skips a step whose gradients are not finite, and clips by
    at most one write:

    .. math::
        g \leftarrow g \cdot \min\Bigl(1, \frac{\text{max\_norm}}{\lVert g \rVert_p + 10^{-6}}\Bigr)

    Args:
        parameters: A :class:`ParameterTable`, which saves time if it is made once; or the parameters themselves: an optimizer,
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
        shadow: Numbers, limits or rules to try on the same norms without changing gradients; a number or a limit is tried on the
            norm of all gradients. The report says what each would have done alone.
        scale: A factor for all gradients, applied before all else: 1 / micro-batches turns a sum of gradients into their mean.
            Norms are those of the scaled gradients.
        fused: The optimizer that steps next, if it is a fused one of ``torch.optim``. Its kernel then applies the coefficient
            through ``optimizer.grad_scale``, without a write of its own, where one coefficient for all gradients is enough and the
            optimizer holds no other parameters. Results are equal but for rounding.
        deferred: If True, the host reads nothing, and the device decides about the step: there is no host sync. Needs one
            coefficient for all gradients (rules of scope "global" for all parameters, no ``clip_value``), and either "skip" with a
            ``fused`` optimizer, whose kernel then skips the step, or "ignore". The outcome is "pending". A finite gradient whose
            norm overflows its dtype counts as not finite. The host decides about a step in which SGD makes momentum buffers: if it
            were skipped on the device, they would stay uninitialized.

    Returns:
        The report, and the state to pass to the next call and to save with a checkpoint. It is a tuple of dictionaries of tensors:
        one for each rule, then for each shadow rule, then for ``skip_above`` if given. The state passed in is not changed.

    Raises:
        NonFiniteGradientError: If a gradient is not finite and the policy is "raise"; it names the parameters.
        TypeError: If ``state`` is not a state, ``parameters`` holds anything but tensors, ``rules`` anything but rules, ``shadow``
            is not a list, or ``fused`` is not an optimizer.
        ValueError: If an argument is out of its range, both ``max_norm`` and ``rules`` are given, two rules have the same name,
            the state is that of other rules, or the step cannot be deferred.

    Example::

        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> report, state = clip_step([weight], max_norm=1.0)
        >>> report.total_norm, weight.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    if clip_value is not None:
        clip_value = as_max_norm(clip_value, "clip_value", " or None")
    scale = as_finite(scale, "scale")
    if nonfinite not in POLICIES:  # on healthy steps too, which ask for no policy
        as_policy(nonfinite, "nonfinite")
    if fused is not None and not isinstance(fused, Optimizer):
        raise TypeError(f"`fused` must be the optimizer that steps next, or None, got {fused!r}.")
    if not isinstance(shadow, (list, tuple)):
        check_shadow(shadow)
    with torch.set_grad_enabled(False):  # half the calls of torch.no_grad
        table = table_of(parameters)
        shadows: Sequence[ClipRule] = ()
        if shadow:
            shadows = [_as_rule(one) for one in shadow]
        plan = Plan.of(table, _rules(max_norm, rules), shadows, NO_SPIKE_LIMITS if skip_above is None else SpikeLimits(skip_above))
        state = plan.init() if state is None else state
        # not where deferral is refused, which must not depend on the step
        if deferred and clip_value is None and _allocates_in_skip(fused, table, plan, nonfinite):
            deferred = False
        measured = measure_step(table, plan, state, as_norm_type(norm_type), scale=scale, deferred=deferred)
        record, state = apply_step(measured, state, _resolve(measured, nonfinite), clip_value=clip_value, fused=fused)
    return StepReport(record), state


def _allocates_in_skip(fused: Optimizer | None, table: TensorTable, plan: Plan, nonfinite: Policy) -> bool:
    """Return whether a skip on the device would leave uninitialized momentum: the host decides about such a first step."""
    may_skip = nonfinite == "skip" or (nonfinite == "ignore" and plan.skip_above is not None)
    if not may_skip or plan.spec.local or fused is None:
        return False
    return starts_momentum(fused) and accepts_factors(fused, gradients_of(table))


def _rules(max_norm: MaxNorm, rules: Sequence[ClipRule] | None) -> Sequence[ClipRule]:
    if rules is None:
        try:
            return _rule_for_all(max_norm)
        except TypeError:  # a user's limit without a hash
            return (ClipRule(max_norm),)
    # an explicit 1.0 cannot be told from the default, and passes
    if max_norm != 1.0:
        raise ValueError(
            f"`rules` must not be given beside `max_norm`, got rules and max_norm={max_norm!r}. Each rule has its own max_norm."
        )
    # what is in a list, a plan checks when it is made
    if not isinstance(rules, (list, tuple)):
        check_rules(rules)
    return rules


def _as_rule(shadow: float | Limit | ClipRule) -> ClipRule:
    if isinstance(shadow, ClipRule):
        return shadow
    try:
        (rule,) = _rules(shadow, None)
    except ValueError:
        as_limit(shadow, "shadow")  # raises the error of this argument
        raise
    return rule


@lru_cache(maxsize=64, typed=True)  # True is equal to 1.0, and no limit
def _rule_for_all(max_norm: MaxNorm) -> tuple[ClipRule]:
    """The rule of a plain ``max_norm``: the same object at every step, by which a table finds the plan that it made before."""
    return (ClipRule(max_norm),)


def _resolve(step: MeasuredStep, nonfinite: Policy) -> Action:
    """Choose the action on a measured step under a policy.

    Raises:
        NonFiniteGradientError: If gradients are not finite and the policy is "raise".
        ValueError: If the policy needs the host to read a deferred step.
    """
    if step.norms.is_deferred:
        # The host learns nothing of the gradients here: "raise" and "zero" need it to know that the step is bad.
        if nonfinite == "ignore":
            return Action.SKIP_SPIKE if step.thresholds.exist else Action.CLIP
        if nonfinite != "skip":
            raise ValueError(NOT_DEFERRABLE.format(f"got {nonfinite!r}"))
        return Action.ON_DEVICE
    if step.norms.is_finite:
        return Action.SKIP if step.is_spike else Action.CLIP
    if nonfinite == "raise":
        # the tensors at fault are searched only here, on the way to the error: the norms alone have shown that there are some
        raise NonFiniteGradientError(examine(step.table).describe())
    return ACTIONS[nonfinite]
