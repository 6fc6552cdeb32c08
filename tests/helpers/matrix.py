"""Which cells of a matrix of tests stay in the fast suite: a pairwise covering. The others are there only if EVERY_CELL is set."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from itertools import chain, combinations, product
from typing import Any

import pytest

EVERY_CELL = "EVERY_CELL" in os.environ
"""Whether slow cells are collected at all: there are thousands, and to leave them out takes as long as to run many a test."""


def examples(count: int) -> int:
    """How many examples of a property are tried: so many in the slow suite, a third of them in the fast one."""
    return count if EVERY_CELL else count // 3


Axis = Mapping[str, Any] | Sequence[Any]


def covering(cells: Sequence[tuple[Any, ...]], at_least: int = 2) -> list[tuple[Any, ...]]:
    """Choose cells greedily until all pairs are covered.

    Args:
        cells: Every valid cell, each a tuple with one member of each axis.
        at_least: How often each member of each axis must be chosen; fewer only where it has fewer cells.

    Returns:
        Cells, in the order of ``cells``. Each two members that stand together in any cell stand together in a chosen one.
    """
    numbers: dict[Any, int] = {}  # of members and pairs: there are thousands, which would be hashed again and again
    members = [[numbers.setdefault(("member", *each), len(numbers)) for each in enumerate(cell)] for cell in cells]
    pairs = [[numbers.setdefault(("pair", *each), len(numbers)) for each in combinations(own, 2)] for own in members]
    features = [[*own, *theirs] for own, theirs in zip(members, pairs, strict=True)]
    needed = [1] * len(numbers)
    for member, count in Counter(chain.from_iterable(members)).items():
        needed[member] = min(at_least, count)
    queue = [(-len(each), place) for place, each in enumerate(features)]  # in order: a heap
    chosen = []
    while queue:
        worth, place = heappop(queue)
        now = -sum([needed[feature] > 0 for feature in features[place]])
        if now > worth:  # others have covered some of it: worth only falls, so that nobody else need be looked at again
            heappush(queue, (now, place))
        elif now < 0:
            for feature in features[place]:
                needed[feature] -= 1
            chosen.append(place)
    return [cells[place] for place in sorted(chosen)]


def matrix(
    where: Callable[..., bool] = lambda *_: True, *, slow: Callable[..., bool] = lambda *_: False, **axes: Axis
) -> pytest.MarkDecorator:
    """Parametrize a test over the product of axes; cells outside of a pairwise covering run in ``make slow`` only.

    Args:
        where: Which cells there are; it is given the names of one member of each axis, in their order.
        slow: Which of them take no part in the covering.
        axes: By argument of the test, the members: a mapping by name, or a sequence of values that are their own names.
    """
    members = {argument: _named(axis) for argument, axis in axes.items()}
    cells = [cell for cell in product(*members.values()) if where(*cell)]
    fast = set(covering([cell for cell in cells if not slow(*cell)]))
    rows = [
        pytest.param(
            *(members[argument][name] for argument, name in zip(members, cell, strict=True)),
            id="-".join(map(str, cell)),
            marks=() if cell in fast else pytest.mark.slow,
        )
        for cell in cells
        if cell in fast or EVERY_CELL
    ]
    return pytest.mark.parametrize(tuple(members), rows)


def _named(axis: Axis) -> dict[Any, Any]:
    return dict(axis) if isinstance(axis, Mapping) else {member: member for member in axis}
