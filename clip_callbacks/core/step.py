"""One step's clipping, whole: measure, guard, decide, write, report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.core.apply import clamp_, drop, write, write_deferred, zero_nonfinite_
from clip_callbacks.core.decisions import Ceiling, decide, describe, shadow, veto
from clip_callbacks.core.diagnosis import examine
from clip_callbacks.core.fused import can_carry, clear
from clip_callbacks.core.limits import MaxNorm
from clip_callbacks.core.nonfinite import NonFiniteGradientError, Policy, as_policy
from clip_callbacks.core.norms import FALSE, TRUE, Measurement, as_norm_type, measure
from clip_callbacks.core.parameters import ParameterTable
from clip_callbacks.core.rules import ClipRule, ClipState, Plan
from clip_callbacks.core.step_report import StepReport

Judge: TypeAlias = Callable[[ParameterTable], Policy]
"""Asked on a bad step, before anything is touched, which policy to follow."""


@torch.no_grad()
def clip_step(
    parameters: ParameterTable | Optimizer | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
    state: ClipState | None = None,
    *,
    rules: Sequence[ClipRule] = (ClipRule(1.0),),
    norm_type: float = 2.0,
    clip_value: float | None = None,
    nonfinite: Policy | Judge = "skip",
    skip_above: MaxNorm = None,
    shadows: Sequence[ClipRule] = (),
    scale: float = 1.0,
    loss_scale: Tensor | None = None,
    fused: Optimizer | None = None,
    deferred: bool = False,
) -> tuple[StepReport, ClipState]:
    """Clip the gradients of one optimizer step; for Fabric and plain loops what the callbacks are for a Trainer.

    Call it between ``backward()`` and ``optimizer.step()``. The gradients are read once. They are written once, and only if
    something is to change.

    Args:
        parameters: What the optimizer holds: the optimizer itself, ``model.named_parameters()``, bare tensors, or, best where
            it is called at every step, a :class:`ParameterTable` made once.
        state: What the last call returned; None before the first.
        rules: Stages of clipping, in order; none measures only.
        norm_type: The order p of all norms, above 0; inf is the maximum norm.
        clip_value: Afterwards every entry is clamped to ``[-clip_value, clip_value]``; a further pass.
        nonfinite: What to do if a gradient is not finite. "skip": all gradients become None, so that ``optimizer.step()``
            changes nothing; "raise"; "zero": non-finite entries become 0 (where ranks decide
            together, all entries of a tensor of which several hold copies); "ignore": they stay. Or a function that is
            asked on bad steps. A non-finite norm never scales a gradient.
        skip_above: A limit on the norm of all gradients before clipping, above which a finite step is skipped too.
        shadows: Rules that clip nothing: what each would do by itself is in the report.
        scale: A factor for all gradients before all else, such as 1 / micro-batches; norms are of the scaled gradients.
        loss_scale: What the loss was multiplied by against underflow, a tensor of one entry; gradients are divided by it.
        fused: The optimizer that steps next with these gradients. Where it is a fused one of ``torch.optim``, holds no other
            parameters, and all gradients get one factor, they are not written here: its kernel divides them by
            ``optimizer.grad_scale``, which is taken back after the step. The result is the same but for rounding.
        deferred: Whether to decide where the gradients are, with no host sync: the host reads nothing. Needs rules of scope
            "global" for all parameters and no ``clip_value``; and "skip", which then rides on ``optimizer.found_inf``, a
            ``fused`` optimizer, or "ignore". A finite gradient whose norm overflows its dtype counts as not finite.

    Returns:
        The report, and the state to pass to the next call: one entry for each rule, then for each shadow, then, if it is given,
        of ``skip_above``. The state passed in is not changed.

    Raises:
        NonFiniteGradientError: If a gradient is not finite and the policy is "raise"; it names the parameters.
        ValueError: If an argument is out of its range, the state is that of other rules, or the step cannot be deferred.

    Example::

        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> report, state = clip_step([weight], rules=[ClipRule(1.0)])
        >>> report.total_norm, weight.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    table = ParameterTable.of(parameters)
    norm_type = as_norm_type(norm_type)
    plan = Plan.of(table, rules, shadows, skip_above)
    state = plan.init() if state is None else state
    ours, shaded, vetoed = plan.parts(state)

    clear(fused)
    gradients, wanted = table.gradients(), plan.wanted
    deferred = deferred and gradients.exist
    carrier = fused if clip_value is None and can_carry(fused, gradients) else None
    if deferred:
        must_skip = nonfinite != "ignore" or plan.veto is not None
        one = not wanted.local and clip_value is None
        _check_deferrable(nonfinite, must_skip=must_skip, has_carrier=carrier is not None, one=one)
    measured = measure(gradients, norm_type, scale=scale, loss_scale=loss_scale, wanted=wanted, deferred=deferred)
    finite = measured.finite
    if not deferred and not measured.is_finite:
        policy = _policy(nonfinite, table)
        if policy == "skip":
            return _skip(table, plan, measured, norm_type, scale), state
        if policy == "zero":
            zero_nonfinite_(gradients, measured.parameter_norms)
            measured = measure(gradients, norm_type, scale=scale, loss_scale=loss_scale, wanted=wanted)
    above, vetoed = veto(plan.veto, measured, norm_type, vetoed) if plan.veto else (None, vetoed)
    if above and not deferred and bool(above.is_exceeded):
        return _skip(table, plan, measured, norm_type, scale, above.limit), (*ours, *shaded, *vetoed)

    skipped, counts = _deferred_verdict(measured, above, nonfinite) if deferred else (FALSE, None)
    shades, shaded = shadow(plan.shadows, measured, norm_type, shaded, counts=counts) if plan.shadows else ((), shaded)
    outcomes, factors, ours = decide(plan.rules, measured, norm_type, ours, counts=counts)
    if deferred:
        write_deferred(gradients, factors, measured.scale, carrier, skipped)
    else:
        write(gradients, factors, float(measured.scale), carrier, by_unit=plan.by_unit)
        if finite is FALSE:  # zeroed or ignored: no state takes it in
            ours, shaded, vetoed = plan.parts(state)
    if clip_value is not None:
        clamp_(gradients.tensors, clip_value)
    unit_norms, ceiling = measured.norms if plan.by_unit else None, above.limit if above else None
    norms = measured.total, measured.parameter_norms
    report = StepReport(*norms, outcomes, factors, norm_type, finite, skipped, scale, unit_norms, shades, ceiling)
    return report, (*ours, *shaded, *vetoed)


