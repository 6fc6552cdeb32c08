"""Docstrings that a stranger reads once: what holds for all of them."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.pytorch import Callback

import clip_callbacks

PACKAGE = Path(clip_callbacks.__file__).parent
RIDDLES = ("Of", "The same", "What", "Whether")
"""Beginnings after which a description makes sense to its author only: it needs a head noun, or a condition."""
CALLBACKS = [
    kind for name in clip_callbacks.__all__ if inspect.isclass(kind := getattr(clip_callbacks, name)) and issubclass(kind, Callback)
]


def described(docstring: str) -> Iterator[tuple[str, str]]:
    """Name and description of each parameter and attribute, in sections of Google's style."""
    for section in re.finditer(r"^(?:Args|Attributes):\n((?:(?:    .*)?\n)*)", docstring + "\n", re.MULTILINE):
        for entry in re.finditer(r"^    (\S[^:\n]*): (.+)", section[1], re.MULTILINE):
            yield entry[1], entry[2]


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
            yield node.name, text


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_descriptions_of_parameters_begin_with_what_they_are():
    entries = [
        (path.relative_to(PACKAGE).as_posix(), owner, name, text)
        for path in MODULES
        for owner, docstring in docstrings(path)
        for name, text in described(docstring)
    ]
    assert len(entries) > 500
    assert [entry for entry in entries if re.match(rf"(?:{'|'.join(RIDDLES)})\b", entry[-1])] == []


@pytest.mark.parametrize("kind", CALLBACKS, ids=lambda kind: kind.__name__)
def test_a_callback_opens_with_what_it_does(kind):
    """A sentence with a verb in the third person: "Clips …", "Keeps …"."""
    summary = inspect.getdoc(kind).partition("\n\n")[0]
    assert re.match(r"[A-Z][a-z]+s\b.*\.$", summary.replace("\n", " ")), summary
    assert summary.split()[0].lower() not in {"this", "is", "has", "does", "callbacks"}


@pytest.mark.parametrize("text", ["Of one step.", "Whether it is on.", "What is kept.", "The same as above."])
def test_a_riddle_is_found(text):
    [(_, description)] = described(f"Do it.\n\nArgs:\n    value: {text}\n\nReturns:\n    other: fine")
    assert re.match(rf"(?:{'|'.join(RIDDLES)})\b", description)
