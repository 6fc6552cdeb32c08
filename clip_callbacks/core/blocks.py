"""Which gradient entries share one norm: from tensors to named blocks.

A :class:`TensorTable` is what one optimizer holds, each tensor once. A :class:`Partition` divides it into the blocks of
one scope; what it divides are the parameters or, where a rule asks for them, their units. All of it is plain index arithmetic,
worked out once and used at every step.
"""

from __future__ import annotations

import difflib
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

Scope: TypeAlias = Literal["global", "group", "layer", "parameter", "unit"]
SCOPES: tuple[str, ...] = get_args(Scope)

OUTSIDE = -1
"""The block index of a parameter that belongs to no block of a partition."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Blocks of parameters, or of units of them, that share one norm, in the order of their first part.

    Args:
        names: What each of the B blocks is called.
        index: For each parameter of the table, or for each unit, the number of its block, or ``OUTSIDE``.
    """

    names: Sequence[str]
    index: array[int]
    _meets: dict[int, tuple[Partition, Partition, Tensor]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without what has been worked out: other partitions are known by their place in memory."""
        return {"names": self.names, "index": self.index, "_meets": {}}

    @cached_property
    def is_whole(self) -> bool:
        """Whether one block holds everything: its norm is the total norm."""
        return len(self.names) == 1 and self.is_total

    @cached_property
    def is_finest(self) -> bool:
        """Whether each part is a block of its own: block norms are the norms measured."""
        return self.index == array("q", range(len(self.names)))

    @cached_property
    def is_total(self) -> bool:
        """Whether every part is in some block."""
        return OUTSIDE not in self.index

    @cached_property
    def numbers(self) -> Tensor:
        """The index as a tensor, int64, one entry for each part."""
        return torch.tensor(self.index, dtype=torch.int64, device="cpu")

    @cached_property
    def members(self) -> Tensor:
        """The numbers of the parts inside the partition, int64 of shape ``(M,)``."""
        return torch.tensor([i for i, block in enumerate(self.index) if block != OUTSIDE], dtype=torch.int64)

    @cached_property
    def member_blocks(self) -> Tensor:
        """The block of each of those parts, int64 of shape ``(M,)``."""
        return torch.tensor([block for block in self.index if block != OUTSIDE], dtype=torch.int64)

    def meet(self, other: Partition) -> tuple[Partition, Tensor]:
        """The parts that share a block of both partitions as blocks, and the other one's block for each; worked out once."""
        known = self._meets.get(id(other))
        if known is None:
            both = (self.numbers != OUTSIDE) & (other.numbers != OUTSIDE)
            pairs, numbers = torch.unique(self.numbers[both] * len(other.names) + other.numbers[both], return_inverse=True)
            index = torch.full_like(self.numbers, OUTSIDE)
            index[both] = numbers
            meet = Partition(("",) * len(pairs), array("q", index.tolist()))
            known = self._meets[id(other)] = other, meet, pairs % len(other.names)
        return known[1], known[2]

    def spread(self, per_block: Tensor, outside: float = 1.0) -> Tensor:
        """Give each part the value of its block.

        Args:
            per_block: Shape ``(B,)``.
            outside: The value of parts in no block.

        Returns:
            One value for each part of the table; ``per_block`` itself if one block holds them all.
        """
        if self.is_finest or self.is_whole:
            return per_block
        if self.is_total:
            return per_block[self.member_blocks.to(per_block.device)]
        spread = per_block.new_full((len(self.index),), outside)
        spread[self.members.to(per_block.device)] = per_block.reshape(-1)[self.member_blocks.to(per_block.device)]
        return spread


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
        for argument, pattern in (("include", self.include), ("exclude", self.exclude)):
            if pattern is not None and not any(re.search(pattern, name) for name in names):
                raise ValueError(no_match(pattern, names, argument))
        if names and not any(name in self for name in names):
            raise ValueError(
                f"`exclude` must leave a parameter over, got {self.exclude!r}, which matches each parameter that `include` matches."
            )


EVERYTHING = Selection()
"""Selection of all parameters."""
