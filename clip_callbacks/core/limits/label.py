"""Names of limits: labels on dashboards, and kinds in checkpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from clip_callbacks.core.limits.base import Limit
from clip_callbacks.core.limits.fixed import FixedLimit
from clip_callbacks.core.limits.robust_zscore import RobustZScoreLimit
from clip_callbacks.core.limits.tightest import TightestLimit


def label(limit: Limit) -> str:
    """Return the class of a limit and its arguments other than defaults, in characters that every logger accepts.

    It is the name of a shadow in metrics, so that it may not change between versions.

    Example::

        >>> from clip_callbacks.core.limits import QuantileLimit
        >>> label(FixedLimit(0.5)), label(QuantileLimit(0.9, window=1000))
        ('FixedLimit-0.5', 'QuantileLimit-quantile_0.9')
    """
    if isinstance(limit, FixedLimit):
        options = [_text(limit.max_norm)]
    elif isinstance(limit, TightestLimit):
        options = [_text(member) for member in limit.members]
    else:
        # Without defaults, so that an argument that is added later, with a default, leaves old names alone.
        options = [_option(limit, field) for field in _fields(limit) if _is_set(limit, field)]
    # a slash would begin a folder of metrics, and some loggers refuse commas and brackets
    return re.sub(r"[^\w.-]", "_", "-".join([type(limit).__name__, *options]))


def labels(limits: Sequence[Limit]) -> list[str]:
    """Return a label for each limit; one that another limit has before it gets its position, from 1, at the end."""
    each = [label(limit) for limit in limits]
    return [name if each.index(name) == position else f"{name}-{position + 1}" for position, name in enumerate(each)]


def _fields(limit: object) -> tuple[Field[Any], ...]:
    if is_dataclass(limit):
        return fields(limit)
    return ()


def _is_set(limit: Limit, field: Field[Any]) -> bool:
    return field.default is MISSING or getattr(limit, field.name) != field.default


def _option(limit: Limit, field: Field[Any]) -> str:
    return f"{field.name}_{_text(getattr(limit, field.name))}"


def _text(value: object) -> str:
    if isinstance(value, Limit):
        return label(value)
    # `g` writes 1.0 as 1: both spellings of a number make one label
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def kind(limit: Limit) -> str:
    """Return the classes of a limit and of the limits in it, without their numbers: limits of one kind can exchange states.

    Example::

        >>> from clip_callbacks.core.limits import TightestLimit, ZScoreLimit
        >>> kind(TightestLimit(ZScoreLimit(3.0), 1.0))
        'TightestLimit(ZScoreLimit, FixedLimit)'
    """
    if isinstance(limit, RobustZScoreLimit) and limit.scale != "log":
        # its window holds values in place of logarithms, which the other scale must not continue
        return f"{type(limit).__name__}({limit.scale})"
    inner = [getattr(limit, field.name) for field in _fields(limit)]
    if isinstance(limit, TightestLimit):
        inner = [*limit.members]
    nested = [kind(each) for each in inner if isinstance(each, Limit)]
    if not nested:
        return type(limit).__name__
    return f"{type(limit).__name__}({', '.join(nested)})"
