"""The tree of module calls: each call below the one that made it, in the order of execution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, TypeAlias

from clip_callbacks.bundles.terminal import escaped
from clip_callbacks.replay.module_calls import ModuleCall
from clip_callbacks.replay.ranges import ValueRange
from clip_callbacks.replay.suspects import TITLES, SuspectModule

MAX_CALLS_IN_FULL = 30
"""Number of calls up to which a tree is shown in full."""
MAX_SIBLINGS_IN_FULL = 5
"""Number of siblings of one state up to which all are shown; of more, the first, the last and the number of the others."""
LEGEND = "Calls of modules, each with [min, max] of its inputs → of its outputs, and the largest |gradient| at its outputs:"
_ASCII = {"├── ": "|-- ", "└── ": "`-- ", "│": "|", "→": "->", "◀": "<--", "…": "..."}

State: TypeAlias = Literal["suspect", "non-finite", "finite"]
STATES: tuple[State, ...] = ("suspect", "non-finite", "finite")
"""States of a call, the worst first."""


def draw_tree(root: str, calls: Sequence[ModuleCall], suspects: Sequence[SuspectModule], encoding: str = "utf-8") -> str:
    """Draw a tree of calls as text, below a line that explains it.

    Args:
        root: Text of the root.
        calls: All calls, in the order in which they began.
        suspects: The calls to mark.
        encoding: Encoding of the terminal; one without the letters of the drawing gets ASCII letters instead.
    """
    children: dict[ModuleCall | None, list[ModuleCall]] = {}
    for call in calls:
        children.setdefault(call.parent, []).append(call)
    marks: dict[ModuleCall, list[str]] = {}
    for suspect in suspects:
        marks.setdefault(suspect.call, []).append(TITLES[suspect.fault].lower())
    tree = _Tree(children, marks, is_full=len(calls) <= MAX_CALLS_IN_FULL)
    text = "\n".join([LEGEND, escaped(root), *tree.branches(None)])
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        for letters, replacement in _ASCII.items():
            text = text.replace(letters, replacement)
    return text


@dataclass(frozen=True)
class _Tree:
    children: dict[ModuleCall | None, list[ModuleCall]]
    marks: dict[ModuleCall, list[str]]
    is_full: bool

    def branches(self, parent: ModuleCall | None) -> list[str]:
        """Return the lines of the calls that a call made."""
        subtrees: list[list[str]] = []
        for state, group in groupby(self.children.get(parent, []), self.worst_state):
            siblings = list(group)
            if self.is_full or state == "suspect" or len(siblings) <= MAX_SIBLINGS_IN_FULL:
                subtrees += [self.subtree(call) for call in siblings]
            else:
                folded = [f"… {len(siblings) - 2} more, all {state}"]
                subtrees += [self.subtree(siblings[0]), folded, self.subtree(siblings[-1])]
        return _joined(subtrees)

    def subtree(self, call: ModuleCall) -> list[str]:
        """Return the line of a call, and those of the calls that it made, or their number if they need no look."""
        line = escaped(_line(call, self.marks.get(call, [])))
        state, count = self.worst_state(call), self.count_inside(call)
        if self.is_full or state == "suspect" or not count:
            return [line, *self.branches(call)]
        return [line, *_joined([[f"… {count} {state} call{'s' * (count > 1)} inside"]])]

    def worst_state(self, call: ModuleCall) -> State:
        """Return the worst state of a call and of the calls inside it."""
        states = {self.own_state(call), *(self.worst_state(inner) for inner in self.children.get(call, []))}
        return next(state for state in STATES if state in states)

    def own_state(self, call: ModuleCall) -> State:
        if call in self.marks:
            return "suspect"
        return "finite" if call.is_finite else "non-finite"

    def count_inside(self, call: ModuleCall) -> int:
        return sum(1 + self.count_inside(inner) for inner in self.children.get(call, []))


def _joined(subtrees: list[list[str]]) -> list[str]:
    """Return the lines of subtrees with the strokes that join them to their parent."""
    lines: list[str] = []
    for number, (first, *rest) in enumerate(subtrees, 1):
        branch, below = "├── ", "│   "
        if number == len(subtrees):
            branch, below = "└── ", "    "
        lines += [branch + first, *(below + line for line in rest)]
    return lines


def _line(call: ModuleCall, marks: Sequence[str]) -> str:
    outputs = _describe(call.outputs)
    if call.end_order is None:
        outputs = "raised an error"
    text = f"{call.label}: {_describe(call.inputs)} → {outputs}"
    if call.grad_output:
        text += f", |gradient| {_largest(call.grad_output)}"
    if call.nonfinite_tensors:
        text += f", non-finite before the step: {', '.join(call.nonfinite_tensors)}"
    return text + "".join(f"  ◀ {mark}" for mark in marks)


def _describe(values: ValueRange | None) -> str:
    return "no floats" if values is None else str(values)


def _largest(values: ValueRange) -> str:
    if math.isnan(values.largest):
        return str(values)
    return " + ".join([f"{values.largest:.3g}", *(f"{count} {kind}" for kind, count in values.nonfinite_counts())])
