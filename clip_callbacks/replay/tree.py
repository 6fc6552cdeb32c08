"""The calls of modules as a tree: within each other as they were made, in the order of execution."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TextIO

from clip_callbacks.bundles.terminal import escaped
from clip_callbacks.replay.module_recorder import Call
from clip_callbacks.replay.ranges import Range
from clip_callbacks.replay.suspects import TITLES, Culprit

SMALL = 30
"""A tree of so many calls is shown whole."""
RUN = 5
"""More siblings alike than this are folded to the first, the last, and their count."""


@dataclass
class Node:
    """A line of the tree.

    Args:
        text: What it says.
        style: "guilty", "bad", "healthy" or "folded".
        children: Below it.
    """

    text: str
    style: str
    children: list[Node] = field(default_factory=list)


def make_tree(root: str, calls: Sequence[Call], culprits: Sequence[Culprit]) -> Node:
    """From calls to lines.

    Args:
        root: What stands at the top.
        calls: In the order in which they began.
        culprits: Those to mark.
    """
    below: dict[Call | None, list[Call]] = {}
    for call in calls:
        below.setdefault(call.parent, []).append(call)
    marks: dict[Call, list[str]] = {}
    for culprit in culprits:
        marks.setdefault(culprit.call, []).append(TITLES[culprit.guilt].lower())
    grower = _Grower(below, marks, is_small=len(calls) <= SMALL)
    return Node(root, "healthy", grower.grow(None))


@dataclass
class _Grower:
    below: dict[Call | None, list[Call]]
    marks: dict[Call, list[str]]
    is_small: bool

    def grow(self, parent: Call | None) -> list[Node]:
        nodes: list[Node] = []
        for condition, group in groupby(self.below.get(parent, []), self.condition):
            siblings = list(group)
            if self.is_small or condition == "guilty" or len(siblings) <= RUN:
                nodes += [self.node(call) for call in siblings]
                continue
            what = "healthy" if condition == "healthy" else "not finite either"
            folded = Node(f"… {len(siblings) - 2} more, {what}", "folded")
            nodes += [self.node(siblings[0]), folded, self.node(siblings[-1])]
        return nodes

    def condition(self, call: Call) -> str:
        """The worst of a call and of those in it."""
        conditions = {self.own(call), *(self.condition(inner) for inner in self.below.get(call, []))}
        return next(condition for condition in ("guilty", "bad", "healthy") if condition in conditions)

    def own(self, call: Call) -> str:
        if call in self.marks:
            return "guilty"
        return "healthy" if call.is_finite else "bad"

    def node(self, call: Call) -> Node:
        inside = self.below.get(call, [])
        node = Node(_line(call, self.marks.get(call, [])), self.own(call))
        if inside and not self.is_small and (condition := self.condition(call)) != "guilty":
            count = self.count(call)
            children = f"child{'ren' * (count > 1)}"
            folded = f"… {count} healthy {children}" if condition == "healthy" else f"… {count} {children}, not finite either"
            node.children = [Node(folded, "folded")]
        else:
            node.children = self.grow(call)
        return node

    def count(self, call: Call) -> int:
        return sum(1 + self.count(inner) for inner in self.below.get(call, []))


def _line(call: Call, marks: Sequence[str]) -> str:
    span = f"{_told(call.inputs)} → {_told(call.outputs) if call.done is not None else 'raised'}"
    gradient = f", |grad| {_magnitude(call.gradient)}" if call.gradient else ""
    parameters = f", {', '.join(call.parameters)} not finite before" if call.parameters else ""
    return f"{call.label}: {span}{gradient}{parameters}" + "".join(f"  ◀ {mark}" for mark in marks)


def _told(span: Range | None) -> str:
    return "no floats" if span is None else str(span)


def _magnitude(span: Range) -> str:
    largest = "" if span.low != span.low else f"{span.largest:.3g}"
    counts = [f"{count} {kind}" for count, kind in ((span.nan, "NaN"), (span.inf, "inf")) if count]
    return " + ".join(part for part in (largest, *counts) if part)


def show(node: Node, stream: TextIO | None = None) -> None:
    """Print a tree: in colors on a terminal if rich is there, else as plain text.

    Args:
        node: The root.
        stream: Where to; None: stdout.
    """
    stream = stream or sys.stdout
    if stream.isatty():
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            Console(file=stream, soft_wrap=True).print(rich_tree(node))
            return
    print(plain_text(node, getattr(stream, "encoding", None) or "utf-8"), file=stream)


def rich_tree(node: Node) -> Any:
    """The same for rich."""
    from rich.text import Text
    from rich.tree import Tree

    styles = {"guilty": "bold red", "bad": "yellow", "healthy": "", "folded": "dim"}
    tree = Tree(Text(escaped(node.text), style=styles[node.style]))
    for child in node.children:
        tree.add(rich_tree(child))
    return tree


def plain_text(node: Node, encoding: str = "utf-8") -> str:
    """The same as text, with letters that the encoding has."""
    text = "\n".join(_lines(node))
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        for letters, plain in {"├── ": "|-- ", "└── ": "`-- ", "│": "|", "→": "->", "◀": "<--", "…": "..."}.items():
            text = text.replace(letters, plain)
    return text


def _lines(node: Node) -> list[str]:
    lines = [escaped(node.text)]
    for child in node.children:
        is_last = child is node.children[-1]
        first, *rest = _lines(child)
        lines += [("└── " if is_last else "├── ") + first, *(("    " if is_last else "│   ") + line for line in rest)]
    return lines
