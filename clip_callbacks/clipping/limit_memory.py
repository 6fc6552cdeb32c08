"""What the limits of rules and shadows remember: over steps, changes of an optimizer, and runs with other options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from clip_callbacks.core.limit_state import Carried, Misfits, NamedLimitState, carry_over
from clip_callbacks.core.rules import ClipRule
from clip_callbacks.trainer.optimizer_context import OptimizerContext

Key: TypeAlias = tuple[str, str]
"""Whether it is one of "limits", those of rules, or one of "shadows"; and its name."""
KINDS = {"limits": "the limit of ", "shadows": "shadow "}
"""What they are called in words."""


class LimitMemory:
    """The states of all limits that a GradientClipping has, by the number of the optimizer.

    Args:
        saved: What :meth:`state_dict` returned, in a checkpoint; empty at the beginning of a run.

    Attributes:
        misfits: What of the checkpoint does not fit the rules and shadows of now.
    """

    def __init__(self, saved: Mapping[str, Any]) -> None:
        self._live: dict[int, dict[Key, NamedLimitState]] = {}
        self._saved: dict[int, dict[Key, NamedLimitState]] = {}
        self.misfits = Misfits()
        for sort in KINDS:
            for index, by_name in saved.get(sort, {}).items():
                known = self._saved.setdefault(int(index), {})
                known |= {(sort, name): NamedLimitState.load(each) for name, each in by_name.items()}

    def attach(
        self, context: OptimizerContext, rules: Mapping[str, ClipRule], shadows: Mapping[str, ClipRule], *, renewed: bool
    ) -> list[NamedLimitState]:
        """Have a state for each limit of an optimizer, and return them: of the rules, then of the shadows.

        Args:
            context: The optimizer.
            rules: Its rules, by name.
            shadows: Its shadows, by name.
            renewed: Whether it took on other parameters in the middle of a fit.
        """
        wanted = {("limits", name): rule for name, rule in rules.items()}
        wanted |= {("shadows", name): rule for name, rule in shadows.items()}
        fresh = {key: NamedLimitState.fresh(rule, context.table) for key, rule in wanted.items()}
        carried = {key: carry_over(each, list(self._known(context.index, key))) for key, each in fresh.items()}
        if not renewed and context.index in self._saved:
            left = self._take_up_others(context.index, fresh, carried)
            self._tell(context, carried, left)
        self._live[context.index] = {key: each.state for key, each in carried.items()}
        return list(self._live[context.index].values())

    def _known(self, index: int, key: Key) -> Iterator[NamedLimitState]:
        """What is known of a limit, the best first; of other optimizers, which may have held its parameters, blocks with names."""
        for source in (self._live, self._saved):
            if key in source.get(index, {}):
                yield source[index][key]
        for other, states in self._saved.items():
            if other != index and key in states and states[key].members is None:
                yield states[key]

    def _take_up_others(self, index: int, fresh: Mapping[Key, NamedLimitState], carried: dict[Key, Carried]) -> list[Key]:
        """Let limits of which nothing is known by their name go on with what one like them knows of the same blocks.

        So a shadow becomes a rule, and rules without names change places.

        Returns:
            What nobody goes on with.
        """
        known = self._saved[index]
        left = [key for key, each in known.items() if each.state and not (key in carried and carried[key].is_known)]
        for key, each in fresh.items():
            if carried[key].is_known or not each.state:
                continue
            for other in left:
                found = carry_over(each, [known[other]])
                if not found.unknown:
                    carried[key] = found
                    left.remove(other)
                    break
        return left

    def _tell(self, context: OptimizerContext, carried: Mapping[Key, Carried], left: list[Key]) -> None:
        for (sort, name), each in carried.items():
            each.told(f"{KINDS[sort]}{name}{context.of_optimizer}", self.misfits)
        for sort, name in left:
            limit = self._saved[context.index][sort, name].kind
            self.misfits.forgotten.append(f"what {limit} knew as {KINDS[sort]}{name}{context.of_optimizer}")

    def state_dict(self) -> dict[str, Any]:
        """All states, by sort, by the number of the optimizer and by name."""
        states: dict[str, Any] = {}
        for sort in KINDS:
            states[sort] = {
                index: {name: each.dump() for (of, name), each in by_key.items() if of == sort}
                for index, by_key in (self._live or self._saved).items()
            }
        return states
