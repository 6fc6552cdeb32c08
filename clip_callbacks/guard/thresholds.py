"""The thresholds above which a finite step is a spike, and the states of their limits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from clip_callbacks.core.limit_state import NamedLimitState, StateMismatch, carry_over, save_states
from clip_callbacks.core.limits import Limit, MaxNorm, of_one
from clip_callbacks.core.rules import ClipRule, ClipState, SpikeLimits
from clip_callbacks.trainer.optimizer_context import OptimizerContext


class SpikeThreshold:
    """A limit above which a step is a spike, with a state for each optimizer.

    Args:
        name: Name of the guard's argument, ``skip_above`` or ``loss_above``.
        limit: The limit; None if there is none.
        saved: States from a checkpoint, by the optimizer's index.
        is_of_losses: If True, the limit is one of losses; else of norms.

    Attributes:
        mismatch: Parts of the checkpoint that do not fit the present limit.
    """

    def __init__(self, name: str, limit: MaxNorm, saved: Mapping[int, Any], *, is_of_losses: bool = False) -> None:
        self.name = name
        self._is_of_losses = is_of_losses
        self.limit = limit
        self.mismatch = StateMismatch()
        self._states = {int(index): NamedLimitState.load(each) for index, each in saved.items()}

    def attach(self, contexts: Sequence[OptimizerContext], *, renewed: bool, resumed: Collection[int]) -> None:
        """Prepare a state for each optimizer.

        Args:
            contexts: One context for each optimizer.
            renewed: If True, optimizers took up other parameters in the middle of a fit.
            resumed: Indices of the optimizers that a checkpoint has counts of.
        """
        # A state whose optimizer or limit is gone is left behind.
        before, self._states = self._states, {}
        for context in contexts:
            known, whose = before.get(context.index), f"{self.name}{context.of_optimizer}"
            carried = None
            if self.limit is not None:
                carried = carry_over(self._fresh(context), [known])
                self._states[context.index] = self._in_numbers(carried.state)
                if context.index in resumed:
                    carried.report_missing(whose, self.mismatch)
            # Within one fit blocks come and go with their parameters: only what a checkpoint brings and nobody takes is a mismatch.
            is_used = carried is not None and carried.state.state and not carried.missing_blocks
            if known is not None and known.state and not is_used and not renewed:
                self.mismatch.unexpected.append(f"the state of {known.kind}, which was {whose}")

    def _fresh(self, context: OptimizerContext) -> NamedLimitState:
        fresh = NamedLimitState.fresh(ClipRule(self.limit), context.table)
        if self._is_of_losses and fresh.state:
            # a loss is of no parameter: its state goes on whatever parameters the optimizer holds, and whatever their names
            return replace(fresh, names=("loss",), members=None)
        return fresh

    def _in_numbers(self, named: NamedLimitState) -> NamedLimitState:
        """Return the state in the form that a step on the host is fastest with, if the limit has one."""
        state = named.tensors
        numbers = of_one(self.limit, state) if state and isinstance(self.limit, Limit) else None
        return named if numbers is None else replace(named, state=numbers)

    def held(self, index: int) -> NamedLimitState:
        """Return what holds the state of an optimizer until the next call of :meth:`attach`."""
        return self._states[index]

    def state_dict(self) -> dict[int, Any]:
        """Return all states, for a checkpoint."""
        return {index: state.dump() for index, state in self._states.items()}


class SpikeThresholds:
    """Both thresholds of a guard, in the order of a plan.

    Args:
        limits: The limits.
        saved: State of the guard from a checkpoint.
    """

    def __init__(self, limits: SpikeLimits, saved: Mapping[str, Any]) -> None:
        self._each = [
            SpikeThreshold("skip_above", limits.skip_above, saved.get("skip_above", {})),
            SpikeThreshold("loss_above", limits.loss_above, saved.get("loss_above", {}), is_of_losses=True),
        ]
        self._held: dict[int, list[NamedLimitState]] = {}

    @property
    def mismatch(self) -> StateMismatch:
        """Parts of the checkpoint that do not fit the present limits."""
        mismatch = StateMismatch()
        for threshold in self._each:
            mismatch.add(threshold.mismatch)
        return mismatch

    def attach(self, contexts: Sequence[OptimizerContext], *, renewed: bool, resumed: Collection[int]) -> None:
        """Prepare the states for each optimizer, as :meth:`SpikeThreshold.attach` does."""
        for threshold in self._each:
            threshold.attach(contexts, renewed=renewed, resumed=resumed)
        limited = [threshold for threshold in self._each if threshold.limit is not None]
        self._held = {context.index: [threshold.held(context.index) for threshold in limited] for context in contexts}

    def limit_states(self, index: int) -> ClipState:
        """Return the states of an optimizer, of those thresholds that have a limit."""
        return tuple([held.state for held in self._held[index]])

    def save_limit_states(self, index: int, states: ClipState) -> None:
        """Store the states for the next step."""
        save_states(self._held[index], states)

    def state_dict(self) -> dict[str, Any]:
        """Return all states, for a checkpoint."""
        return {threshold.name: threshold.state_dict() for threshold in self._each}
