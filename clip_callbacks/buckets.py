"""Small tensors are read by the bucket: hundreds of biases cost a few dispatches, not hundreds.

On a CPU a multi-tensor norm calls one kernel for each tensor, and for a small one the call costs ten times the arithmetic.
Tensors of one shape stacked side by side are reduced row by row in one call, each row in the order in which the tensor alone
would be: the norms have the same bits. On a GPU the multi-tensor norm is a few kernels already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALL = 4096
"""Entries above which a tensor's own arithmetic outweighs its call."""

CAPACITY = 1 << 16
"""Entries that are stacked at a time, 256 KiB in float32: what bucketing needs beside the gradients."""

FEWEST = 8
"""Tensors of one shape that are worth a bucket."""


@dataclass(frozen=True)
class Buckets:
    """In which order to read tensors: those of the most common small shape by the bucket, then the others.

    Args:
        first: The places of the tensors of the most common small shape.
        others: The places of all others; by the bucket too, if they are small and of one shape.
        stacks_others: Whether they are.
    """

    first: tuple[int, ...]
    others: tuple[int, ...]
    stacks_others: bool

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Buckets | None:
        """Plan for tensors of one dtype; None where nothing is gained: on other devices than a CPU, without many of one shape."""
        places: dict[torch.Size, list[int]] = {}
        for place, tensor in enumerate(tensors):
            if tensor.is_cpu and tensor.ndim and 0 < tensor.numel() <= SMALL:
                places.setdefault(tensor.shape, []).append(place)
        by_count: list[list[int]] = [*sorted(places.values(), key=len, reverse=True), [], []]
        first, second = by_count[:2]
        if len(first) < FEWEST:
            return None
        taken = set(first)
        others = tuple(place for place in range(len(tensors)) if place not in taken)
        return cls(tuple(first), others, stacks_others=len(others) == len(second) >= FEWEST)

    def norms(self, tensors: Sequence[Tensor], norm_type: float, dtype: torch.dtype | None) -> Tensor:
        """Norm of each tensor, in the order of the tensors, shape ``(n,)``; bits are those of ``torch._foreach_norm``."""
        parts = list(_stacked(tensors, self.first, norm_type, dtype))
        if self.stacks_others:
            parts += _stacked(tensors, self.others, norm_type, dtype)
        elif self.others:
            parts += [torch.stack(torch._foreach_norm([tensors[place] for place in self.others], norm_type, dtype=dtype))]
        if not self.others:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        numbers = [0.0] * len(tensors)
        for place, number in zip((*self.first, *self.others), (number for part in parts for number in part.tolist()), strict=True):
            numbers[place] = number
        return torch.tensor(numbers, dtype=parts[0].dtype)


def _stacked(tensors: Sequence[Tensor], places: Sequence[int], norm_type: float, dtype: torch.dtype | None) -> Iterator[Tensor]:
    shape = tensors[places[0]].shape
    count = CAPACITY // shape.numel()
    rows = tuple(range(1, len(shape) + 1))
    for start in range(0, len(places), count):
        stack = torch.stack([tensors[place] for place in places[start : start + count]])
        yield torch.linalg.vector_norm(stack, norm_type, dim=rows, dtype=dtype)
