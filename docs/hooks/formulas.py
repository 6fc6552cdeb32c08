"""Formulas as MathML, which browsers draw by themselves: no script, and nothing from elsewhere."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def inline(formula: str) -> str:
    """A formula within a line."""
    return _drawn(formula, "inline")


def block(formula: str) -> str:
    """A formula on its own; long ones scroll on a phone."""
    return f'<div class="formula">{_drawn(formula, "block")}</div>'


def fence(source: str, *_: Any, **__: Any) -> str:
    """A block fenced with ``math``, which GitHub draws too."""
    return block(source)


def _drawn(formula: str, display: str) -> str:
    """MathML; the converter takes an escaped underscore in text for two characters, and knows no small ``bigl``."""
    return str(convert(formula.strip().replace(r"\_", "_").replace(r"\bigl", "").replace(r"\bigr", ""), display=display))
