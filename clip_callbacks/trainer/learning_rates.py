"""Learning rates of an optimizer and its schedules, multiplied by a factor.

Trap: learning rates stand in many places. Schedulers compute the next one from bounds in their own state or in the parameter
groups, so that a change of ``lr`` alone lasts for one step; and several groups may share one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

IN_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""Keys of a parameter group that hold a learning rate. OneCycleLR reads its bounds from there."""
IN_SCHEDULES = ("base_lrs", "max_lrs", "min_lrs", "eta_min", "_last_lr")
"""Keys of a scheduler's state that hold learning rates."""


def scaled_groups(groups: Sequence[Mapping[str, Any]], factor: float) -> list[dict[str, Any]]:
    """Multiply the learning rates of parameter groups by a factor. A tensor is changed in place, once if groups share it."""
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
    """Multiply the learning rates in a scheduler's state, and in those of schedulers inside it, by a factor."""
    scaled = {**state, **{key: _scaled(value, factor) for key, value in state.items() if key in IN_SCHEDULES}}
    if "_schedulers" in scaled:
        scaled["_schedulers"] = [scaled_schedule(each, factor) for each in scaled["_schedulers"]]
    return scaled


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_scaled(each, factor) for each in value)
    return value * factor
