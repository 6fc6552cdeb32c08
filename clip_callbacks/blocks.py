"""Which gradient entries share one norm: from tensors to named blocks.

A :class:`ParameterTable` is what one optimizer holds, each tensor once. A :class:`Partition` divides it into the blocks of
one scope. Both are plain index arithmetic, worked out once and used at every step.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Scope: TypeAlias = Literal["global", "group", "layer", "parameter"]
SCOPES: tuple[str, ...] = get_args(Scope)

OUTSIDE = -1
"""The block index of a parameter that belongs to no block of a partition."""


@dataclass(frozen=True)
class Partition:
    """Blocks of parameters that share one norm, in the order of their first parameter.

    Args:
        names: What each of the B blocks is called.
        index: For each parameter of the table, the number of its block, or ``OUTSIDE``.
    """

    names: tuple[str, ...]
    index: tuple[int, ...]

    @cached_property
    def is_whole(self) -> bool:
        """Whether one block holds every parameter: its norm is the total norm."""
        return len(self.names) == 1 and self.is_total

    @cached_property
    def is_finest(self) -> bool:
        """Whether each parameter is a block of its own: block norms are parameter norms."""
        return self.index == tuple(range(len(self.names)))

    @cached_property
    def is_total(self) -> bool:
        """Whether every parameter is in some block."""
        return OUTSIDE not in self.index

    @cached_property
    def members(self) -> Tensor:
        """The numbers of the parameters inside the partition, int64 of shape ``(M,)``."""
        return torch.tensor([i for i, block in enumerate(self.index) if block != OUTSIDE], dtype=torch.int64)

    @cached_property
    def member_blocks(self) -> Tensor:
        """The block of each of those parameters, int64 of shape ``(M,)``."""
        return torch.tensor([block for block in self.index if block != OUTSIDE], dtype=torch.int64)

    def spread(self, per_block: Tensor, outside: float = 1.0) -> Tensor:
        """Give each parameter the value of its block.

        Args:
            per_block: Shape ``(B,)``.
            outside: The value of parameters in no block.

        Returns:
            Shape ``(N,)``, one value for each parameter of the table; ``per_block`` itself if one block holds them all.
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


def no_match(pattern: str, names: Sequence[str]) -> str:
    """Say that a pattern matches no name, and which names come near it."""
    near = difflib.get_close_matches(pattern.strip("^$.*\\"), names, n=3, cutoff=0.3) or list(names[:3])
    matches = f"got {pattern!r}, which matches none of {len(names)}"
    return f"`params` must match the name of a parameter, {matches}. Near names: {', '.join(near)}."
