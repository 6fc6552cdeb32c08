"""The norm above which a finite step is a spike, and what its limit remembers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from clip_callbacks.core.limit_state import Misfits, NamedLimitState, carry_over
from clip_callbacks.core.limits import Limit
from clip_callbacks.core.rules import ClipRule, ClipState
from clip_callbacks.trainer.optimizer_context import OptimizerContext


class SkipThresholds:
    """The limit ``skip_above`` of each optimizer.

    Args:
        limit: The limit; None if there is none.
        saved: Its states in a checkpoint, by the optimizer's number.

    Attributes:
        misfits: What of the checkpoint does not fit the limit of now.
    """

    def __init__(self, limit: Limit | None, saved: Mapping[int, Any]) -> None:
        self.limit = limit
        self.misfits = Misfits()
        self._states = {int(index): NamedLimitState.load(each) for index, each in saved.items()}

    def attach(self, contexts: Sequence[OptimizerContext], *, renewed: bool, resumed: Collection[int]) -> None:
        """Have a state for each optimizer.

        Args:
            contexts: The optimizers.
            renewed: Whether they took on other parameters in the middle of a fit.
            resumed: The numbers of the optimizers of whose steps a checkpoint knows.
        """
        before, self._states = self._states, {}
        for context in contexts:
            known, whose = before.get(context.index), f"skip_above{context.of_optimizer}"
            carried = None
            if self.limit is not None:
                carried = carry_over(NamedLimitState.fresh(ClipRule(self.limit), context.table), [known])
                self._states[context.index] = carried.state
                if context.index in resumed:
                    carried.told(whose, self.misfits)
            is_used = carried is not None and carried.state.state and not carried.unknown
            if known is not None and known.state and not is_used and not renewed:
                self.misfits.forgotten.append(f"what {known.kind} knew as {whose}")

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
