"""Limits inside another limit: one state for all of them, with the entries of each under its name and a dot."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clip_callbacks.core.limits._contract import checked_step, initial_state
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitOfOne, LimitState, of_one


def init_each(limits: Mapping[str, Limit], blocks: int) -> LimitState:
    """Return the states before the first step, joined into one.

    Args:
        limits: The inner limits by name.
        blocks: Number of blocks, B.
    """
    return _joined({name: initial_state(limit, blocks) for name, limit in limits.items()})


def step_each(limits: Mapping[str, Limit], blocks: BlockNorms, state: LimitState) -> tuple[dict[str, Tensor], LimitState]:
    """Let every inner limit take the step as if it were the only one.

    Args:
        limits: The inner limits by name.
        blocks: Norms of this step.
        state: Joined states after the last step; not changed, and entries without the name of an inner limit are ignored.

    Returns:
        The limits of each by name, each of shape ``(B,)``; and the joined states after the step.
    """
    found: dict[str, Tensor] = {}
    after: dict[str, LimitState] = {}
    for name, limit in limits.items():
        before = _part(state, name)
        if limit._is_ours:
            values, after[name] = limit.step(blocks, before)
        else:
            values, after[name] = checked_step(limit, blocks, before)
        # to one shape, since a limit may return one number for all blocks, and limits are compared block by block
        if isinstance(values, Tensor):
            found[name] = values.expand_as(blocks.norms)
        else:
            found[name] = torch.full_like(blocks.norms, values)
    return found, _joined(after)


def each_of_one(limits: Mapping[str, Limit], state: LimitState) -> dict[str, LimitOfOne] | None:
    """Return the inner limits in numbers of Python, by name; None if one of them has no such form.

    Args:
        limits: The inner limits by name.
        state: Joined states of one block on the CPU.
    """
    found: dict[str, LimitOfOne] = {}
    for name, limit in limits.items():
        each = of_one(limit, _part(state, name))
        if each is None:
            return None
        found[name] = each
    return found


def joined_state(limits: Mapping[str, LimitOfOne]) -> LimitState:
    """Return the joined states of inner limits."""
    return _joined({name: limit.state() for name, limit in limits.items()})


def _joined(states: Mapping[str, LimitState]) -> LimitState:
    return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}


def _part(state: LimitState, name: str) -> LimitState:
    # with the dot, so that member 1 does not get the entries of member 10
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