def _deferred_verdict(measured: Measurement, above: Ceiling | None, nonfinite: Policy | Judge) -> tuple[Tensor, Tensor]:
    """Whether a step is skipped, and whether limits take it into their states, both 0-dim bool and unread."""
    finite = measured.finite
    counts = finite.logical_and(above.is_exceeded.logical_not()) if above else finite
    if nonfinite == "ignore":
        return above.is_exceeded if above else FALSE, counts
    return counts.logical_not(), counts


def _policy(nonfinite: Policy | Judge, table: ParameterTable) -> Policy:
    policy = as_policy(nonfinite, "nonfinite") if isinstance(nonfinite, str) else nonfinite(table)
    if policy == "raise":
        raise NonFiniteGradientError(examine(table).describe())
    return policy


def _skip(
    table: ParameterTable, plan: Plan, measured: Measurement, norm_type: float, scale: float, limit: Tensor | None = None
) -> StepReport:
    """Take the gradients away; say what was measured, with nothing decided."""
    drop(table)
    outcomes, norms = describe(plan.rules, measured, norm_type), (measured.total, measured.parameter_norms)
    return StepReport(*norms, outcomes, None, norm_type, measured.finite, TRUE, scale, skip_limit=limit)


def _check_deferrable(nonfinite: Policy | Judge, *, must_skip: bool, has_carrier: bool, one: bool) -> None:
    if not one:
        raise ValueError(
            '`deferred` needs rules of scope "global" for all parameters and no `clip_value`: one factor for all gradients. '
            "Set deferred=False, which costs one host sync."
        )
    if nonfinite not in {"skip", "ignore"} or (must_skip and not has_carrier):
        raise ValueError(
            '`deferred` needs nonfinite="skip" and a fused optimizer of torch.optim as `fused`, or "ignore" and no `skip_above`, '
            f"got {nonfinite!r}: without the host only a fused optimizer can stand still. Set deferred=False: one host sync."
        )
