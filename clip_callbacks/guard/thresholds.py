"""The norm above which a finite step is a spike, and what its limit remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clip_callbacks.core.limit_state import NamedLimitState, carry_over
from clip_callbacks.core.limits import Limit
from clip_callbacks.core.rules import ClipRule, ClipState
from clip_callbacks.trainer.optimizer_context import OptimizerContext


class SkipThresholds:
    """The limit ``skip_above`` of each optimizer.

    Args:
        limit: The limit; None if there is none.
        saved: Its states in a checkpoint, by the optimizer's number.
    """

    def __init__(self, limit: Limit | None, saved: Mapping[int, Any]) -> None:
        self.limit = limit
        self._states = {int(index): NamedLimitState.load(each) for index, each in saved.items()}

    def attach(self, contexts: Sequence[OptimizerContext], *, renewed: bool) -> None:
        """Have a state for each optimizer.

        Args:
            contexts: The optimizers.
            renewed: Whether they took on other parameters in the middle of a fit.

        Raises:
            ValueError: If a checkpoint's state is that of another limit.
        """
        if self.limit is None:
            return
        for context in contexts:
            fresh, known = NamedLimitState.fresh(ClipRule(self.limit), context.table), self._states.get(context.index)
            self._states[context.index] = carry_over(fresh, [known], "NonFiniteGuard's skip_above", strict=not renewed)

    def limit_states(self, index: int) -> ClipState:
        """The state for an optimizer, in a tuple; empty without a limit."""
        if self.limit is None:
            return ()
        return (self._states[index].state,)

    def save_limit_states(self, index: int, states: ClipState) -> None:
        """Keep the state for the next step."""
        for state in states:
            self._states[index].state = state

    def state_dict(self) -> dict[int, Any]:
        """All states, for a checkpoint."""
        return {index: state.dump() for index, state in self._states.items()}
