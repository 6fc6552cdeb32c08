"""Translate the docstrings of the package, with formulas, references and examples in Sphinx's syntax, into Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

from docs.hooks.formulas import block, inline

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
_MATH = re.compile(r":math:`([^`]+)`")
_EQUATION = re.compile(r"^( *)\.\. math::(.*)\n((?:\1 +.*\n|\s*\n)*)", re.MULTILINE)


class Sphinx(griffe.Extension):
    """Translates each docstring when it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Translate the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """Return a docstring with formulas as MathML, references as plain names, and examples as a section."""
    text = _EQUATION.sub(_equation, docstring + "\n")
    text = _MATH.sub(lambda match: inline(match[1]), text)
    text = _ROLE.sub(_reference, text)
    return text.replace("Example::\n\n", "Examples:\n").rstrip()


def _equation(match: re.Match[str]) -> str:
    indent, first, rest = match.groups()
    html = block(f"{first} {textwrap.dedent(rest)}")
    return f"{indent}{html}\n\n"


def _reference(match: re.Match[str]) -> str:
    """Return the last part of a name that begins with ``~``, or the whole name."""
    is_short, name = match.groups()
    return f"`{name.rpartition('.')[2] if is_short else name}`"
