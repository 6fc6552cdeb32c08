"""Learning rates times a factor, wherever an optimizer and its schedule have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

IN_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""Where a parameter group has one: OneCycleLR reads its bounds from there."""
IN_SCHEDULES = ("base_lrs", "max_lrs", "min_lrs", "eta_min", "_last_lr")
"""Where a schedule's state has them."""


def scaled_groups(groups: Sequence[Mapping[str, Any]], factor: float) -> list[dict[str, Any]]:
    """Parameter groups with their learning rates times a factor; a tensor is changed in place, once if several share it."""
    done: set[int] = set()

    def scaled(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value * factor
        if id(value) not in done:
            done.add(id(value))
            value.mul_(factor)
        return value

    return [{**group, **{key: scaled(value) for key, value in group.items() if key in IN_GROUPS}} for group in groups]


def scaled_schedule(state: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The state of a schedule, and of those within it, with learning rates times a factor."""
    scaled = {**state, **{key: _scaled(value, factor) for key, value in state.items() if key in IN_SCHEDULES}}
    if "_schedulers" in scaled:
        scaled["_schedulers"] = [scaled_schedule(each, factor) for each in scaled["_schedulers"]]
    return scaled


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_scaled(each, factor) for each in value)
    return value * factor
