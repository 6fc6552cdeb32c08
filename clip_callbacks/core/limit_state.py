"""States of limits by the names of their blocks: so they follow the blocks into other runs, options and optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_callbacks.core.blocks import OUTSIDE, Partition
from clip_callbacks.core.limits import LimitOfOne, LimitState, as_state, kind
from clip_callbacks.core.rules import ClipRule, ClipState, Stage
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.core.units import UnitNames


@dataclass
class NamedLimitState:
    """State of one limit, with the kind of the limit and the names of its blocks.

    Args:
        kind: Kind of the limit, as :func:`~clip_callbacks.core.limits.kind` returns it; empty without a limit.
        names: Names of the blocks; empty if the limit has no state.
        state: State of the limit, in tensors or, of a single block on the host, in numbers of Python.
        members: Names of the parameters in each block, where the block's name does not tell: under the scopes "global" and "group".
        scope: Scope of the blocks; empty if the limit has no state.
        parameters: Names of the parameters in all blocks, under the scope "layer": rules for different parameters of a layer have
            blocks of one name.
    """

    kind: str
    names: Sequence[str]
    state: LimitState | LimitOfOne
    members: list[list[str]] | None = None
    scope: str = ""
    parameters: list[str] | None = None

    @classmethod
    def fresh(cls, rule: ClipRule, table: TensorTable) -> NamedLimitState:
        """Return the state of a rule's limit before the first step.

        Args:
            rule: The rule.
            table: Parameters that the optimizer holds.
        """
        # Not by unit, whatever the step measures: names of blocks, and with them the shapes of states, do not depend on it.
        stage = Stage.of(rule, table)
        state = stage.init()
        limit_kind = ""
        if stage.limit is not None:
            limit_kind = kind(stage.limit)
        if not state:
            return cls(limit_kind, (), state)
        members = parameters = None
        # "global" is the name of every global block, and groups are numbered: neither says which parameters are meant.
        if rule.scope in {"global", "group"}:
            members = _members(table, stage.partition)
        elif rule.scope == "layer":
            parameters = [name for names in _members(table, stage.partition) for name in names]
        return cls(limit_kind, stage.partition.names, state, members, rule.scope, parameters)

    @property
    def tensors(self) -> LimitState:
        """The state in tensors."""
        return as_state(self.state)

    @property
    def parameters_in_blocks(self) -> set[str] | None:
        """The names of the parameters in all blocks; None if the state has only names of blocks."""
        if self.members is not None:
            return {name for names in self.members for name in names}
        return None if self.parameters is None else set(self.parameters)

    def dump(self) -> dict[str, Any]:
        """Return the state for a checkpoint, made of tensors, strings, lists, tuples, dictionaries and None."""
        # names of parameters and counts of rows, in place of one string for each of perhaps millions of rows
        names = self.names.parts() if isinstance(self.names, UnitNames) else list(self.names)
        return {
            "kind": self.kind,
            "names": names,
            "state": self.tensors,
            "members": self.members,
            "scope": self.scope,
            "parameters": self.parameters,
        }

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> NamedLimitState:
        """Return the state that :meth:`dump` wrote.

        Raises:
            TypeError: If an entry of the limit's state is not a tensor.
        """
        names = saved["names"]
        if isinstance(names, tuple):
            names = UnitNames(*names)
        state = dict(saved["state"])
        # a damaged checkpoint is refused when it is loaded, not by the arithmetic of some later step
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{key!r} must be a tensor, got {value!r}")
        # a checkpoint of 0.1.0 has no scope, and no parameters
        return cls(str(saved["kind"]), names, state, saved["members"], saved.get("scope", ""), saved.get("parameters"))


def save_states(held: Sequence[NamedLimitState], states: ClipState) -> None:
    """Store the states that limits have for the next step, in the objects from which checkpoints are written."""
    for each, state in zip(held, states, strict=True):
        each.state = state


@dataclass
class StateMismatch:
    """Differences between a checkpoint and the options of this run, in words.

    Args:
        missing: Parts of this run that start from an empty state, because none in the checkpoint fits them.
        unexpected: States in the checkpoint that fit no part of this run, and are dropped.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def add(self, other: StateMismatch) -> None:
        """Append the differences that another part has found."""
        self.missing += other.missing
        self.unexpected += other.unexpected


class CarriedState(NamedTuple):
    """State with which a limit continues, and the blocks that start empty in it.

    Args:
        state: State of the limit.
        missing_blocks: Positions of the blocks that no source had a state for.
    """

    state: NamedLimitState
    missing_blocks: Sequence[int]

    @property
    def is_carried(self) -> bool:
        """If True, the limit has a state, and some source had one for at least one of its blocks."""
        return bool(self.state.state) and len(self.missing_blocks) < len(self.state.names)

    def report_missing(self, limit: str, mismatch: StateMismatch) -> None:
        """Report the limit, or those of its blocks, that start from an empty state.

        Args:
            limit: Description of the limit for the user.
            mismatch: Report that the sentence is added to.
        """
        count, total = len(self.missing_blocks), len(self.state.names)
        if count == total:
            # without a state there are no names, and nothing begins anew
            mismatch.missing += [f"{limit} ({self.state.kind})"] * (total > 0)
        elif count:
            first = self.state.names[self.missing_blocks[0]]
            mismatch.missing.append(f"{count} of {total} blocks of {limit} ({self.state.kind}), the first of them {first}")


