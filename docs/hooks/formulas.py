"""Render formulas as MathML, which browsers draw without a script or a file from elsewhere."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def inline(formula: str) -> str:
    """Render a formula within a line."""
    return _rendered(formula, "inline")


def block(formula: str) -> str:
    """Render a formula as a block; a long one scrolls on a phone."""
    return f'<div class="formula">{_rendered(formula, "block")}</div>'


def fence(source: str, *_: Any, **__: Any) -> str:
    """Render a block fenced with ``math``, which GitHub draws too."""
    return block(source)


def _rendered(formula: str, display: str) -> str:
    """Convert to MathML. The converter reads an escaped underscore in text as two characters, and does not know ``bigl``."""
    return str(convert(formula.strip().replace(r"\_", "_").replace(r"\bigl", "").replace(r"\bigr", ""), display=display))
