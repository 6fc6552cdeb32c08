"""Units: the output rows of parameters, of which each has a norm of its own under ``scope="unit"``.

A unit is a slice along the first dimension: an output feature of a linear layer, an output channel of a convolution, an entry
of an embedding (of a transposed convolution, an input channel). A parameter of one dimension, or none, is one unit, as in
Brock et al., arXiv 2102.06171.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple, overload

import torch
from torch import Tensor

from clip_callbacks.core.blocks import OUTSIDE

Shape = tuple[int, ...]


class Rows(NamedTuple):
    """Rows of one gradient, or parts of rows.

    Args:
        entries: A view of them, row by row: shape ``(r, …)``.
        units: Which units they are of.
        position: Of the parameter in the table.
    """

    entries: Tensor
    units: slice | Tensor
    position: int


@dataclass(frozen=True, eq=False)
class Units:
    """The U units of a table of N parameters, one parameter after another.

    Args:
        shapes: Of the parameters, undivided.
    """

    shapes: tuple[Shape, ...]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many units each parameter has."""
        return tuple(shape[0] if len(shape) > 1 else 1 for shape in self.shapes)

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """The number of each parameter's first unit, and U at the end."""
        return (0, *accumulate(self.counts))

    def __len__(self) -> int:
        """Count of the units, U."""
        return self.firsts[-1]

    @cached_property
    def owners(self) -> Tensor:
        """The parameter that each unit is of, int64 of shape ``(U,)``."""
        return torch.repeat_interleave(torch.arange(len(self.counts), device="cpu"), torch.tensor(self.counts, device="cpu"))

    def repeated(self, per_parameter: Sequence[int]) -> array[int]:
        """A number for each parameter as one for each unit."""
        each = array("q")
        for value, count in zip(per_parameter, self.counts, strict=True):
            each.extend(array("q", [value]) * count)
        return each

    def selected(self, names: Sequence[str], inside: Sequence[bool]) -> tuple[UnitNames, array[int]]:
        """Each unit of some parameters by itself: the names of the blocks, and for each unit its block, or ``OUTSIDE``."""
        taken = [place for place, is_inside in enumerate(inside) if is_inside]
        index, block = array("q"), 0
        for is_inside, count in zip(inside, self.counts, strict=True):
            index.extend(range(block, block + count) if is_inside else array("q", [OUTSIDE]) * count)
            block += count if is_inside else 0
        counts = [self.counts[place] if len(self.shapes[place]) > 1 else None for place in taken]
        return UnitNames([names[place] for place in taken], counts), index

    def of_shard(self, position: int, shard: Tensor, first_row: int, first_entry: int | None) -> list[Rows]:
        """The rows of one rank's part of a parameter, or of its gradient.

        Args:
            position: Of the parameter in the table.
            shard: The part: a slice along any dimension, or a flat piece.
            first_row: The first row of which it holds entries, if it is a slice.
            first_entry: If it is a flat piece, its first entry among those of the flattened parameter; it may begin and end
                inside a row.
        """
        first, shape = self.firsts[position], self.shapes[position]
        if len(shape) <= 1:
            return [Rows(shard.reshape(1, -1), slice(first, first + 1), position)]
        if first_entry is None:
            start = first + first_row
            return [Rows(shard, slice(start, start + len(shard)), position)]
        width = math.prod(shape[1:])
        head = min(-first_entry % width, shard.numel())
        body = (shard.numel() - head) // width * width
        edges = [0, head, head + body, shard.numel()]
        rows = []
        for start, stop in pairwise(edges):
            if start < stop:
                number, count = first + (first_entry + start) // width, max(1, (stop - start) // width)
                rows.append(Rows(shard[start:stop].view(count, -1), slice(number, number + count), position))
        return rows


class UnitNames(Sequence[str]):
    """Names of units, made when asked for: there may be millions. ``weight[3]`` is row 3 of ``weight``.

    Args:
        names: Of the parameters whose units they are.
        counts: How many units each has; None where a parameter is one unit by itself.
    """

    def __init__(self, names: Sequence[str], counts: Sequence[int | None]) -> None:
        """Count them."""
        self._names = names
        self._counts = counts
        self._ends = list(accumulate(1 if count is None else count for count in counts))

    def parts(self) -> tuple[list[str], list[int | None]]:
        """What it is made of."""
        return list(self._names), list(self._counts)

    def __eq__(self, other: object) -> bool:
        """Whether the names are the same."""
        return self.parts() == other.parts() if isinstance(other, UnitNames) else NotImplemented

    def __hash__(self) -> int:
        """Of what it is made of."""
        return hash((tuple(self._names), tuple(self._counts)))

    def __len__(self) -> int:
        """How many."""
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...

    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        """One name, or a list of them."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        owner = bisect_right(self._ends, number)
        if (count := self._counts[owner]) is None:
            return self._names[owner]
        return f"{self._names[owner]}[{number - self._ends[owner] + count}]"
