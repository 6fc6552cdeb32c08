r"""What rules decide on the norms of one step.

Rules run in order, all from one read: after coefficients :math:`c` the norms are :math:`c \cdot n`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clip_callbacks.core.blocks import Partition
from clip_callbacks.core.coefficients import coefficients, ones_like
from clip_callbacks.core.limits import BlockNorms, FixedLimit, LimitState
from clip_callbacks.core.norms import Measurement, block_norms
from clip_callbacks.core.rules import ClipState, Stage


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one stage found and decided.

    Args:
        partition: The B blocks.
        norms: Of the blocks as the stage met them, shape ``(B,)``.
        limits: For them, shape ``(B,)`` or one number.
        coefficients: Shape ``(B,)``, or 0-dim if there is one, in [0, 1]; exactly 1 where nothing is clipped.
        clips: Whether any coefficient is below 1; of a deferred step, whether any may be.
        name: Of the rule.
    """

    partition: Partition
    norms: Tensor
    limits: Tensor | float
    coefficients: Tensor
    clips: bool
    name: str | None = None

    @property
    def names(self) -> Sequence[str]:
        """Of the blocks."""
        return self.partition.names

    def undecided(self) -> Outcome:
        """The same with nothing decided, as of a step that is skipped."""
        return replace(self, limits=math.inf, coefficients=ones_like(self.norms), clips=False)


def decide(
    stages: Sequence[Stage], measured: Measurement, norm_type: float, state: ClipState, *, counts: Tensor | None = None
) -> tuple[tuple[Outcome, ...], Tensor | None, ClipState]:
    """Run the stages in order on the norms of one step.

    Args:
        stages: The stages.
        measured: The norms.
        norm_type: The order p of all norms.
        state: Of each stage.
        counts: Of a deferred step, whether it leaves a trace in the states, 0-dim bool; else it does if all norms are finite.

    Returns:
        The outcome of each stage; the product of their coefficients for each part that was measured, shape ``(N,)`` or ``(U,)``,
        or of one entry if it is one for all, or None if all are 1; and the state after.
    """
    outcomes: list[Outcome] = []
    after: list[LimitState] = []
    factors: Tensor | None = None
    for stage, held in zip(stages, state, strict=True):
        norms = _norms_after(factors, stage.partition, measured, norm_type)
        outcome, new = apply_limit(stage, norms, measured, norm_type, held, counts=counts)
        outcomes.append(outcome)
        after.append(new)
        if outcome.clips:
            spread = stage.partition.spread(outcome.coefficients)
            factors = spread if factors is None else factors * spread
    return tuple(outcomes), factors, tuple(after)


def shadow(
    stages: Sequence[Stage], measured: Measurement, norm_type: float, state: ClipState, *, counts: Tensor | None = None
) -> tuple[tuple[Outcome, ...], ClipState]:
    """What each stage would do if it were the only one; arguments as for :func:`decide`."""
    alone = [decide([stage], measured, norm_type, (held,), counts=counts) for stage, held in zip(stages, state, strict=True)]
    return tuple(outcome for (outcome,), _, _ in alone), tuple(after for _, _, (after,) in alone)


@dataclass(frozen=True, eq=False)
class Ceiling:
    """The norm of all gradients above which a finite step is skipped.

    Args:
        limit: The norm, 0-dim.
        is_exceeded: Whether this step's is above, 0-dim bool.
    """

    limit: Tensor
    is_exceeded: Tensor


def veto(stage: Stage, measured: Measurement, norm_type: float, state: ClipState) -> tuple[Ceiling, ClipState]:
    """What a limit says to a step as a whole, and its state after it: a spike counts there as clipped."""
    outcome, after = apply_limit(stage, measured.total, measured, norm_type, state[0])
    limits, total = outcome.limits, measured.total.reshape(())
    limit = limits.reshape(()) if isinstance(limits, Tensor) else torch.full_like(total, limits)
    return Ceiling(limit, (total > limit).logical_and(total < math.inf)), (after,)


def describe(stages: Sequence[Stage], measured: Measurement, norm_type: float) -> tuple[Outcome, ...]:
    """Outcomes of a step that is skipped: the blocks' norms, nothing decided."""
    unlimited = [Stage(None, stage.partition, (), stage.name) for stage in stages]
    return decide(unlimited, measured, norm_type, tuple({} for _ in unlimited))[0]


def _norms_after(factors: Tensor | None, partition: Partition, measured: Measurement, norm_type: float) -> Tensor:
    if partition.is_whole and measured.is_deferred:
        return measured.total if factors is None else measured.total * factors
    if factors is not None:
        return block_norms(measured.norms * factors, partition, norm_type)
    return measured.total if partition.is_whole else block_norms(measured.norms, partition, norm_type)


def apply_limit(
    stage: Stage, norms: Tensor, measured: Measurement, norm_type: float, state: LimitState, *, counts: Tensor | None = None
) -> tuple[Outcome, LimitState]:
    """What one stage decides on its blocks' norms, and its limit's state after the step.

    Args:
        stage: The stage.
        norms: Of its blocks.
        measured: The step that they are of.
        norm_type: The order p.
        state: Of its limit.
        counts: As for :func:`decide`.
    """
    blocks, limit = stage.partition, stage.limit
    if limit is None:
        return Outcome(blocks, norms, math.inf, ones_like(norms), clips=False, name=stage.name), state
    if type(limit) is FixedLimit:  # of most steps all that there is: it needs to see nothing
        limits: Tensor | float = limit.max_norm
        return Outcome(blocks, norms, limits, *coefficients(norms, limits, deferred=measured.is_deferred), name=stage.name), state
    state = {key: value.to(norms.device) for key, value in state.items()} if state else state
    may_be_bad = measured.is_deferred or not measured.is_finite
    weights = (
        block_norms(measured.weights, stage.partition, norm_type) if limit.uses_weights and measured.weights is not None else None
    )
    shown = BlockNorms(norms.nan_to_num(0.0, 0.0, 0.0) if may_be_bad else norms, norm_type, weights)
    limits, after = limit.step(shown, state)
    if isinstance(limits, Tensor):
        limits = limits.to(norms.dtype).expand_as(norms)
    outcome = Outcome(blocks, norms, limits, *coefficients(norms, limits, deferred=measured.is_deferred), name=stage.name)
    if not state or (not measured.is_deferred and measured.is_finite):
        return outcome, after
    if not measured.is_deferred:
        return outcome, state
    counts = measured.finite if counts is None else counts
    return outcome, {key: torch.where(counts, value, state[key]) for key, value in after.items()}
