"""Blocks of gradient entries that share one norm, and the selection of parameters by name.

A :class:`~clip_callbacks.core.tensor_table.TensorTable` lists the parameters of one optimizer. A :class:`Partition` divides them,
or their units if some rule has the scope "unit", into the blocks of one scope: index arithmetic that is done once and used at every
step.
"""

from __future__ import annotations

import difflib
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

Scope: TypeAlias = Literal["global", "group", "layer", "parameter", "unit"]
"""Gradient entries that share one norm: all, an optimizer's parameter group, the parameters that one module owns directly, one
tensor, or one output row of a tensor."""

SCOPES: tuple[str, ...] = get_args(Scope)
"""All scopes, the coarsest first."""

OUTSIDE = -1
"""Block number of a parameter or unit that belongs to no block."""

MAX_ROW_ENTRIES = 4
"""Largest number of entries in the rows of :meth:`Partition.rows`, as a multiple of the number of parts."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Division of the N parameters of a table, or of their U units, into B blocks; "part" below is a parameter or a unit.

    Args:
        names: Names of the blocks, in the order of their first parts.
        index: Block number of each part, or ``OUTSIDE``; an array of 8 bytes a part, because there may be millions of units.
    """

    names: Sequence[str]
    index: array[int]
    _meets: dict[int, tuple[Partition, Partition, Tensor]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of pickles and copies: it knows other partitions by their ``id``, which is of this process only."""
        return {"names": self.names, "index": self.index, "_meets": {}}

    @cached_property
    def is_whole(self) -> bool:
        """If True, one block holds every part: its norm is the total norm."""
        return len(self.names) == 1 and self.is_total

    @cached_property
    def is_finest(self) -> bool:
        """If True, each part is a block by itself: the block norms are the measured norms."""
        # arrays compare in C, and there may be millions of units
        return self.index == array("q", range(len(self.names)))

    @cached_property
    def is_total(self) -> bool:
        """If True, every part is in a block."""
        return OUTSIDE not in self.index

    @cached_property
    def numbers(self) -> Tensor:
        """Block number of each part as a tensor, int64, shape ``(N,)`` or ``(U,)``."""
        return torch.tensor(self.index, dtype=torch.int64, device="cpu")

    @cached_property
    def members(self) -> Tensor:
        """Positions of the M parts that are in a block, int64, shape ``(M,)``."""
        return torch.tensor([i for i, block in enumerate(self.index) if block != OUTSIDE], dtype=torch.int64, device="cpu")

    @cached_property
    def member_blocks(self) -> Tensor:
        """Block number of each of those parts, int64, shape ``(M,)``."""
        return torch.tensor([block for block in self.index if block != OUTSIDE], dtype=torch.int64, device="cpu")

    @cached_property
    def has_rows(self) -> bool:
        """If True, :meth:`rows` pays: no block has many more parts than most."""
        return 0 < self._longest * len(self.names) <= MAX_ROW_ENTRIES * len(self.index)

    def rows(self, per_part: Tensor) -> Tensor:
        """Lay out the values of the parts by block.

        Args:
            per_part: Values of the parts, CPU tensor of shape ``(N,)`` or ``(U,)``.

        Returns:
            Values of shape ``(B, k)``, where k is the largest number of parts of a block; with 0 after those of smaller blocks.
        """
        places = self._row_places
        if places is not None:
            per_part = torch.cat([per_part, _ZERO]).index_select(0, places)
        return per_part.view(-1, self._longest)

    @cached_property
    def _longest(self) -> int:
        return max(Counter(block for block in self.index if block != OUTSIDE).values(), default=0)

    @cached_property
    def _row_places(self) -> Tensor | None:
        """Position of each part in the rows, N where there is none; None if the parts lie in that order already."""
        rows: list[list[int]] = [[] for _ in self.names]
        for part, block in enumerate(self.index):
            if block != OUTSIDE:
                rows[block].append(part)
        places = [part for row in rows for part in (*row, *[len(self.index)] * (self._longest - len(row)))]
        if places == list(range(len(self.index))):
            return None
        return torch.tensor(places, dtype=torch.int64, device="cpu")

    def meet(self, other: Partition) -> tuple[Partition, Tensor]:
        """Return the coarsest partition that is finer than both; cached for each other partition.

        Two parts are in one block of it if they share a block of both; a part outside either is outside.

        Args:
            other: Partition of the parts of the same table.

        Returns:
            The partition, with empty names, and for each of its blocks the number of the other partition's block, int64.
        """
        known = self._meets.get(id(other))
        if known is None:
            both = (self.numbers != OUTSIDE) & (other.numbers != OUTSIDE)
            # a pair of block numbers is one integer, so that one call sorts and numbers all pairs
            pairs, numbers = torch.unique(self.numbers[both] * len(other.names) + other.numbers[both], return_inverse=True)
            index = torch.full_like(self.numbers, OUTSIDE)
            index[both] = numbers
            meet = Partition(("",) * len(pairs), array("q", index.tolist()))
            # The other partition is cached too, so that it lives as long as its `id` is a key here.
            known = self._meets[id(other)] = other, meet, pairs % len(other.names)
        return known[1], known[2]

    def spread(self, per_block: Tensor, outside: float = 1.0) -> Tensor:
        """Return the value of its block for each part.

        Args:
            per_block: Values of the blocks, shape ``(B,)``.
            outside: Value of parts in no block.

        Returns:
            One value for each part; ``per_block`` itself if one block holds every part, or each part is a block.
        """
        if self.is_finest or self.is_whole:
            return per_block
        if self.is_total:
            # every part has a block: one gather, and no fill for the parts outside
            return per_block.index_select(0, self.member_blocks.to(per_block.device))
        spread = per_block.new_full((len(self.index),), outside)
        # reshaped, because the coefficient of a single block is 0-dim
        spread[self.members.to(per_block.device)] = per_block.reshape(-1)[self.member_blocks.to(per_block.device)]
        return spread


_ZERO = torch.zeros(1, dtype=torch.float32, device="cpu")
"""What stands in a row where a block has no part."""


def unknown_scope(scope: object) -> str:
    """Return the error message for an unknown scope; it lists the scopes."""
    return f"`scope` must be one of {', '.join(SCOPES)}, got {scope!r}."


def no_match(pattern: str, names: Sequence[str], argument: str) -> str:
    """Return the error message for a pattern that matches no name; it lists near names.

    Args:
        pattern: The regular expression.
        names: All names that it could match.
        argument: Name of the argument that holds the pattern.
    """
    # Anchors would count as differences. The cutoff is below difflib's 0.6, because a pattern is often a part of a long name.
    near = difflib.get_close_matches(pattern.strip("^$.*\\"), names, n=3, cutoff=0.3) or list(names[:3])
    matches = f"got {pattern!r}, which matches none of {len(names)}"
    return f"`{argument}` must match the name of a parameter, {matches}. Near names: {', '.join(near)}."


@dataclass(frozen=True)
class Selection:
    """Choice of parameters by name: a name is in the selection if ``include`` finds it and ``exclude`` does not.

    Args:
        include: Regular expression for ``re.search``; None selects all names.
        exclude: Regular expression for ``re.search``; None excludes no name.

    Raises:
        ValueError: If either is not a regular expression.
    """

    include: str | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        """Check both patterns."""
        for argument in ("include", "exclude"):
            pattern = getattr(self, argument)
            try:
                # only a check: `re` has its own cache of compiled patterns
                re.compile(pattern or "")
            except (re.error, TypeError) as error:
                raise ValueError(f"`{argument}` must be a regular expression, got {pattern!r}: {error}.") from error

    def __contains__(self, name: object) -> bool:
        """Return whether a parameter of this name is selected."""
        return (
            isinstance(name, str)
            and (self.include is None or re.search(self.include, name) is not None)
            and (self.exclude is None or re.search(self.exclude, name) is None)
        )

    def among(self, names: Sequence[str]) -> Selection | None:
        """Return the selection that does the same on a part of all names and passes :meth:`check` there.

        One of several optimizers may hold no parameter that ``exclude`` matches, which is no mistake of the user's: the pattern is
        left out for it.

        Args:
            names: Names of the parameters that one optimizer holds.

        Returns:
            A selection, or None if no name is selected.
        """
        if not any(name in self for name in names):
            return None
        if self.exclude is None or any(re.search(self.exclude, name) for name in names):
            return self
        return Selection(self.include)

    def check(self, names: Sequence[str]) -> None:
        """Check that each pattern matches some name, and that some name is selected.

        Raises:
            ValueError: If not; the message lists near names.
        """
        # each pattern by itself, so that the message names the one with the mistake
        for argument, pattern in (("include", self.include), ("exclude", self.exclude)):
            if pattern is not None and not any(re.search(pattern, name) for name in names):
                raise ValueError(no_match(pattern, names, argument))
        # both match something; together they may still leave nothing over
        if names and not any(name in self for name in names):
            raise ValueError(
                f"`exclude` must leave a parameter over, got {self.exclude!r}, which matches each parameter that `include` matches."
            )


EVERYTHING = Selection()
"""Selection of all parameters."""
