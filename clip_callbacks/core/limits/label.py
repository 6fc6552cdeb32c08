"""What a limit is called on a dashboard."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from clip_callbacks.core.limits.base import Limit
from clip_callbacks.core.limits.fixed import FixedLimit
from clip_callbacks.core.limits.tightest import TightestLimit


def label(limit: Limit) -> str:
    """The class and whatever differs from its defaults, of characters that every logger takes.

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
        options = [_option(limit, field) for field in fields(limit) if _is_set(limit, field)] if is_dataclass(limit) else []
    return re.sub(r"[^\w.-]", "_", "-".join([type(limit).__name__, *options]))


def labels(limits: Sequence[Limit]) -> list[str]:
    """A label for each, those that would be the same told apart by their numbers."""
    each = [label(limit) for limit in limits]
    return [name if each.index(name) == place else f"{name}-{place + 1}" for place, name in enumerate(each)]


def _is_set(limit: Limit, field: Field[Any]) -> bool:
    return field.default is MISSING or getattr(limit, field.name) != field.default


def _option(limit: Limit, field: Field[Any]) -> str:
    return f"{field.name}_{_text(getattr(limit, field.name))}"


def _text(value: object) -> str:
    if isinstance(value, Limit):
        return label(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def kind(limit: Limit) -> str:
    """What sort of limit it is, whatever its numbers: what its state may be taken for.

    Example::

        >>> from clip_callbacks.core.limits import TightestLimit, ZScoreLimit
        >>> kind(TightestLimit(ZScoreLimit(3.0), 1.0))
        'TightestLimit(ZScoreLimit, FixedLimit)'
    """
    if isinstance(limit, TightestLimit):
        inner = limit.members
    else:
        inner = tuple(getattr(limit, field.name) for field in fields(limit)) if is_dataclass(limit) else ()
    nested = [kind(each) for each in inner if isinstance(each, Limit)]
    return f"{type(limit).__name__}({', '.join(nested)})" if nested else type(limit).__name__