def carry_over(fresh: NamedLimitState, sources: Sequence[NamedLimitState | None]) -> CarriedState:
    """Carry states over by the names of blocks: each block takes the state of the first source that has one for it.

    Entries of shape ``(…, B)`` are carried block by block. 0-dim entries, such as a count of steps, are those of the first source
    that has any of the blocks. Sources of another kind of limit, or with tensors of other shapes or dtypes, are ignored.

    Args:
        fresh: State before the first step, which blocks without a source keep.
        sources: Known states, the preferred ones first: those of this run before those of a checkpoint.
    """
    if not fresh.state:
        return CarriedState(fresh, ())
    state, missing, is_first = dict(fresh.tensors), set(range(len(fresh.names))), True
    for source in sources:
        if source is None or not _is_compatible(source, fresh):
            continue
        # The usual case: a resume with equal blocks, whose state is taken as a whole.
        if is_first and list(source.names) == list(fresh.names) and source.members == fresh.members:
            return CarriedState(replace(fresh, state=dict(source.tensors)), ())
        pairs = [(new, old) for new, old in _matching_blocks(fresh, source) if new in missing]
        if not pairs:
            continue
        new, old = (torch.tensor(positions, dtype=torch.int64, device="cpu") for positions in zip(*pairs, strict=True))
        for key, value in source.tensors.items():
            # a source may be on the device of deferred steps, and a fresh state on torch's default device
            if value.ndim:
                state[key] = state[key].cpu().index_copy(-1, new, value.cpu().index_select(-1, old))
            elif is_first:
                # one number for all blocks, such as a count of steps, cannot be mixed: it is that of the preferred source
                state[key] = value
        missing -= {position for position, _ in pairs}
        is_first = False
    return CarriedState(replace(fresh, state=state), sorted(missing))


def similarity(fresh: NamedLimitState, source: NamedLimitState) -> float:
    """Return the share of blocks that two states have in common, among those that either has.

    Counted are the parameters in the blocks, if both states name them, and the names of the blocks otherwise.

    Args:
        fresh: State before the first step.
        source: Known state.

    Returns:
        1 if both have the same blocks; 0 if :func:`carry_over` would carry none over.
    """
    if not _is_compatible(source, fresh) or not _matching_blocks(fresh, source):
        return 0.0
    ours, theirs = fresh.parameters_in_blocks, source.parameters_in_blocks
    if ours is None or theirs is None:
        ours, theirs = set(fresh.names), set(source.names)
    return len(ours & theirs) / len(ours | theirs)


def _is_compatible(source: NamedLimitState, fresh: NamedLimitState) -> bool:
    """Return whether both are states of one kind of limit, with tensors that differ at most in the last dimension, the blocks."""
    # The kind leaves out a limit's numbers, which may have changed: what is remembered are norms and counts.
    old_state, new_state = source.tensors, fresh.tensors
    if source.kind != fresh.kind or old_state.keys() != new_state.keys():
        return False
    pairs = [(old_state[key], value) for key, value in new_state.items()]
    # A window of another length has another shape, and begins anew: its order of age could not be continued.
    return all(
        old.shape[:-1] == new.shape[:-1]
        and old.ndim == new.ndim
        and old.dtype == new.dtype
        and (not new.ndim or (old.shape[-1], new.shape[-1]) == (len(source.names), len(fresh.names)))
        for old, new in pairs
    )


def _matching_blocks(fresh: NamedLimitState, source: NamedLimitState) -> list[tuple[int, int]]:
    """Return pairs of positions, in ``fresh`` and in ``source``, of blocks that correspond.

    Blocks with members correspond if they have the most parameters in common, or, if the scope has changed, exactly equal members:
    the norm of a part says little about the norm of the whole. All other blocks correspond by name.
    """
    # the blocks of one are known by members and those of the other by names: nothing tells which correspond
    if (fresh.members is None) != (source.members is None):
        return []
    if fresh.members is None or source.members is None:
        positions = {name: position for position, name in enumerate(source.names)}
        return [(position, positions[name]) for position, name in enumerate(fresh.names) if name in positions]
    known = [set(names) for names in source.members]
    if source.scope and source.scope != fresh.scope:
        return [(position, known.index(set(names))) for position, names in enumerate(fresh.members) if set(names) in known]
    pairs = []
    for position, names in enumerate(fresh.members):
        # Several new blocks may continue one old block, as when a parameter group is split.
        common = [len(other & set(names)) for other in known]
        if max(common, default=0):
            pairs.append((position, common.index(max(common))))
    return pairs


def _members(table: TensorTable, partition: Partition) -> list[list[str]]:
    """Return the names of the parameters in each block."""
    members: list[list[str]] = [[] for _ in partition.names]
    for name, block in zip(table.names, partition.index, strict=True):
        if block != OUTSIDE:
            members[block].append(name)
    return members
