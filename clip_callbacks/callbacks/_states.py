"""States of limits between steps, runs and changes of what an optimizer holds: they go with their blocks, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clip_callbacks.limits import LimitState, kind
from clip_callbacks.parameters import ParameterTable
from clip_callbacks.rules import ClipRule
from clip_callbacks.units import UnitNames


@dataclass
class Held:
    """The state of one limit, and whose it is.

    Args:
        kind: Of limit.
        names: Of the blocks; none if nothing is remembered.
        state: What the limit remembers of them.
    """

    kind: str
    names: Sequence[str]
    state: LimitState

    @classmethod
    def fresh(cls, rule: ClipRule, table: ParameterTable) -> Held:
        """What a rule begins with."""
        stage = rule.stage(table)
        state = stage.init()
        return cls("" if stage.limit is None else kind(stage.limit), stage.partition.names if state else (), state)

    def dump(self) -> dict[str, Any]:
        """For a checkpoint: tensors, numbers, strings, and lists and dictionaries of them."""
        names = self.names.parts() if isinstance(self.names, UnitNames) else list(self.names)
        return {"kind": self.kind, "names": names, "state": self.state}

    @classmethod
    def load(cls, saved: dict[str, Any]) -> Held:
        """Take back what :meth:`dump` returned."""
        names = saved["names"]
        return cls(saved["kind"], UnitNames(*names) if isinstance(names, tuple) else names, dict(saved["state"]))


def adopt(fresh: Held, sources: Sequence[Held | None], whose: str, *, strict: bool) -> Held:
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


def _is_alike(source: Held, fresh: Held) -> bool:
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


def _carried(fresh: Held, sources: Sequence[Held]) -> Held | None:
    """What the sources know of its blocks; None if they know none of them."""
    state = dict(fresh.state)
    wanted = dict.fromkeys(fresh.names) if sources else {}
    is_known = False
    for source in sources:
        if source.names == fresh.names and not is_known:
            return Held(fresh.kind, fresh.names, dict(source.state))
        places = {name: place for place, name in enumerate(source.names) if name in wanted}
        if not places:
            continue
        new = torch.tensor([place for place, name in enumerate(fresh.names) if name in places])
        old = torch.tensor([places[name] for name in fresh.names if name in places])
        for key, value in source.state.items():
            if value.ndim:
                state[key] = state[key].index_copy(-1, new, value.cpu().index_select(-1, old))
            elif not is_known:
                state[key] = value
        for name in places:
            del wanted[name]
        is_known = True
    return Held(fresh.kind, fresh.names, state) if is_known else None


def _told(held: Held) -> str:
    if not held.state:
        return f"{held.kind or 'no limit'}, which remembers nothing"
    shapes = {key: tuple(value.shape) for key, value in held.state.items()}
    return f"{held.kind} with {shapes} for {len(held.names)} blocks beginning with {held.names[0]}"
