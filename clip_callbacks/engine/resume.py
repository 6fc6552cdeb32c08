"""Adaptation of checkpoint states to a resumed fit whose optimizers and options may differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from clip_callbacks.core.limit_state import StateMismatch
from clip_callbacks.stats.run_history import RunHistory
from clip_callbacks.stats.sketch import NormSketch

State: TypeAlias = Mapping[str, Any]
"""The state of a callback, as ``state_dict`` returned it."""

KEYS_LEARNED_FROM_NORMS = ("limits", "shadows", "skip_above", "norms", "blocks")
"""Keys of states that were learned from norms, and are discarded if norms have another order now."""

KEYS_BY_BLOCK_NAME = ("limits", "shadows")
"""Keys of states that are kept by the names of blocks, so that they follow a block to another optimizer."""

DAMAGED = 'The checkpoint is damaged: resume from another one, or remove the state from checkpoint["callbacks"].'


@contextmanager
def reading(whose: str) -> Iterator[None]:
    """Turn any error in reading a state into a ``ValueError`` that says what is wrong.

    Args:
        whose: The name of the callback whose state is read.

    Raises:
        ValueError: If the state cannot be read.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the checkpoint's state of {whose} must be what its state_dict() returned, got one that cannot be read "
            f"({type(error).__name__}: {error}). {DAMAGED}"
        ) from error


def check_histories(state: State) -> None:
    """Check that the histories in a state can be read.

    Raises:
        LookupError, TypeError, ValueError: If it is damaged.
    """
    for index, history in state["history"].items():
        int(index)
        RunHistory().load_state_dict(history)


def is_gradient_callback_state(state: object) -> bool:
    """Return whether a callback's state in a checkpoint is one of a gradient callback: each of these has histories."""
    return isinstance(state, Mapping) and isinstance(state.get("history"), Mapping)


def bad_step_counts(states: Iterable[State]) -> State:
    """Return the guard's state with counts among states of callbacks; empty if there is none."""
    guards = [state if "counters" in state else state.get("guard", {}) for state in states]
    return next((guard for guard in guards if guard.get("counters")), {})


class Resumption:
    """Adapts saved states to the present optimizers and the present order of norms.

    An optimizer is matched by the names of its parameters. If the checkpoint has no names, or no name agrees, it is matched by its
    number, provided that the number of optimizers is the same.

    Args:
        states: Saved states of gradient callbacks, including those of callbacks that are no longer there.
        names: Names of the parameters that each optimizer holds now, by the number of the optimizer.
        norm_type: Order of norms now.

    Attributes:
        mismatch: Descriptions of the states that do not fit, for a warning.
        is_known: True if the states hold anything about optimizers; before the first fit they do not.
    """

    def __init__(self, states: Sequence[State], names: Mapping[int, Sequence[str]], norm_type: float) -> None:
        self.mismatch = StateMismatch()
        # in reverse, so that the states of callbacks that are there win over those of callbacks that are gone
        histories = {int(index): history for state in reversed(states) for index, history in state.get("history", {}).items()}
        before = {index: histories.get(index, {}).get("parameters", ()) for index in sorted(_numbers_in(states))}
        self._numbers = _match_optimizers(before, names)
        self.is_known = bool(before)
        orders = {history.get("norm_type", norm_type) for history in histories.values()} - {norm_type}
        self._has_other_norms = bool(orders)
        if orders:
            discarded = f"all that was learned from norms of order {orders.pop():g}; they have order {norm_type:g} now"
            self.mismatch.unexpected.append(discarded)
        if self.is_known:
            gone, new = before.keys() - self._numbers.values(), names.keys() - self._numbers.keys()
            self.mismatch.unexpected += [_describe(index, before[index]) for index in sorted(gone)]
            self.mismatch.missing += [_describe(index, names[index]) for index in sorted(new)]

    def adapted(self, state: State) -> dict[str, Any]:
        """Return a state with the present numbers of optimizers, without the entries that do not fit."""
        if not self.is_known:
            return dict(state)
        adapted = {key: self._renumbered(value, keeps_others=key in KEYS_BY_BLOCK_NAME) for key, value in state.items()}
        if "guard" in adapted:
            adapted["guard"] = self.adapted(adapted["guard"])  # GradientClipping's own guard
        if self._has_other_norms:
            adapted |= {key: {} for key in KEYS_LEARNED_FROM_NORMS if key in adapted}
            if "history" in adapted:
                adapted["history"] = {index: _without_norms(history) for index, history in adapted["history"].items()}
        return adapted

    def _renumbered(self, value: Any, *, keeps_others: bool) -> Any:
        """Exchange the numbers of optimizers in an entry of a state.

        Args:
            value: The entry. It is returned as it is unless its keys are numbers of optimizers.
            keeps_others: If True, values of optimizers that are gone are kept, under negative numbers, which no optimizer has.
        """
        if not _is_by_number(value):
            return value
        by_number = {int(key): each for key, each in value.items()}
        renumbered = {now: by_number[before] for now, before in self._numbers.items() if before in by_number}
        if keeps_others:
            # limits look a block up by name in the states of all numbers: parameters may have moved to another optimizer
            renumbered |= {-1 - key: each for key, each in by_number.items() if key not in self._numbers.values()}
        return renumbered


