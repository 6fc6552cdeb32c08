"""States of all limits of one fit: over its steps, changes of an optimizer, and runs with other options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from clip_callbacks.core.limit_state import CarriedState, NamedLimitState, StateMismatch, carry_over
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
        carried = {key: carry_over(each, list(self._sources(context.index, key))) for key, each in fresh.items()}
        # Once, at the start: in the middle of a fit no state is missing because of other options.
        if not renewed and context.index in self._saved:
            unused = self._carry_over_renamed(context.index, fresh, carried)
            self._report(context, carried, unused)
        # The clipper gets these objects themselves, and replaces their `state` at each step.
        self._live[context.index] = {key: each.state for key, each in carried.items()}
        return list(self._live[context.index].values())

    def _sources(self, index: int, key: LimitKey) -> Iterator[NamedLimitState]:
        """Yield the known states of a limit, the preferred ones first.

        Last come those of other optimizers, which may have held the parameters before: only of blocks with names of their own.
        """
        # this fit before the checkpoint, whose states are older
        for source in (self._live, self._saved):
            if key in source.get(index, {}):
                yield source[index][key]
        for other, states in self._saved.items():
            # global and numbered group blocks of another optimizer are about other parameters
            if other != index and key in states and states[key].members is None:
                yield states[key]

    def _carry_over_renamed(
        self, index: int, fresh: Mapping[LimitKey, NamedLimitState], carried: dict[LimitKey, CarriedState]
    ) -> list[LimitKey]:
        """Give each limit without a saved state of its name one of its kind and blocks that no other limit uses.

        So a shadow may become a rule, and rules that are named by their place may change places, and keep their states.

        Args:
            index: Number of the optimizer.
            fresh: States before the first step.
            carried: States carried over by name; entries of other names are added.

        Returns:
            Keys of the saved states that remain unused.
        """
        known = self._saved[index]
        unused = [key for key, each in known.items() if each.state and not (key in carried and carried[key].is_carried)]
        for key, each in fresh.items():
            if carried[key].is_carried or not each.state:
                continue
            for other in unused:
                found = carry_over(each, [known[other]])
                # all blocks or none: with names of limits that differ, a part of the blocks is no evidence
                if not found.missing_blocks:
                    carried[key] = found
                    unused.remove(other)
                    break
        return unused

    def _report(self, context: OptimizerContext, carried: Mapping[LimitKey, CarriedState], unused: list[LimitKey]) -> None:
        for (role, name), each in carried.items():
            each.report_missing(f"{ROLES[role]}{name}{context.of_optimizer}", self.mismatch)
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
