"""What a checkpoint knows, made to fit the fit that goes on from it: whose optimizers and options may be others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from clip_callbacks.core.limit_state import Misfits
from clip_callbacks.stats.norm_history import RunHistory
from clip_callbacks.stats.sketch import NormSketch

State: TypeAlias = Mapping[str, Any]
"""What a callback's ``state_dict`` returned."""

OF_NORMS = ("limits", "shadows", "skip_above", "norms", "blocks")
"""What of a state was learned from norms, and means nothing where norms are of another order."""

NAMED = ("limits", "shadows")
"""What is known of blocks by their names, also where another optimizer holds them."""


DAMAGED = 'The checkpoint is damaged: resume from another one, or remove the state from checkpoint["callbacks"].'


@contextmanager
def reading(whose: str) -> Iterator[None]:
    """Refuse a state that cannot be read.

    Args:
        whose: Whose state it is.

    Raises:
        ValueError: It names what is wrong.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the checkpoint's state of {whose} must be what its state_dict() returned, got one that cannot be read "
            f"({type(error).__name__}: {error}). {DAMAGED}"
        ) from error


def check_histories(state: State) -> None:
    """Read for trial what a state knows of the optimizers.

    Raises:
        LookupError, TypeError, ValueError: If it is damaged.
    """
    for index, history in state["history"].items():
        int(index)
        RunHistory().load_state_dict(history)


def is_gradient_callback_state(state: object) -> bool:
    """Whether a callback's state in a checkpoint is one of a gradient callback, by what it holds."""
    return isinstance(state, Mapping) and isinstance(state.get("history"), Mapping)


def bad_step_counts(states: Iterable[State]) -> State:
    """The state of the guard that has counted, among states of callbacks; empty if none has."""
    guards = [state if "counters" in state else state.get("guard", {}) for state in states]
    return next((guard for guard in guards if guard.get("counters")), {})


class Resumption:
    """Fits what was saved to the optimizers and the order of norms of now.

    Optimizers are known by the names of the parameters that they hold. Where a checkpoint does not know their names, or no name is
    the same, they are known by their numbers, if they are as many as before.

    Args:
        states: What is known, of callbacks that are there and of others.
        names: The names of the parameters that each optimizer holds now.
        norm_type: The order of norms now.

    Attributes:
        misfits: What does not fit.
        is_known: Whether anything is known of optimizers: before the first fit a state holds nothing.
    """

    def __init__(self, states: Sequence[State], names: Mapping[int, Sequence[str]], norm_type: float) -> None:
        self.misfits = Misfits()
        histories = {int(index): history for state in reversed(states) for index, history in state.get("history", {}).items()}
        before = {index: histories.get(index, {}).get("parameters", ()) for index in sorted(_numbers_in(states))}
        self._numbers = _counterparts(before, names)
        self.is_known = bool(before)
        orders = {history.get("norm_type", norm_type) for history in histories.values()} - {norm_type}
        self._has_other_norms = bool(orders)
        if orders:
            self.misfits.forgotten.append(f"what was learned from norms of order {orders.pop():g} instead of {norm_type:g}")
        if self.is_known:
            gone, new = before.keys() - self._numbers.values(), names.keys() - self._numbers.keys()
            self.misfits.forgotten += [_named(index, before[index]) for index in sorted(gone)]
            self.misfits.anew += [_named(index, names[index]) for index in sorted(new)]

    def fitted(self, state: State) -> dict[str, Any]:
        """A state with the numbers that the optimizers have now, without what does not fit."""
        if not self.is_known:
            return dict(state)
        fitted = {key: self._renumbered(value, keeps_others=key in NAMED) for key, value in state.items()}
        if "guard" in fitted:
            fitted["guard"] = self.fitted(fitted["guard"])
        if self._has_other_norms:
            fitted |= {key: {} for key in OF_NORMS if key in fitted}
            if "history" in fitted:
                fitted["history"] = {index: _without_norms(history) for index, history in fitted["history"].items()}
        return fitted

    def _renumbered(self, value: Any, *, keeps_others: bool) -> Any:
        """What is kept for each optimizer is under its number, whatever it is.

        Args:
            value: Anything in a state.
            keeps_others: Whether to keep, under numbers that no optimizer has, what belongs to optimizers that are gone.
        """
        if not _is_by_number(value):
            return value
        by_number = {int(key): each for key, each in value.items()}
        renumbered = {now: by_number[before] for now, before in self._numbers.items() if before in by_number}
        if keeps_others:
            renumbered |= {-1 - key: each for key, each in by_number.items() if key not in self._numbers.values()}
        return renumbered


def _is_by_number(value: Any) -> bool:
    """Whether a value of a state is what is kept for each optimizer, under its number."""
    return isinstance(value, Mapping) and bool(value) and all(str(key).isdecimal() for key in value)


def _numbers_in(states: Iterable[State]) -> set[int]:
    """The numbers of all optimizers of which states know anything."""
    each = [value for state in states for value in (*state.values(), *state.get("guard", {}).values())]
    return {int(key) for value in each if _is_by_number(value) for key in value}


def _counterparts(before: Mapping[int, Sequence[str]], now: Mapping[int, Sequence[str]]) -> dict[int, int]:
    """For each optimizer of now its number in a checkpoint, if it was there: those with the most parameters in common first."""
    held = {index: set(names) for index, names in before.items()}
    common = [(len(held[old] & set(names)), new == old, -new, -old) for new, names in now.items() for old in held]
    pairs: dict[int, int] = {}
    for count, _, new, old in sorted(common, reverse=True):
        if count and -new not in pairs and -old not in pairs.values():
            pairs[-new] = -old
    for new in now.keys() - pairs.keys():
        is_by_number = new in held and new not in pairs.values()
        if is_by_number and (not held[new] or len(now) == len(held)):
            pairs[new] = new
    return dict(sorted(pairs.items()))


def _without_norms(history: Mapping[str, Any]) -> dict[str, Any]:
    return {**history, "norms": torch.empty(0, dtype=torch.float64), "run_norms": NormSketch().state()}


def _named(index: int, names: Sequence[str]) -> str:
    if not names:
        return f"optimizer {index}"
    return f"optimizer {index}, of {len(names)} parameters with {names[0]}"


def warn_of(misfits: Misfits) -> None:
    """Say in one warning what of a checkpoint does not fit the options of now."""
    told = [("Begins anew", misfits.anew), ("Is forgotten", misfits.forgotten)]
    parts = [f"{what}: {'; '.join(dict.fromkeys(each))}." for what, each in told if each]
    if parts:
        rank_zero_warn(
            f"The checkpoint was saved with other options of the gradient callbacks. {' '.join(parts)} All else goes on.",
            stacklevel=2,
        )
