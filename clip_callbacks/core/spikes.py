"""Spikes: finite steps whose total norm, or the loss of whose window, is above a limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from clip_callbacks.core.decisions import apply_limit
from clip_callbacks.core.limits import BlockNorms, LimitState
from clip_callbacks.core.measurement import FALSE, Measurement
from clip_callbacks.core.rules import ClipState, Plan, Stage


@dataclass(frozen=True, eq=False)
class Threshold:
    """The limit of one number of a step, and whether the number is above it.

    Args:
        value: The total norm, or the loss of the window, 0-dim.
        limit: Its limit, 0-dim; inf in the warm-up of a limit.
        is_exceeded: True if the step is finite and the number is above the limit, 0-dim bool.
    """

    value: Tensor
    limit: Tensor
    is_exceeded: Tensor

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Threshold:
        """Return the threshold with a function applied to each tensor."""
        return Threshold(function(self.value), function(self.limit), function(self.is_exceeded))


@dataclass(frozen=True, eq=False)
class Thresholds:
    """The thresholds of one step.

    Args:
        norm: The threshold of the total norm; None without ``skip_above``.
        loss: The threshold of the window's loss; None without ``loss_above``.
        both: If True, a spike is above both; else above one of them.
    """

    norm: Threshold | None = None
    loss: Threshold | None = None
    both: bool = False

    @property
    def exist(self) -> bool:
        """Whether there is any threshold."""
        return self.norm is not None or self.loss is not None

    @cached_property
    def is_exceeded(self) -> Tensor:
        """Whether the step is a spike, 0-dim bool; it must not be read of a deferred step."""
        norm, loss = (FALSE if each is None else each.is_exceeded for each in (self.norm, self.loss))
        if self.norm is None or self.loss is None:
            return norm if self.loss is None else loss
        if self.both:
            return norm.logical_and(loss)
        return norm.logical_or(loss)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Thresholds:
        """Return the thresholds with a function applied to each tensor."""
        if not self.exist:
            return self
        norm, loss = (each if each is None else each.mapped(function) for each in (self.norm, self.loss))
        return replace(self, norm=norm, loss=loss)


NO_THRESHOLDS = Thresholds()
"""Thresholds of a step that cannot be a spike."""


def evaluate(plan: Plan, measured: Measurement, states: ClipState) -> tuple[Thresholds, ClipState]:
    """Evaluate ``skip_above`` and ``loss_above`` on one step.

    Args:
        plan: The plan of the step.
        measured: Norms of the step, and the loss of its window.
        states: States of both limits before the step, of those that the plan has; not changed.

    Returns:
        The thresholds, and the limits' states after the step, which take in a spike as the limits would clip it.
    """
    norm = loss = None
    before, after = list(states), []
    if plan.skip_above is not None:
        norm, state = _norm_threshold(plan.skip_above, measured, before.pop(0))
        after.append(state)
    if plan.loss_above is not None:
        loss, state = _loss_threshold(plan.loss_above, measured, before.pop(0))
        after.append(state)
    return Thresholds(norm, loss, plan.both), tuple(after)


def _norm_threshold(stage: Stage, measured: Measurement, state: LimitState) -> tuple[Threshold, LimitState]:
    outcome, after = apply_limit(stage, measured.total, measured, state)
    total = measured.total.reshape(())
    # The norm is compared with the limit itself: at a fixed limit, the 1e-6 makes the coefficient less than 1 already.
    limit = _as_tensor(outcome.limits, total)
    # NaN fails both comparisons and inf the second one: a non-finite step is the affair of the policy
    return Threshold(total, limit, (total > limit).logical_and(total < math.inf)), after


def _loss_threshold(stage: Stage, measured: Measurement, state: LimitState) -> tuple[Threshold, LimitState]:
    """Evaluate the limit of the loss: no coefficients, since a loss has any sign, and is not clipped."""
    assert stage.limit is not None
    assert measured.loss is not None, "measured for a plan with this stage"
    loss = measured.loss
    # A limit is promised finite numbers. A loss that is not known is NaN, and a step that is bad anyway is no spike.
    counts = loss.isfinite().logical_and(measured.finite.to(loss.device))
    before = {key: value.to(loss.device) for key, value in state.items()}
    limits, after = stage.limit.step(BlockNorms(torch.where(counts, loss, 0.0), measured.norm_type, are_losses=True), before)
    limit = _as_tensor(limits, loss.reshape(()))
    # selected on the device: in a deferred step the host does not know whether the loss counts
    after = {key: torch.where(counts.reshape(()), value, before[key]) for key, value in after.items()}
    return Threshold(loss.reshape(()), limit, counts.logical_and(loss > limit).reshape(())), after


def _as_tensor(limit: Tensor | float, value: Tensor) -> Tensor:
    """Return a limit as a 0-dim tensor of the dtype and device of the number that it limits."""
    if isinstance(limit, Tensor):
        return limit.reshape(()).to(value.dtype)
    # a number beyond the dtype limits nothing, and torch refuses it
    largest = torch.finfo(value.dtype).max
    return torch.full_like(value, min(max(limit, -largest), largest))