def _is_by_number(value: Any) -> bool:
    """Return whether an entry of a state is a dictionary by the number of the optimizer."""
    return isinstance(value, Mapping) and bool(value) and all(str(key).isdecimal() for key in value)


def _numbers_in(states: Iterable[State]) -> set[int]:
    """Return the numbers of all optimizers in states."""
    each = [value for state in states for value in (*state.values(), *state.get("guard", {}).values())]
    return {int(key) for value in each if _is_by_number(value) for key in value}


def _match_optimizers(before: Mapping[int, Sequence[str]], now: Mapping[int, Sequence[str]]) -> dict[int, int]:
    """Return the number in the checkpoint for each present optimizer that was there.

    Args:
        before: Names of parameters by number, in the checkpoint.
        now: Names of parameters by number, in this fit.
    """
    held = {index: set(names) for index, names in before.items()}
    common = [(len(held[old] & set(names)), new == old, -new, -old) for new, names in now.items() for old in held]
    pairs: dict[int, int] = {}
    # greedily, the pair with the most parameters in common first; of equal ones that with equal, then with small numbers
    for count, _, new, old in sorted(common, reverse=True):
        if count and -new not in pairs and -old not in pairs.values():
            pairs[-new] = -old
    # those without a parameter in common by number, unless optimizers came or went: numbers mean others then
    for new in now.keys() - pairs.keys():
        is_by_number = new in held and new not in pairs.values()
        if is_by_number and (not held[new] or len(now) == len(held)):
            pairs[new] = new
    return dict(sorted(pairs.items()))


def _without_norms(history: Mapping[str, Any]) -> dict[str, Any]:
    return {**history, "norms": torch.empty(0, dtype=torch.float64, device="cpu"), "run_norms": NormSketch().state()}


def _describe(index: int, names: Sequence[str]) -> str:
    if not names:
        return f"optimizer {index}"
    count = f"{len(names)} parameter{'s' * (len(names) > 1)}"
    return f"optimizer {index} ({count}: {names[0]}{', ...' * (len(names) > 1)})"


def warn_about(mismatch: StateMismatch) -> None:
    """Warn once about the states in a checkpoint that do not fit the present options."""
    groups = [("Reset", mismatch.missing), ("Discarded", mismatch.unexpected)]
    parts = [f"{heading}: {'; '.join(dict.fromkeys(each))}." for heading, each in groups if each]
    if parts:
        rank_zero_warn(
            f"The checkpoint was saved with other options of the gradient callbacks. {' '.join(parts)} "
            "All other state is restored.",
            stacklevel=2,
        )
