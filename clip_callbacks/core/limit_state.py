"""States of limits between steps, runs and changes of what an optimizer holds: they go with their blocks, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_callbacks.core.blocks import OUTSIDE, Partition
from clip_callbacks.core.limits import LimitState, kind
from clip_callbacks.core.rules import ClipRule, Stage
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.core.units import UnitNames


@dataclass
class NamedLimitState:
    """The state of one limit, and whose it is.

    Args:
        kind: Of limit.
        names: Of the blocks; none if nothing is remembered.
        state: What the limit remembers of them.
        members: The parameters in each block, where a block's name does not say which: "global", or a group by its number.
        scope: Of the blocks.
    """

    kind: str
    names: Sequence[str]
    state: LimitState
    members: list[list[str]] | None = None
    scope: str = ""

    @classmethod
    def fresh(cls, rule: ClipRule, table: TensorTable) -> NamedLimitState:
        """What a rule begins with."""
        stage = Stage.of(rule, table)
        state = stage.init()
        sort, partition = "" if stage.limit is None else kind(stage.limit), stage.partition
        if not state:
            return cls(sort, (), state)
        members = _members(table, partition) if rule.scope in {"global", "group"} else None
        return cls(sort, partition.names, state, members, rule.scope)

    def dump(self) -> dict[str, Any]:
        """For a checkpoint: tensors, numbers, strings, and lists and dictionaries of them."""
        names = self.names.parts() if isinstance(self.names, UnitNames) else list(self.names)
        return {"kind": self.kind, "names": names, "state": self.state, "members": self.members, "scope": self.scope}

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> NamedLimitState:
        """Take back what :meth:`dump` returned.

        Raises:
            TypeError: If what should be tensors are none.
        """
        names = saved["names"]
        names = UnitNames(*names) if isinstance(names, tuple) else names
        state = dict(saved["state"])
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{key!r} must be a tensor, got {value!r}")
        return cls(str(saved["kind"]), names, state, saved["members"], saved.get("scope", ""))


@dataclass
class Misfits:
    """What of a checkpoint does not fit the options of now, in words.

    Args:
        anew: What begins anew, since nothing that fits is known of it.
        forgotten: What is known, and nobody takes up.
    """

    anew: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def add(self, other: Misfits) -> None:
        """Take in what somebody else has found."""
        self.anew += other.anew
        self.forgotten += other.forgotten


class Carried(NamedTuple):
    """What a limit goes on with.

    Args:
        state: Its state.
        unknown: The places of the blocks of which nothing was known.
    """

    state: NamedLimitState
    unknown: Sequence[int]

    @property
    def is_known(self) -> bool:
        """Whether the limit remembers anything, and something was known of its blocks."""
        return bool(self.state.state) and len(self.unknown) < len(self.state.names)

    def told(self, whose: str, others: Misfits) -> None:
        """Say what begins anew.

        Args:
            whose: Whose limit it is.
            others: Where to say it.
        """
        count, total = len(self.unknown), len(self.state.names)
        if count == total:
            others.anew += [f"{whose} ({self.state.kind})"] * (total > 0)
        elif count:
            first = self.state.names[self.unknown[0]]
            others.anew.append(f"{count} of {total} blocks of {whose} ({self.state.kind}), the first of them {first}")


def carry_over(fresh: NamedLimitState, sources: Sequence[NamedLimitState | None]) -> Carried:
    """The state that a limit goes on with: each block takes what is known of it by its name, and begins anew if nothing is.

    Args:
        fresh: What the limit begins with.
        sources: What is known, the best first: of this run, of a checkpoint.
    """
    if not fresh.state:
        return Carried(fresh, ())
    state, missing, is_first = dict(fresh.state), set(range(len(fresh.names))), True
    for source in sources:
        if source is None or not _is_alike(source, fresh):
            continue
        if is_first and list(source.names) == list(fresh.names) and source.members == fresh.members:
            return Carried(replace(fresh, state=dict(source.state)), ())
        pairs = [(new, old) for new, old in _same_blocks(fresh, source) if new in missing]
        if not pairs:
            continue
        new, old = (torch.tensor(places) for places in zip(*pairs, strict=True))
        for key, value in source.state.items():
            if value.ndim:
                state[key] = state[key].index_copy(-1, new, value.cpu().index_select(-1, old))
            elif is_first:
                state[key] = value
        missing -= {place for place, _ in pairs}
        is_first = False
    return Carried(replace(fresh, state=state), sorted(missing))


def _is_alike(source: NamedLimitState, fresh: NamedLimitState) -> bool:
    """Whether it is the state of such a limit, for whatever blocks: these are the last dimension of all tensors that have one."""
    if source.kind != fresh.kind or source.state.keys() != fresh.state.keys():
        return False
    pairs = [(source.state[key], value) for key, value in fresh.state.items()]
    return all(
        old.shape[:-1] == new.shape[:-1]
        and old.ndim == new.ndim
        and old.dtype == new.dtype
        and (not new.ndim or (old.shape[-1], new.shape[-1]) == (len(source.names), len(fresh.names)))
        for old, new in pairs
    )


def _same_blocks(fresh: NamedLimitState, source: NamedLimitState) -> list[tuple[int, int]]:
    """Which blocks are the same: by name, or as those with the most parameters in common; of another scope, with all of them."""
    if (fresh.members is None) != (source.members is None):
        return []
    if fresh.members is None or source.members is None:
        places = {name: place for place, name in enumerate(source.names)}
        return [(place, places[name]) for place, name in enumerate(fresh.names) if name in places]
    known = [set(names) for names in source.members]
    if source.scope and source.scope != fresh.scope:
        return [(place, known.index(set(names))) for place, names in enumerate(fresh.members) if set(names) in known]
    pairs = []
    for place, names in enumerate(fresh.members):
        common = [len(other & set(names)) for other in known]
        if max(common, default=0):
            pairs.append((place, common.index(max(common))))
    return pairs


def _members(table: TensorTable, partition: Partition) -> list[list[str]]:
    members: list[list[str]] = [[] for _ in partition.names]
    for name, block in zip(table.names, partition.index, strict=True):
        if block != OUTSIDE:
            members[block].append(name)
    return members
