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
    """Say which scopes there are."""
    return f"`scope` must be one of {', '.join(SCOPES)}, got {scope!r}."


def no_match(pattern: str, names: Sequence[str], argument: str = "params") -> str:
    """Say that a pattern matches no name, and which names come near it."""
    near = difflib.get_close_matches(pattern.strip("^$.*\\"), names, n=3, cutoff=0.3) or list(names[:3])
    matches = f"got {pattern!r}, which matches none of {len(names)}"
    return f"`{argument}` must match the name of a parameter, {matches}. Near names: {', '.join(near)}."


@dataclass(frozen=True)
class Selection:
    """Which parameters a rule holds for, by name.

    Args:
        params: A regular expression that ``re.search`` must find in the name; None takes all.
        exclude: One that it must not find; None leaves out none.
    """

    params: str | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        """Check both patterns."""
        for argument in ("params", "exclude"):
            pattern = getattr(self, argument)
            try:
                re.compile(pattern or "")
            except (re.error, TypeError) as error:
                raise ValueError(f"`{argument}` must be a regular expression, got {pattern!r}: {error}.") from error

    def __contains__(self, name: object) -> bool:
        """Whether a parameter of this name is selected."""
        return (
            isinstance(name, str)
            and (self.params is None or re.search(self.params, name) is not None)
            and (self.exclude is None or re.search(self.exclude, name) is None)
        )

    def among(self, names: Sequence[str]) -> Selection | None:
        """The selection for parameters that may be some of those it was made for; None if it selects none of them."""
        if not any(name in self for name in names):
            return None
        if self.exclude is None or any(re.search(self.exclude, name) for name in names):
            return self
        return Selection(self.params)

    def check(self, names: Sequence[str]) -> None:
        """See that each pattern matches some name, and that some name is selected.

        Raises:
            ValueError: If not; it lists near names.
        """
        for argument, pattern in (("params", self.params), ("exclude", self.exclude)):
            if pattern is not None and not any(re.search(pattern, name) for name in names):
                raise ValueError(no_match(pattern, names, argument))
        if names and not any(name in self for name in names):
            raise ValueError(f"`exclude` must leave a parameter over, got {self.exclude!r}, which matches all that `params` does.")


EVERYTHING = Selection()
"""All parameters."""
