"""States of limits between steps, runs and changes of what an optimizer holds: they go with their blocks, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clip_callbacks.core.blocks import OUTSIDE, Partition
from clip_callbacks.core.limits import LimitState, kind
from clip_callbacks.core.parameters import ParameterTable
from clip_callbacks.core.rules import ClipRule
from clip_callbacks.core.units import UnitNames


@dataclass
class NamedLimitState:
    """The state of one limit, and whose it is.

    Args:
        kind: Of limit.
        names: Of the blocks; none if nothing is remembered.
        state: What the limit remembers of them.
        members: The parameters in each block, where a block's name does not say which: "global", or a group by its number.
    """

    kind: str
    names: Sequence[str]
    state: LimitState
    members: list[list[str]] | None = None

    @classmethod
    def fresh(cls, rule: ClipRule, table: ParameterTable) -> NamedLimitState:
        """What a rule begins with."""
        stage = rule.stage(table)
        state = stage.init()
        sort, partition = "" if stage.limit is None else kind(stage.limit), stage.partition
        if not state:
            return cls(sort, (), state)
        return cls(sort, partition.names, state, _members(table, partition) if rule.scope in {"global", "group"} else None)

    def dump(self) -> dict[str, Any]:
        """For a checkpoint: tensors, numbers, strings, and lists and dictionaries of them."""
        names = self.names.parts() if isinstance(self.names, UnitNames) else list(self.names)
        return {"kind": self.kind, "names": names, "state": self.state, "members": self.members}

    @classmethod
    def load(cls, saved: dict[str, Any]) -> NamedLimitState:
        """Take back what :meth:`dump` returned."""
        names = saved["names"]
        names = UnitNames(*names) if isinstance(names, tuple) else names
        return cls(saved["kind"], names, dict(saved["state"]), saved["members"])


def carry_over(fresh: NamedLimitState, sources: Sequence[NamedLimitState | None], whose: str, *, strict: bool) -> NamedLimitState:
    """The state that a limit goes on with: each block takes what is known of it by its name.

    Args:
        fresh: What the limit begins with.
        sources: What is known, the best first: of this run, of a checkpoint.
        whose: For the error: whose limit it is.
        strict: Whether it is an error if what is known is of another limit, or of none of its blocks; else that begins anew.

    Raises:
        ValueError: If so.
    """
    known = [source for source in sources if source is not None and (source.state or fresh.state)]
    if not known:
        return fresh
    fitting = [source for source in known if _is_alike(source, fresh)]
    carried = _carried(fresh, fitting)
    if carried is not None:
        return carried
    if strict:
        raise ValueError(
            f"the checkpoint's state of {whose} must fit, got that of {_told(known[0])} for {_told(fresh)}. Resume with the rules "
            "it was saved with."
        )
    return fresh


def _is_alike(source: NamedLimitState, fresh: NamedLimitState) -> bool:
    """Whether it is the state of such a limit, for whatever blocks: these are the last dimension of all tensors that have one."""
    if source.kind != fresh.kind or source.state.keys() != fresh.state.keys():
        return False
    pairs = [(source.state[key], value) for key, value in fresh.state.items()]
    return all(
        old.shape[:-1] == new.shape[:-1]
        and old.ndim == new.ndim
        and (not new.ndim or (old.shape[-1], new.shape[-1]) == (len(source.names), len(fresh.names)))
        for old, new in pairs
    )


def _carried(fresh: NamedLimitState, sources: Sequence[NamedLimitState]) -> NamedLimitState | None:
    """What the sources know of its blocks; None if they know none of them."""
    state, missing, is_known = dict(fresh.state), set(range(len(fresh.names))) if sources else set(), False
    for source in sources:
        if not is_known and list(source.names) == list(fresh.names) and source.members == fresh.members:
            return NamedLimitState(fresh.kind, fresh.names, dict(source.state), fresh.members)
        pairs = [(new, old) for new, old in _same_blocks(fresh, source) if new in missing]
        if not pairs:
            continue
        new, old = (torch.tensor(places) for places in zip(*pairs, strict=True))
        for key, value in source.state.items():
            if value.ndim:
                state[key] = state[key].index_copy(-1, new, value.cpu().index_select(-1, old))
            elif not is_known:
                state[key] = value
        missing -= {place for place, _ in pairs}
        is_known = True
    return NamedLimitState(fresh.kind, fresh.names, state, fresh.members) if is_known else None


def _same_blocks(fresh: NamedLimitState, source: NamedLimitState) -> list[tuple[int, int]]:
    """Which blocks are the same: by name, or as those with the most parameters in common."""
    if fresh.members is None or source.members is None:
        places = {name: place for place, name in enumerate(source.names)}
        return [(place, places[name]) for place, name in enumerate(fresh.names) if name in places]
    known = [set(names) for names in source.members]
    pairs = []
    for place, names in enumerate(fresh.members):
        common = [len(other & set(names)) for other in known]
        if max(common, default=0):
            pairs.append((place, common.index(max(common))))
    return pairs


def _members(table: ParameterTable, partition: Partition) -> list[list[str]]:
    members: list[list[str]] = [[] for _ in partition.names]
    for name, block in zip(table.names, partition.index, strict=True):
        if block != OUTSIDE:
            members[block].append(name)
    return members


def _told(held: NamedLimitState) -> str:
    if not held.state:
        return f"{held.kind or 'no limit'}, which remembers nothing"
    shapes = {key: tuple(value.shape) for key, value in held.state.items()}
    return f"{held.kind} with {shapes} for {len(held.names)} blocks beginning with {held.names[0]}"
