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
from clip_callbacks.core.measurement import Measurement, block_norms
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
    stages: Sequence[Stage], measured: Measurement, state: ClipState
) -> tuple[tuple[Outcome, ...], Tensor | None, ClipState]:
    """Run the stages in order on the norms of one step.

    Args:
        stages: The stages.
        measured: The norms.
        state: The state of each stage.

    Returns:
        The outcome of each stage; the product of their coefficients for each part that was measured, shape ``(N,)`` or ``(U,)``,
        or of one entry if it is one for all, or None if all are 1; and the state after.
    """
    outcomes: list[Outcome] = []
    after: list[LimitState] = []
    factors: Tensor | None = None
    for stage, held in zip(stages, state, strict=True):
        norms = _norms_after(factors, stage.partition, measured)
        outcome, new = apply_limit(stage, norms, measured, held)
        outcomes.append(outcome)
        after.append(new)
        if outcome.clips:
            spread = stage.partition.spread(outcome.coefficients)
            factors = spread if factors is None else factors * spread
    return tuple(outcomes), factors, tuple(after)


def shadow(stages: Sequence[Stage], measured: Measurement, state: ClipState) -> tuple[tuple[Outcome, ...], ClipState]:
    """What each stage would do if it were the only one; arguments as for :func:`decide`."""
    alone = [decide([stage], measured, (held,)) for stage, held in zip(stages, state, strict=True)]
    return tuple(outcome for (outcome,), _, _ in alone), tuple(after for _, _, (after,) in alone)


@dataclass(frozen=True, eq=False)
class SkipThreshold:
    """The norm of all gradients above which a finite step is skipped.

    Args:
        limit: The norm, 0-dim.
        is_exceeded: Whether this step's norm is above it, 0-dim bool.
    """

    limit: Tensor
    is_exceeded: Tensor


def skip_threshold(stage: Stage, measured: Measurement, state: LimitState) -> tuple[SkipThreshold, LimitState]:
    """What a limit says to a step as a whole, and its state after it: a spike counts there as clipped."""
    outcome, after = apply_limit(stage, measured.total, measured, state)
    total = measured.total.reshape(())
    limit = outcome.limits
    limit = limit.reshape(()) if isinstance(limit, Tensor) else torch.full_like(total, limit)
    return SkipThreshold(limit, (total > limit).logical_and(total < math.inf)), after


def describe(stages: Sequence[Stage], measured: Measurement) -> tuple[Outcome, ...]:
    """Outcomes of a step that is skipped: the blocks' norms, nothing decided."""
    unlimited = [Stage(None, stage.partition, (), stage.name) for stage in stages]
    return decide(unlimited, measured, tuple({} for _ in unlimited))[0]


def _norms_after(factors: Tensor | None, partition: Partition, measured: Measurement) -> Tensor:
    """Norms of blocks after the stages before have made them smaller."""
    if partition.is_whole and (factors is None or measured.is_deferred):
        return measured.total if factors is None else measured.total * factors
    norms = measured.norms if factors is None else measured.norms * factors
    return block_norms(norms, partition, measured.norm_type)


def apply_limit(stage: Stage, norms: Tensor, measured: Measurement, state: LimitState) -> tuple[Outcome, LimitState]:
    """What one stage decides on its blocks' norms, and its limit's state after the step.

    Args:
        stage: The stage.
        norms: The norms of its blocks.
        measured: The step that they are of.
        state: The state of its limit.
    """
    limit = stage.limit
    if limit is None:
        return Outcome(stage.partition, norms, math.inf, ones_like(norms), clips=False, name=stage.name), state
    if type(limit) is FixedLimit:  # most steps have no other: it needs to see nothing
        return _outcome(stage, norms, limit.max_norm, measured), state

    weights = None
    if limit.uses_weights and measured.weights is not None:
        weights = block_norms(measured.weights, stage.partition, measured.norm_type)
    shown = norms
    if measured.is_deferred or not measured.is_finite:  # a limit is shown finite norms only
        shown = norms.nan_to_num(0.0, 0.0, 0.0)
    before = {key: value.to(norms.device) for key, value in state.items()} if state else state
    limits, after = limit.step(BlockNorms(shown, measured.norm_type, weights), before)
    if isinstance(limits, Tensor):
        limits = limits.to(norms.dtype).expand_as(norms)
    return _outcome(stage, norms, limits, measured), _state_after(measured, before, after)


def _outcome(stage: Stage, norms: Tensor, limits: Tensor | float, measured: Measurement) -> Outcome:
    each, clips = coefficients(norms, limits, deferred=measured.is_deferred)
    return Outcome(stage.partition, norms, limits, each, clips, name=stage.name)


def _state_after(measured: Measurement, before: LimitState, after: LimitState) -> LimitState:
    """The state that a limit goes on with: a step that is not finite leaves no trace."""
    if not before:
        return after
    if measured.is_deferred:
        counts = measured.finite if measured.counts is None else measured.counts
        return {key: torch.where(counts, value, before[key]) for key, value in after.items()}
    return after if measured.is_finite else before
