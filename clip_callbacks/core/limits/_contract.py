"""Checks of what a user's limit returns. Limits of this package keep to it, and are not checked."""

from __future__ import annotations

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
        ValueError: If it is not a dictionary of tensors.
    """
    state: Any = limit.init(blocks)
    if not limit._is_ours and not _is_state(state):
        raise ValueError(
            f"`{type(limit).__name__}.init` must return a dictionary of tensors, got {_shown(state)}: numbers may be tensors too, "
            "such as torch.tensor(0)."
        )
    found: LimitState = state
    return found


def checked_step(limit: Limit, returned: object, blocks: BlockNorms, before: LimitState) -> tuple[Tensor | float, LimitState]:
    """Check what the step of a user's limit has returned.

    Args:
        limit: The limit.
        returned: The return value of its step.
        blocks: Norms of the step.
        before: State before the step.

    Returns:
        The limits, of a number a float, and the state after the step in the dtypes of the one before.

    Raises:
        ValueError: If it is not a pair, the limits do not fit the blocks, or the state is not like the one before.
    """
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
