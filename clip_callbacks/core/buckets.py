"""Small tensors are read by the bucket: hundreds of biases cost a few dispatches, not hundreds.

On a CPU a multi-tensor norm calls one kernel for each tensor, and for a small one the call costs ten times the arithmetic.
Tensors of one shape stacked side by side are reduced row by row in one call, each row in the order in which the tensor alone
would be: the norms have the same bits, if gradients lie in memory as autograd lays them. On a GPU the multi-tensor norm is a few
kernels already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SMALL = 4096
"""Entries above which a tensor's own arithmetic outweighs its call."""

CAPACITY = 1 << 16
"""Entries of a bucket, 256 KiB in float32: what reading needs beside the gradients."""

FOUR = 4
"""Dimensions of what may be in channels-last order."""

FEWEST = 8
"""Tensors of one shape that are worth a bucket."""


@dataclass(frozen=True, eq=False)
class Buckets:
    """In which order to read tensors: those of the most common small shape by the bucket, then the others.

    Args:
        buckets: The places of the tensors in each bucket, all of one shape.
        others: The places of the tensors that are read each by itself.
        order: Where among all norms so found that of each tensor is, int64 of shape ``(n,)``.
    """

    buckets: tuple[tuple[int, ...], ...]
    others: tuple[int, ...]
    order: Tensor
    _rooms: dict[torch.dtype, tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Buckets | None:
        """Plan for tensors of one dtype; None where nothing is gained: on other devices than a CPU, without many of one shape.

        Tensors of a second shape are read by the bucket if nothing else is left: no more than two kinds of reads.
        """
        places: dict[torch.Size, list[int]] = {}
        for place, tensor in enumerate(tensors):
            if tensor.is_cpu and tensor.ndim and 0 < tensor.numel() <= SMALL and _is_dense_in_order(tensor):
                places.setdefault(tensor.shape, []).append(place)
        by_count: list[list[int]] = [*sorted(places.values(), key=len, reverse=True), [], []]
        first, second = by_count[:2]
        if len(first) < FEWEST:
            return None
        if len(first) + len(second) == len(tensors) and len(second) >= FEWEST:
            buckets, others = _divided(tensors, first) + _divided(tensors, second), []
        else:
            taken = set(first)
            buckets, others = _divided(tensors, first), [place for place in range(len(tensors)) if place not in taken]
        read = [place for bucket in (*buckets, others) for place in bucket]
        return cls(buckets, tuple(others), torch.tensor(read, device="cpu").argsort())

    def norms(self, tensors: Sequence[Tensor], norm_type: float, dtype: torch.dtype | None) -> Tensor:
        """Norm of each tensor, in the order of the tensors, shape ``(n,)``; bits are those of ``torch._foreach_norm``."""
        if len(self.buckets) == 1 and not self.others:
            return _stacked_norms([tensors[place] for place in self.buckets[0]], norm_type, dtype, out=None)
        found, parts = self._room(dtype or tensors[0].dtype.to_real())
        for bucket, part in zip(self.buckets, parts, strict=False):
            _stacked_norms([tensors[place] for place in bucket], norm_type, dtype, out=part)
        if self.others:
            alone = [tensors[place] for place in self.others]
            torch.stack(torch._foreach_norm(alone, norm_type, dtype=dtype), out=parts[-1])
        return found[self.order]

    def _room(self, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Where the norms of a dtype go, and the part of each read in it."""
        if dtype not in self._rooms:
            found = torch.empty(len(self.order), dtype=dtype, device="cpu")
            self._rooms[dtype] = found, found.split([len(read) for read in (*self.buckets, self.others)])  # type: ignore[no-untyped-call]
        return self._rooms[dtype]


def _is_dense_in_order(tensor: Tensor) -> bool:
    """Whether a gradient of this parameter lies in memory as its stack would: others are summed up in another order."""
    return tensor.is_contiguous() or (tensor.ndim == FOUR and tensor.is_contiguous(memory_format=torch.channels_last))


def _divided(tensors: Sequence[Tensor], places: list[int]) -> tuple[tuple[int, ...], ...]:
    count = CAPACITY // tensors[places[0]].numel()
    return tuple(tuple(places[start : start + count]) for start in range(0, len(places), count))


def _stacked_norms(tensors: list[Tensor], norm_type: float, dtype: torch.dtype | None, *, out: Tensor | None) -> Tensor:
    rows = tuple(range(1, 1 + tensors[0].ndim))
    norms: Tensor = torch.linalg.vector_norm(torch.stack(tensors), norm_type, dim=rows, dtype=dtype, out=out)
    return norms
