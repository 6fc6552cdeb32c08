r"""Decisions of the rules and the shadows on the norms of one step.

Rules run in order, and the gradients are read only once: a rule with the coefficients :math:`c` leaves the norms :math:`c \cdot n`
to the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from clip_callbacks.core.blocks import Partition
from clip_callbacks.core.coefficients import EPS, coefficients, ones, ones_like
from clip_callbacks.core.limits import BlockNorms, FixedLimit, Limit, LimitOfOne, LimitState, as_state, checked_step
from clip_callbacks.core.measurement import Measurement, block_norms
from clip_callbacks.core.rules import ClipState, Stage

SAFE_SHARE_FOR_BLOCKS = 0.999
"""Share of a fixed limit up to which the total norm shows that no block is above it: more than any rounding of the total."""


@dataclass(eq=False)
class Outcome:
    """Norms, limits and coefficients of one stage in one step.

    Args:
        partition: The B blocks.
        found: Norms of the blocks after the stages before this one, shape ``(B,)``, or 0-dim if one block holds all; or a function
            that returns them, where nothing was decided from them.
        limits: Limits of the blocks, shape ``(B,)``, or one number for all; inf is no limit.
        coefficients: Coefficients of the blocks in [0, 1], shape ``(B,)``, or 0-dim if one is for all; exactly 1 where nothing is
            clipped.
        clips: If True, at least one coefficient is below 1; in a deferred step, one may be.
        name: Name of the rule.
    """

    partition: Partition
    found: Tensor | Callable[[], Tensor]
    limits: Tensor | float
    coefficients: Tensor
    clips: bool
    name: str | None = None

    @cached_property
    def norms(self) -> Tensor:
        """Norms of the blocks after the stages before this one, shape ``(B,)``."""
        found = self.found if isinstance(self.found, Tensor) else self.found()
        if found.ndim:
            return found
        return found.reshape(1)

    @property
    def names(self) -> Sequence[str]:
        """Names of the blocks."""
        return self.partition.names

    @property
    def limit_of_each(self) -> Tensor:
        """Limits of the blocks, shape ``(B,)``."""
        if isinstance(self.limits, Tensor):
            return self.limits
        return torch.full_like(self.norms, self.limits)

    def undecided(self) -> Outcome:
        """Return the outcome with no limits and with coefficients of 1, as a skipped step has it."""
        return replace(self, limits=math.inf, coefficients=ones_like(self.norms), clips=False)


def decide(
    stages: Sequence[Stage], measured: Measurement, state: ClipState
) -> tuple[tuple[Outcome, ...], Tensor | None, ClipState]:
    """Run stages in order on the norms of one step.

    Args:
        stages: The stages.
        measured: Norms of the step.
        state: States of the stages before the step; not changed.

    Returns:
        The outcome of each stage; the product of their coefficients for each of the N parameters or U units that were measured, of
        shape ``(N,)`` or ``(U,)``, of one entry if it is the same for all, or None if nothing is clipped; and the states after the
        step.
    """
    outcomes: list[Outcome] = []
    after: list[LimitState | LimitOfOne] = []
    factors: Tensor | None = None
    for stage, before in zip(stages, state, strict=True):
        if factors is None and stage.partition.is_whole:
            norms = measured.total
        elif factors is None and _passes(stage, measured):
            outcomes.append(_passed(stage, measured))
            after.append(before)
            continue
        else:
            norms = _norms_after(factors, stage.partition, measured)
        outcome, new = apply_limit(stage, norms, measured, before)
        outcomes.append(outcome)
        after.append(new)
        # without a coefficient below 1 the factors stay None: no product here, and no write of the gradients
        if outcome.clips:
            spread = stage.partition.spread(outcome.coefficients)
            factors = spread if factors is None else factors * spread
    return tuple(outcomes), factors, tuple(after)


def shadow(stages: Sequence[Stage], measured: Measurement, state: ClipState) -> tuple[tuple[Outcome, ...], ClipState]:
    """Run each stage as if it were the only one: what it would do, for the report.

    Args:
        stages: Stages of the shadows.
        measured: Norms of the step.
        state: States of the stages before the step; not changed.

    Returns:
        The outcome of each stage, and the states after the step.
    """
    alone = [decide([stage], measured, (before,)) for stage, before in zip(stages, state, strict=True)]
    return tuple(outcome for (outcome,), _, _ in alone), tuple(after for _, _, (after,) in alone)


def describe(stages: Sequence[Stage], measured: Measurement) -> tuple[Outcome, ...]:
    """Return the outcomes of a skipped step: norms of the blocks, no limits, coefficients of 1."""
    # without limits no state is read, and every stage sees the norms as they were measured
    unlimited = [Stage(None, stage.partition, (), stage.name) for stage in stages]
    return decide(unlimited, measured, tuple({} for _ in unlimited))[0]


def _passes(stage: Stage, measured: Measurement) -> bool:
    """Return whether the host knows from the total norm alone that no block is above a fixed limit, as in most healthy steps."""
    # not isinstance, because a subclass may have a `step` of its own
    if measured.is_deferred or type(stage.limit) is not FixedLimit:
        return False
    # The norm of a block is at most that of all gradients. False for a NaN.
    total: Any = measured.total.tolist()
    return bool(total + EPS <= stage.limit.max_norm * SAFE_SHARE_FOR_BLOCKS)


def _passed(stage: Stage, measured: Measurement) -> Outcome:
    """Return the outcome of such a stage. The norms of its blocks are added up if somebody asks for them."""
    norms = partial(block_norms, measured.norms, stage.partition, measured.norm_type)
    assert type(stage.limit) is FixedLimit
    unclipped = ones(len(stage.partition.names), measured.norms.dtype)
    return Outcome(stage.partition, norms, stage.limit.max_norm, unclipped, clips=False, name=stage.name)


def _norms_after(factors: Tensor | None, partition: Partition, measured: Measurement) -> Tensor:
    """Return the norms of blocks after the stages before, whose coefficients are the factors."""
    if factors is None:
        return block_norms(measured.norms, partition, measured.norm_type)
    # In a deferred step the rules before have one factor for all gradients, which scales the total norm; otherwise factors may
    # differ between parameters, and the norm of a block is added up from theirs.
    if partition.is_whole and measured.is_deferred:
        return measured.total * factors
    return block_norms(measured.norms * factors, partition, measured.norm_type)


def apply_limit(
    stage: Stage, norms: Tensor, measured: Measurement, held: LimitState | LimitOfOne
) -> tuple[Outcome, LimitState | LimitOfOne]:
    """Evaluate the limit of one stage.

    Args:
        stage: The stage.
        norms: Norms of its blocks, shape ``(B,)``, or 0-dim if one block holds all.
        measured: Norms of the step.
        held: State of the limit before the step; not changed.

    Returns:
        The outcome of the stage, and the state of its limit after the step.
    """
    limit = stage.limit
    if limit is None:
        return Outcome(stage.partition, norms, math.inf, ones_like(norms), clips=False, name=stage.name), held
    limits: Tensor | float
    # the usual limit needs neither norms nor a state; not isinstance, because a subclass may have a `step` of its own
    if type(limit) is FixedLimit:
        limits = limit.max_norm
    else:
        if not norms.ndim:
            norms = norms.reshape(1)
        limits, held = _step_limit(stage, limit, norms, measured, held)
    each, clips = coefficients(norms, limits, deferred=measured.is_deferred)
    return Outcome(stage.partition, norms, limits, each, clips, stage.name), held


def _step_limit(
    stage: Stage, limit: Limit, norms: Tensor, measured: Measurement, held: LimitState | LimitOfOne
) -> tuple[Tensor | float, LimitState]:
    """Return the limits of the blocks of one stage, and the state of its limit after the step."""
    weights = None
    if limit.uses_weights and measured.weights is not None:
        # added up like the gradients' norms, so that both are norms of the same block in the same order p
        weights = block_norms(measured.weights, stage.partition, measured.norm_type)
    shown = norms
    # A limit is promised finite norms. Its state after a non-finite step is discarded (`_state_after`), so that any number does.
    if not measured.is_finite:  # or not known to be
        shown = norms.nan_to_num(0.0, 0.0, 0.0)
    # States are on the CPU after a resume or a step of the host; a deferred step needs them on its device.
    before = {key: value.to(norms.device) for key, value in as_state(held).items()}
    blocks = BlockNorms(shown, measured.norm_type, weights)
    if limit._is_ours:
        limits, after = limit.step(blocks, before)
    else:
        limits, after = checked_step(limit, blocks, before)
    if isinstance(limits, Tensor):
        # limits are mostly float64, as their states are; the division runs in the dtype of the norms, as under a fixed limit
        limits = limits.to(norms.dtype).expand_as(norms)
    return limits, _state_after(measured, before, after)


def _state_after(measured: Measurement, before: LimitState, after: LimitState) -> LimitState:
    """Return the state for the next step: the old one if the step must leave no trace.

    That is a non-finite step, and in a deferred step a spike that the device skips, too (:attr:`Measurement.counts`).
    """
    if not before:
        return after
    if measured.is_deferred:
        counts = measured.counts
        if counts is None:
            counts = measured.finite
        # selected on the device: the host does not know whether the step counts
        return {key: torch.where(counts, value, before[key]) for key, value in after.items()}
    if measured.is_finite:
        return after
    return before
