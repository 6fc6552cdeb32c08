"""Formulas as MathML, which browsers draw by themselves: no script, and nothing from elsewhere."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def inline(formula: str) -> str:
    """A formula within a line."""
    return str(convert(formula.strip()))


def block(formula: str) -> str:
    """A formula on its own; long ones scroll on a phone."""
    return f'<div class="formula">{convert(formula.strip(), display="block")}</div>'


def fence(source: str, *_: Any, **__: Any) -> str:
    """A block fenced with ``math``, which GitHub draws too."""
    return block(source)
