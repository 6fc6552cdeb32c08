"""Spikes: finite steps whose total norm, or the loss of whose window, is above a limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import c_float
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clip_callbacks.core.decisions import apply_limit
from clip_callbacks.core.limits import BlockNorms, Limit, LimitOfOne, LimitState, as_state, checked_step, of_one
from clip_callbacks.core.measurement import FALSE, FLAGS, Measurement
from clip_callbacks.core.rules import ClipState, Plan, Stage


@dataclass(frozen=True, eq=False)
class Threshold:
    """The limit of one number of a step, and whether the number is above it.

    Args:
        value: The total norm, or the loss of the window: a number, or a 0-dim tensor in a deferred step.
        limit: Its limit, a number or a 0-dim tensor; inf in the warm-up of a limit.
        is_exceeded: True if the step is finite and the number is above the limit, 0-dim bool.
    """

    value: Tensor | float
    limit: Tensor | float
    is_exceeded: Tensor

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Threshold:
        """Return the threshold with a function applied to each tensor."""
        value, limit = (function(each) if isinstance(each, Tensor) else each for each in (self.value, self.limit))
        return Threshold(value, limit, function(self.is_exceeded))


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

    @property
    def is_exceeded(self) -> Tensor:
        """Whether the step is a spike, 0-dim bool; it must not be read of a deferred step."""
        if self.norm is None:
            if self.loss is None:
                return FALSE
            return self.loss.is_exceeded
        if self.loss is None:
            return self.norm.is_exceeded
        norm, loss = self.norm.is_exceeded, self.loss.is_exceeded
        if norm is loss:  # one of the two flags of the host: most steps exceed neither
            return norm
        if self.both:
            return norm.logical_and(loss)
        return norm.logical_or(loss)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Thresholds:
        """Return the thresholds with a function applied to each tensor."""
        if not self.exist:
            return self
        norm, loss = self.norm, self.loss
        if norm is not None:
            norm = norm.mapped(function)
        if loss is not None:
            loss = loss.mapped(function)
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
    before, after = iter(states), []
    if plan.skip_above is not None:
        norm, state = _threshold(plan.skip_above, measured, next(before), None)
        after.append(state)
    if plan.loss_above is not None:
        assert measured.loss is not None, "measured for a plan with this stage"
        loss, state = _threshold(plan.loss_above, measured, next(before), measured.loss)
        after.append(state)
    return Thresholds(norm, loss, plan.both), tuple(after)


def _threshold(
    stage: Stage, measured: Measurement, held: LimitState | LimitOfOne, loss: Tensor | None
) -> tuple[Threshold, LimitState | LimitOfOne]:
    """Evaluate one limit: of the loss if there is one, else of the total norm. On the host the state keeps its form."""
    limit = stage.limit
    if limit is not None and not measured.is_deferred:
        if not isinstance(held, dict):
            return _on_host(held, measured, loss)
        numbers = of_one(limit, held)
        if numbers is not None:
            threshold, after = _on_host(numbers, measured, loss)
            return threshold, after.state()
    if loss is None:
        return _norm_threshold(stage, measured, held)
    assert limit is not None, "a limit of losses is a number, or one that takes losses"
    return _loss_threshold(limit, measured, loss, as_state(held))


def _on_host(limit: LimitOfOne, measured: Measurement, loss: Tensor | None) -> tuple[Threshold, LimitOfOne]:
    """Evaluate a limit in numbers of Python."""
    tensor = measured.total
    if loss is not None:
        tensor = loss
    value: Any = tensor.tolist()
    if tensor.ndim:
        (value,) = value
    # A limit is promised finite numbers. A loss that is not known is NaN, and a step that is bad anyway is no spike.
    counts = measured.is_finite and math.isfinite(value)
    shown = 0.0
    if counts:
        shown = value
    found, after = limit.step(shown, are_losses=loss is not None)
    if tensor.dtype is not torch.float64:  # rounded as the number that it limits
        found = c_float(found).value
    threshold = Threshold(value, found, FLAGS[counts and value > found])
    if counts:
        return threshold, after
    return threshold, limit


def _norm_threshold(
    stage: Stage, measured: Measurement, held: LimitState | LimitOfOne
) -> tuple[Threshold, LimitState | LimitOfOne]:
    outcome, after = apply_limit(stage, measured.total, measured, held)
    total = measured.total
    # The norm is compared with the limit itself: at a fixed limit, the 1e-6 makes the coefficient less than 1 already.
    limit = _as_tensor(outcome.limits, total)
    # NaN fails both comparisons and inf the second one: a non-finite step is the affair of the policy
    return Threshold(total, limit, (total > limit).logical_and(total < math.inf)), after


def _loss_threshold(limit: Limit, measured: Measurement, loss: Tensor, state: LimitState) -> tuple[Threshold, LimitState]:
    """Evaluate the limit of the loss: no coefficients, since a loss has any sign, and is not clipped."""
    # A limit is promised finite numbers. A loss that is not known is NaN, and a step that is bad anyway is no spike.
    counts = loss.isfinite().logical_and(measured.finite.to(loss.device))
    before = {key: value.to(loss.device) for key, value in state.items()}
    blocks = BlockNorms(torch.where(counts, loss, 0.0), measured.norm_type, are_losses=True)
    if limit._is_ours:
        limits, after = limit.step(blocks, before)
    else:
        limits, after = checked_step(limit, blocks, before)
    found = _as_tensor(limits, loss.reshape(()))
    # selected on the device: in a deferred step the host does not know whether the loss counts
    after = {key: torch.where(counts.reshape(()), value, before[key]) for key, value in after.items()}
    return Threshold(loss.reshape(()), found, counts.logical_and(loss > found).reshape(())), after


def _as_tensor(limit: Tensor | float, value: Tensor) -> Tensor:
    """Return a limit as a 0-dim tensor of the dtype and device of the number that it limits."""
    if isinstance(limit, Tensor):
        return limit.reshape(()).to(value.dtype)
    # a number beyond the dtype limits nothing, and torch refuses it
    largest = torch.finfo(value.dtype).max
    return torch.full_like(value, min(max(limit, -largest), largest))
