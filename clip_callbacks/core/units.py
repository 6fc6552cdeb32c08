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
    """Rows of one gradient or parameter, or parts of rows, with the units that they belong to.

    Args:
        entries: View of the r rows, shape ``(r, …)``.
        units: Numbers of their units, as a slice or as int64 of shape ``(r,)``.
        position: Position of the parameter in the table.
    """

    entries: Tensor
    units: slice | Tensor
    position: int


@dataclass(frozen=True, eq=False)
class Units:
    """The U units of a table of N parameters, numbered from the first parameter to the last.

    Args:
        shapes: Shapes of the whole parameters, also where a rank holds a shard only.
    """

    shapes: tuple[Shape, ...]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of units of each parameter."""
        return tuple(shape[0] if len(shape) > 1 else 1 for shape in self.shapes)

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """Number of each parameter's first unit, and U at the end."""
        return (0, *accumulate(self.counts))

    def __len__(self) -> int:
        """Return the number of units, U."""
        return self.firsts[-1]

    @cached_property
    def owners(self) -> Tensor:
        """Position of the parameter that each unit belongs to, int64, shape ``(U,)``."""
        positions = torch.arange(len(self.counts), dtype=torch.int64, device="cpu")
        return positions.repeat_interleave(torch.tensor(self.counts, dtype=torch.int64, device="cpu"))

    def repeated(self, per_parameter: Sequence[int]) -> array[int]:
        """Return the number of its parameter for each unit, from N numbers U."""
        # runs are extended in C: there may be millions of units
        each = array("q")
        for value, count in zip(per_parameter, self.counts, strict=True):
            each.extend(array("q", [value]) * count)
        return each

    def selected(self, names: Sequence[str], inside: Sequence[bool]) -> tuple[UnitNames, array[int]]:
        """Divide the units of the selected parameters into blocks of one unit each.

        Args:
            names: Names of all N parameters.
            inside: True for each parameter that is selected.

        Returns:
            Names of the blocks, and for each unit the number of its block, or ``OUTSIDE``.
        """
        selected = [position for position, is_inside in enumerate(inside) if is_inside]
        index, block = array("q"), 0
        for is_inside, count in zip(inside, self.counts, strict=True):
            index.extend(range(block, block + count) if is_inside else array("q", [OUTSIDE]) * count)
            block += count if is_inside else 0
        # None tells a vector, which has the parameter's name, from a matrix of one row, which is called `weight[0]`
        counts = [self.counts[position] if len(self.shapes[position]) > 1 else None for position in selected]
        return UnitNames([names[position] for position in selected], counts), index

    def of_shard(self, position: int, shard: Tensor, first_row: int, first_entry: int | None) -> list[Rows]:
        """Return the rows in one rank's shard of a parameter or its gradient.

        Args:
            position: Position of the parameter in the table.
            shard: Shard of the rank: a slice along any dimension, or a flat piece.
            first_row: First row that a slice has entries of; ignored for a flat piece.
            first_entry: Number of a flat piece's first entry in the flattened parameter; None for a slice. A flat piece may begin
                and end inside a row.

        Returns:
            Views of the shard: at most three for a flat piece, which are the end of a row, whole rows, and the beginning of a row.
        """
        first, shape = self.firsts[position], self.shapes[position]
        # the shape of the whole parameter decides, since a flat piece has one dimension whatever it is a piece of
        if len(shape) <= 1:
            return [Rows(shard.reshape(1, -1), slice(first, first + 1), position)]
        if first_entry is None:
            start = first + first_row
            return [Rows(shard, slice(start, start + len(shard)), position)]
        # Cut at the ends of rows: the rest of a row that begins on another rank, whole rows, and the beginning of a last one.
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
    """Names of units, made one by one on request, because there may be millions. ``weight[3]`` is row 3 of ``weight``.

    Args:
        names: Names of the parameters.
        counts: Number of units of each parameter; None for a parameter that is one unit, which has the parameter's name.
    """

    def __init__(self, names: Sequence[str], counts: Sequence[int | None]) -> None:
        """Sum up the counts."""
        self._names = names
        self._counts = counts
        self._ends = list(accumulate(1 if count is None else count for count in counts))

    def parts(self) -> tuple[list[str], list[int | None]]:
        """Return names and counts, from which an equal sequence can be made."""
        return list(self._names), list(self._counts)

    def __eq__(self, other: object) -> bool:
        """Return whether both are names of the same units."""
        return self.parts() == other.parts() if isinstance(other, UnitNames) else NotImplemented

    def __hash__(self) -> int:
        """Return the hash of names and counts."""
        return hash((tuple(self._names), tuple(self._counts)))

    def __len__(self) -> int:
        """Return the number of units."""
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, position: int) -> str: ...

    @overload
    def __getitem__(self, position: slice) -> Sequence[str]: ...

    def __getitem__(self, position: int | slice) -> str | Sequence[str]:
        """Return one name, or a list of names for a slice."""
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        # takes negative positions and raises IndexError, as a list does
        number = range(len(self))[position]
        owner = bisect_right(self._ends, number)
        if (count := self._counts[owner]) is None:
            return self._names[owner]
        return f"{self._names[owner]}[{number - self._ends[owner] + count}]"
