"""States of all limits of one fit: over its steps, changes of an optimizer, and runs with other options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from operator import itemgetter
from typing import Any, TypeAlias

from clip_callbacks.core.limit_state import CarriedState, NamedLimitState, StateMismatch, carry_over, similarity
from clip_callbacks.core.rules import ClipRule
from clip_callbacks.trainer.optimizer_context import OptimizerContext

LimitKey: TypeAlias = tuple[str, str]
"""A role, "limits" (of rules) or "shadows", and the name of the rule or shadow."""

ROLES = {"limits": "the limit of ", "shadows": "shadow "}
"""Roles of limits as checkpoints call them, and as messages do."""


class LimitMemory:
    """States of all limits of a GradientClipping, by the number of the optimizer.

    Args:
        saved: State from a checkpoint, as :meth:`state_dict` returned it; empty at the beginning of a run.

    Attributes:
        mismatch: Differences between the checkpoint and the rules and shadows of this run.

    Raises:
        TypeError: If an entry of a saved state is not a tensor.
    """

    def __init__(self, saved: Mapping[str, Any]) -> None:
        self._live: dict[int, dict[LimitKey, NamedLimitState]] = {}
        self._saved: dict[int, dict[LimitKey, NamedLimitState]] = {}
        # by the number of the optimizer, the key in the checkpoint of each limit that goes on from a state there
        self._origins: dict[int, dict[LimitKey, LimitKey]] = {}
        self.mismatch = StateMismatch()
        for role in ROLES:
            for index, by_name in saved.get(role, {}).items():
                known = self._saved.setdefault(int(index), {})
                known |= {(role, name): NamedLimitState.load(each) for name, each in by_name.items()}

    def attach(
        self, context: OptimizerContext, rules: Mapping[str, ClipRule], shadows: Mapping[str, ClipRule], *, renewed: bool
    ) -> list[NamedLimitState]:
        """Return a state for each limit of an optimizer: those of the rules, then those of the shadows.

        States that are known, from this fit or from a checkpoint, are carried over.

        Args:
            context: The optimizer.
            rules: Rules of the optimizer by name.
            shadows: Shadows of the optimizer by name.
            renewed: If True, the optimizer took on other parameters in the middle of a fit.
        """
        wanted = {("limits", name): rule for name, rule in rules.items()}
        wanted |= {("shadows", name): rule for name, rule in shadows.items()}
        fresh = {key: NamedLimitState.fresh(rule, context.table) for key, rule in wanted.items()}
        sources = self._sources(context.index, fresh)
        carried = {key: carry_over(each, sources[key]) for key, each in fresh.items()}
        # Once, at the start: in the middle of a fit no state is missing because of other options.
        if not renewed and context.index in self._saved:
            self._report(context, carried)
        # The clipper gets these objects themselves, and replaces their `state` at each step.
        self._live[context.index] = {key: each.state for key, each in carried.items()}
        return list(self._live[context.index].values())

    def _sources(self, index: int, fresh: Mapping[LimitKey, NamedLimitState]) -> dict[LimitKey, list[NamedLimitState]]:
        """Return the known states of each limit, the preferred ones first.

        Last come those of other optimizers, which may have held the parameters before: only of blocks with names of their own.
        """
        saved, origins = self._saved.get(index, {}), self._origins.setdefault(index, {})
        # A limit keeps its origin, from which it also takes the states of blocks that its optimizer takes on later.
        new = {key: each for key, each in fresh.items() if key not in origins}
        origins |= _pairs(new, {key: each for key, each in saved.items() if key not in origins.values()})
        # this fit before the checkpoint, whose states are older
        known = [(self._live.get(index, {}), {key: key for key in fresh}), (saved, origins)]
        for other, states in self._saved.items():
            if other != index:
                # global and numbered group blocks of another optimizer are about other parameters
                local = {key: each for key, each in states.items() if each.members is None}
                known.append((local, _pairs(fresh, local)))
        return {key: [states[pairs[key]] for states, pairs in known if pairs.get(key) in states] for key in fresh}

    def _report(self, context: OptimizerContext, carried: Mapping[LimitKey, CarriedState]) -> None:
        for (role, name), each in carried.items():
            each.report_missing(f"{ROLES[role]}{name}{context.of_optimizer}", self.mismatch)
        used = self._origins[context.index].values()
        unused = [key for key, each in self._saved[context.index].items() if each.state and key not in used]
        for role, name in unused:
            kind = self._saved[context.index][role, name].kind
            self.mismatch.unexpected.append(f"the state of {kind}, which was {ROLES[role]}{name}{context.of_optimizer}")

    def state_dict(self) -> dict[str, Any]:
        """Return all states by role, number of the optimizer, and name."""
        states: dict[str, Any] = {}
        for role in ROLES:
            states[role] = {
                index: {name: each.dump() for (of, name), each in by_key.items() if of == role}
                # before the first attach, what was loaded is passed on
                for index, by_key in (self._live or self._saved).items()
            }
        return states


def _pairs(fresh: Mapping[LimitKey, NamedLimitState], known: Mapping[LimitKey, NamedLimitState]) -> dict[LimitKey, LimitKey]:
    """Return the known state from which each limit goes on: one of its kind, and each for one limit only.

    The names of limits tell less than their blocks: rules without a name are named by their place, and may have changed places, a
    shadow may have become a rule. Equal blocks come first, whatever the names; then equal names; then the blocks that have most in
    common.

    Args:
        fresh: States before the first step.
        known: States of a checkpoint.

    Returns:
        Keys in ``known`` by keys in ``fresh``; limits without a state to go on from are left out.
    """
    ranked = []
    for key, each in fresh.items():
        for other, source in known.items():
            alike = similarity(each, source)
            is_named, are_placed = key == other and not _is_placed(key), _is_placed(key) and _is_placed(other)
            # with names that differ, a part of the blocks is no evidence
            if alike and (is_named or are_placed or not carry_over(each, [source]).missing_blocks):
                ranked.append(((alike == 1.0, is_named, are_placed, alike, key == other), key, other))
    pairs: dict[LimitKey, LimitKey] = {}
    for _, key, other in sorted(ranked, key=itemgetter(0), reverse=True):
        if key not in pairs and other not in pairs.values():
            pairs[key] = other
    return pairs


def _is_placed(key: LimitKey) -> bool:
    """Return whether a limit is that of a rule without a name of its own."""
    role, name = key
    return role == "limits" and re.fullmatch(r"rule_\d+", name) is not None
