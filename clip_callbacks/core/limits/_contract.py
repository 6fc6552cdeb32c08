"""Steps of users' limits: they get copies, and what they return is checked. Limits of this package need neither."""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitState


def initial_state(limit: Limit, blocks: int) -> LimitState:
    """Return a limit's state before the first step.

    Args:
        limit: The limit.
        blocks: Number of blocks, B.

    Raises:
        ValueError: If it is not a dictionary of tensors that are 0-dim or have the blocks as their last dimension.
    """
    state: Any = limit.init(blocks)
    if limit._is_ours:
        found: LimitState = state
        return found
    name = f"`{type(limit).__name__}.init`"
    if not _is_state(state):
        raise ValueError(
            f"{name} must return a dictionary of tensors, got {_shown(state)}: numbers may be tensors too, such as torch.tensor(0)."
        )
    if any(value.ndim and value.shape[-1] != blocks for value in state.values()):
        raise ValueError(
            f"{name} must return tensors that are 0-dim or have the blocks as their last dimension, of {blocks} here, got "
            f"{_shown(state)}: a window of 100 norms is torch.zeros(100, blocks)."
        )
    return dict(state)


def checked_step(limit: Limit, blocks: BlockNorms, before: LimitState) -> tuple[Tensor | float, LimitState]:
    """Let a user's limit take a step on copies, to which it may write, and check what it returns.

    Args:
        limit: The limit.
        blocks: Norms of the step; not changed.
        before: State before the step; not changed.

    Returns:
        The limits, of a number a float, and the state after the step in the dtypes of the one before.

    Raises:
        ValueError: If it is not a pair, the limits do not fit the blocks, or the state is not like the one before.
    """
    weights = None if blocks.weights is None else blocks.weights.clone()
    given = replace(blocks, norms=blocks.norms.clone(), weights=weights)
    returned: Any = limit.step(given, {key: value.clone() for key, value in before.items()})
    name = f"`{type(limit).__name__}.step`"
    try:
        # not a tensor of two entries, which unpacks too
        limits, after = returned if isinstance(returned, (tuple, list)) else ()
    except ValueError:
        raise ValueError(
            f"{name} must return the limits and the state after the step, got {_shown(returned)}: end it with "
            "`return limits, state`."
        ) from None
    count = len(blocks.norms)
    found = _as_limits(limits, count)
    if found is None:
        raise ValueError(
            f"{name} must return limits as one number or as a tensor of shape ({count},), one entry for each block, got "
            f"{_shown(limits)}. Where there is no limit yet, return math.inf."
        )
    if not _is_state(after) or _kinds(after) != _kinds(before):
        raise ValueError(
            f"{name} must return a state with the keys, shapes and dtypes of the state that it was given, {_shown(before)}, got "
            f"{_shown(after)}: let `init` return what `step` does."
        )
    # norms are float64 in some steps, which promote a state: kept in its dtype, it fits the next run too
    return found, {key: value.to(before[key].dtype) for key, value in after.items()}


def _as_limits(limits: object, blocks: int) -> Tensor | float | None:
    """Return limits, of a number a float; None if they are not numbers, or not one for all blocks or for each."""
    if isinstance(limits, Tensor):
        # as in `number_above_zero`, True is no limit
        is_real = not limits.is_complex() and limits.dtype is not torch.bool
        return limits if is_real and limits.shape in {(), (1,), (blocks,)} else None
    if isinstance(limits, bool) or not isinstance(limits, Real):
        return None
    # a float, under which 1e-6 is added to the norm (`coefficients`); 1 must limit as 1.0 does
    try:
        return float(limits)
    except OverflowError:  # an int beyond float64
        return None


def _is_state(state: object) -> bool:
    return isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())


def _kinds(state: LimitState) -> dict[str, tuple[torch.Size, torch.dtype | None]]:
    """Return the shape and the dtype of each entry; None stands for any floating-point dtype."""
    return {key: (value.shape, None if value.is_floating_point() else value.dtype) for key, value in state.items()}


def _shown(value: object) -> str:
    """Return a value for an error: of tensors their shapes and dtypes, which need no read of a device."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_shown, value)) + ")"
    return repr(value)
