"""States of limits that a checkpoint brings, and whether they are those of the limits there are."""

from __future__ import annotations

from collections.abc import Sequence

from clip_callbacks.limits import LimitState
from clip_callbacks.rules import ClipState


def fitting(state: ClipState, fresh: ClipState, whose: str, *, renew: bool = False) -> ClipState:
    """A restored state, if it is one of the limits there are; a fresh one, if neither remembers anything.

    Args:
        state: The restored one.
        fresh: What the limits begin with.
        whose: For the error: whose limits they are.
        renew: Whether to begin anew where it does not fit.

    Raises:
        ValueError: If it does not fit.
    """
    if not _shapes(state) and not _shapes(fresh):
        return fresh  # limits that remember nothing may change between runs
    if len(state) == len(fresh) and _shapes(state) == _shapes(fresh):
        return state
    if renew:
        return fresh
    raise ValueError(
        f"the checkpoint's state of {whose} must fit its rules, got limits of shapes {_shapes(state)} for {_shapes(fresh)}. "
        "Resume with the rules it was saved with."
    )


def _shapes(state: Sequence[LimitState]) -> list[dict[str, tuple[int, ...]]]:
    return [{key: tuple(value.shape) for key, value in limit.items()} for limit in state if limit]
