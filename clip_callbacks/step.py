"""One step's clipping, whole: measure, guard, decide, write, report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.apply import clamp_, drop, scale_, zero_nonfinite_
from clip_callbacks.nonfinite import NonFiniteGradientError, Policy, as_policy, examine
from clip_callbacks.norms import Measurement, as_norm_type, measure
from clip_callbacks.parameters import ParameterTable
from clip_callbacks.report import FALSE, TRUE, StepReport
from clip_callbacks.rules import ClipRule, ClipState, Outcome, decide, describe

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
            changes nothing; "raise"; "zero": non-finite entries become 0; "ignore": they stay. Or a function that is
            asked on bad steps. A non-finite norm never scales a gradient.
        scale: A factor for all gradients before all else, such as 1 / micro-batches; norms are of the scaled gradients.

    Returns:
        The report, and the state to pass to the next call. The state passed in is not changed.

    Raises:
        NonFiniteGradientError: If a gradient is not finite and the policy is "raise"; it names the parameters.
        ValueError: If an argument is out of its range, or the state is that of other rules.

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

    gradients = table.gradients()
    local = not all(stage.partition.is_whole for stage in stages)
    measured = measure(gradients, norm_type, scale=scale, local=local)
    finite = measured.is_finite
    if not finite:
        policy = as_policy(nonfinite, "nonfinite") if isinstance(nonfinite, str) else nonfinite(table)
        if policy == "raise":
            raise NonFiniteGradientError(examine(table).describe())
        if policy == "skip":
            drop(table)
            return _report(describe(stages, measured, norm_type), None, measured, norm_type, finite=False, skipped=True), state
        if policy == "zero":
            zero_nonfinite_(gradients.tensors)
            measured = measure(gradients, norm_type, scale=scale, local=local)

    outcomes, factors, state = decide(stages, measured, norm_type, state)
    scale_(gradients, factors, scale)
    if clip_value is not None:
        clamp_(gradients.tensors, clip_value)
    return _report(outcomes, factors, measured, norm_type, finite=finite, skipped=False), state


def _report(
    outcomes: tuple[Outcome, ...], factors: Tensor | None, measured: Measurement, norm_type: float, *, finite: bool, skipped: bool
) -> StepReport:
    return StepReport(
        measured.total,
        measured.norms,
        outcomes,
        factors,
        norm_type,
        finite=TRUE if finite else FALSE,
        skipped=TRUE if skipped else FALSE,
    )
