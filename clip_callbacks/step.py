"""One step's clipping, whole: measure, guard, decide, write, report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.apply import clamp_, drop, write, write_deferred, zero_nonfinite_
from clip_callbacks.findings import examine
from clip_callbacks.fused import can_carry, clear
from clip_callbacks.nonfinite import NonFiniteGradientError, Policy, as_policy
from clip_callbacks.norms import FALSE, TRUE, as_norm_type, measure
from clip_callbacks.parameters import ParameterTable
from clip_callbacks.report import StepReport
from clip_callbacks.rules import ClipRule, ClipState, decide, describe

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
        scale: A factor for all gradients before all else, such as 1 / micro-batches; norms are of the scaled gradients.
        loss_scale: What the loss was multiplied by against underflow, a tensor of one entry; gradients are divided by it.
        fused: The optimizer that steps next with these gradients. Where it is a fused one of ``torch.optim``, holds no other
            parameters, and all gradients get one factor, they are not written here: its kernel divides them by
            ``optimizer.grad_scale``, which is taken back after the step. The result is the same but for rounding.
        deferred: Whether to decide where the gradients are, with no host sync: the host reads nothing. Needs rules of scope
            "global" for all parameters and no ``clip_value``; and "skip", which then rides on ``optimizer.found_inf``, a
            ``fused`` optimizer, or "ignore". A finite gradient whose norm overflows its dtype counts as not finite.

    Returns:
        The report, and the state to pass to the next call. The state passed in is not changed.

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
    stages = [rule.stage(table) for rule in rules]
    state = tuple(stage.init() for stage in stages) if state is None else state
    if len(state) != len(stages):
        raise ValueError(
            f"`state` must hold one entry for each of {len(stages)} rules, got {len(state)}: pass what the last call returned."
        )

    clear(fused)
    gradients = table.gradients()
    deferred = deferred and gradients.exist
    carrier = fused if clip_value is None and can_carry(fused, gradients) else None
    local = not all(stage.partition.is_whole for stage in stages)
    if deferred:
        _check_deferrable(nonfinite, has_carrier=carrier is not None, local=local, clip_value=clip_value)
    measured = measure(gradients, norm_type, scale=scale, loss_scale=loss_scale, local=local, deferred=deferred)
    finite, skipped = measured.finite, FALSE
    if deferred:
        skipped = FALSE if nonfinite == "ignore" else finite.logical_not()
    elif not measured.is_finite:
        policy = as_policy(nonfinite, "nonfinite") if isinstance(nonfinite, str) else nonfinite(table)
        if policy == "raise":
            raise NonFiniteGradientError(examine(table).describe())
        if policy == "skip":
            drop(table)
            outcomes = describe(stages, measured, norm_type)
            return StepReport(measured.total, measured.norms, outcomes, None, norm_type, finite, TRUE, scale), state
        if policy == "zero":
            zero_nonfinite_(gradients, measured.norms)
            measured = measure(gradients, norm_type, scale=scale, loss_scale=loss_scale, local=local)

    outcomes, factors, state = decide(stages, measured, norm_type, state)
    if deferred:
        write_deferred(gradients, factors, measured.scale, carrier, skipped)
    else:
        write(gradients, factors, float(measured.scale), carrier)
    if clip_value is not None:
        clamp_(gradients.tensors, clip_value)
    return StepReport(measured.total, measured.norms, outcomes, factors, norm_type, finite, skipped, scale), state


def _check_deferrable(nonfinite: Policy | Judge, *, has_carrier: bool, local: bool, clip_value: float | None) -> None:
    if local or clip_value is not None:
        raise ValueError(
            '`deferred` needs rules of scope "global" for all parameters and no `clip_value`: one factor for all gradients. '
            "Set deferred=False, which costs one host sync."
        )
    if nonfinite != "ignore" and not (nonfinite == "skip" and has_carrier):
        raise ValueError(
            f'`deferred` needs nonfinite="skip" and a fused optimizer of torch.optim as `fused`, or "ignore", got {nonfinite!r}: '
            "without the host only a fused optimizer can stand still. Set deferred=False, which costs one host sync."
        )
