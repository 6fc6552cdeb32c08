"""Checks of arguments, and the wording of their errors."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, TypeVar

Choice = TypeVar("Choice", bound=str)


def number_above_zero(number: object) -> float | None:
    """Convert a number, or its text in a configuration file, to a float; None if it is not a number above 0."""
    # Text is admitted because PyYAML reads `1e-3` as a string. True is an int to Python, and no limit.
    if not isinstance(number, (float, int, str, Real)) or isinstance(number, bool):
        return None
    try:
        found = float(number)
    except (ValueError, OverflowError):  # the latter for an int beyond float64
        return None
    # NaN fails the comparison
    return found if found > 0 else None


def as_norm_type(norm_type: float | Literal["inf"]) -> float:
    """Check the order of a norm.

    Raises:
        ValueError: If it is not above 0; ``"inf"`` is the maximum norm.
    """
    if (order := number_above_zero(norm_type)) is not None:
        return order
    raise ValueError(f'`norm_type` must be a number above 0 or "inf", got {norm_type!r}. 2 is the usual choice.')


def as_max_norm(max_norm: object, argument: str = "max_norm", alternatives: str = "") -> float:
    """Check a limit given as a number.

    Args:
        max_norm: The value of the argument.
        argument: The name of the argument, for the error.
        alternatives: Other values that the argument accepts, for the error: " or a Limit".

    Raises:
        ValueError: If it is not a number above 0.
    """
    if (number := number_above_zero(max_norm)) is not None:
        return number
    # other arguments have other usual values
    typical = " Typical thresholds lie between 0.1 and 10." if argument == "max_norm" else ""
    raise ValueError(f"`{argument}` must be a number above 0{alternatives}, got {max_norm!r}.{typical}")


def as_finite(
    number: object, argument: str, *, low: float = 0.0, high: float = math.inf, low_too: bool = False, high_too: bool = False
) -> float:
    """Check a number in an interval.

    Args:
        number: The value of the argument.
        argument: The name of the argument, for the error.
        low: The lower end of the interval.
        high: The upper end of the interval.
        low_too: If True, the lower end is allowed.
        high_too: If True, the upper end is allowed.

    Raises:
        ValueError: If it is not a number, or lies outside.
    """
    try:
        # NaN lies in no interval: it stands for all that is no number, and takes the way of the error below
        found = math.nan if isinstance(number, bool) else float(number)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if low < found < high or (low_too and found == low) or (high_too and found == high):
        return found
    if low == -math.inf and high == math.inf:
        raise ValueError(f"`{argument}` must be a finite number, got {number!r}.")
    if high_too:
        raise ValueError(f"`{argument}` must be above {low:g} and at most {high:g}, got {number!r}.")
    lower = f"of at least {low:g}" if low_too else f"above {low:g}"
    upper = "finite" if math.isinf(high) else f"below {high:g}"
    raise ValueError(f"`{argument}` must be a number {lower} and {upper}, got {number!r}.")


def as_count(number: object, argument: str, *, least: int) -> int:
    """Check a count.

    Raises:
        ValueError: If it is not a whole number of at least ``least``. True and False are not numbers.
    """
    if isinstance(number, int) and not isinstance(number, bool) and number >= least:
        return number
    raise ValueError(f"`{argument}` must be a whole number of at least {least}, got {number!r}.")


def as_count_or_none(number: object, argument: str, *, least: int, none: str = "or None") -> int | None:
    """Check a count that may be None.

    Args:
        number: The value of the argument.
        argument: The name of the argument, for the error.
        least: The smallest count that is allowed.
        none: The meaning of None, for the error.

    Raises:
        ValueError: If it is neither None nor a whole number of at least ``least``.
    """
    if number is None:
        return None
    try:
        return as_count(number, argument, least=least)
    except ValueError:
        # the inner error does not mention None, so that it is not shown
        raise ValueError(f"`{argument}` must be a whole number of at least {least}, {none}, got {number!r}.") from None


def as_choice(value: object, argument: str, choices: tuple[Choice, ...]) -> Choice:
    """Check a choice among several words.

    Raises:
        ValueError: If there is no such choice; it lists them.
    """
    for choice in choices:
        # the choice is returned, not the value, which may be an equal member of a user's enumeration
        if value == choice:
            return choice
    raise ValueError(f"`{argument}` must be one of {', '.join(choices)}, got {value!r}.")


def as_flag(value: object, argument: str) -> bool:
    """Check a choice between True and False.

    Raises:
        ValueError: If it is another value, such as a word, which Python would take for True.
    """
    if not isinstance(value, int) or value not in {0, 1}:
        raise ValueError(f"`{argument}` must be True or False, got {value!r}.")
    return bool(value)
