"""Norms of many small CPU tensors in few kernel calls.

On a CPU a multi-tensor norm calls one kernel for each tensor, and for a small tensor the call costs ten times the arithmetic. Small
tensors of one shape are therefore stacked into buckets and reduced row by row in one call. Each row is reduced in the order in
which the tensor alone would be, so that the norms have the same bits, if gradients lie in memory as autograd lays them. On a GPU
the multi-tensor norm is a few kernels already, and needs no buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAX_SMALL_ENTRIES = 4096
"""Largest number of entries of a tensor that goes into a bucket: above it the arithmetic outweighs the call."""

MAX_BUCKET_ENTRIES = 1 << 16
"""Largest number of entries of a bucket, 256 KiB in float32: the memory that reading needs beside the gradients."""

MIN_TENSORS = 8
"""Smallest number of tensors of one shape for which a bucket pays."""


@dataclass(frozen=True, eq=False)
class Buckets:
    """A plan to read tensors: those of the most common small shape in buckets, the others one by one.

    Args:
        buckets: Positions of the tensors in each bucket, all of one shape.
        others: Positions of the tensors that are read one by one.
        order: Position of each tensor's norm among the norms in the order of reading, int64 of shape ``(n,)``.
    """

    buckets: tuple[tuple[int, ...], ...]
    others: tuple[int, ...]
    order: Tensor
    _outputs: dict[torch.dtype, tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Buckets | None:
        """Plan for tensors of one dtype; None where buckets do not pay: on devices other than a CPU, or with few small tensors.

        Tensors of a second shape are put into buckets only if no other tensors are left: there are at most two kinds of reads.
        """
        places: dict[torch.Size, list[int]] = {}
        for place, tensor in enumerate(tensors):
            # 0-dim tensors are left out: their stack has no dimension to reduce, and torch takes `dim=()` for all dimensions
            if tensor.is_cpu and tensor.ndim and 0 < tensor.numel() <= MAX_SMALL_ENTRIES and _is_dense_in_order(tensor):
                places.setdefault(tensor.shape, []).append(place)
        # the two empty lists stand in where there are fewer than two shapes
        by_count: list[list[int]] = [*sorted(places.values(), key=len, reverse=True), [], []]
        first, second = by_count[:2]
        if len(first) < MIN_TENSORS:
            return None
        if len(first) + len(second) == len(tensors) and len(second) >= MIN_TENSORS:
            buckets, others = _split_into_buckets(tensors, first) + _split_into_buckets(tensors, second), []
        else:
            taken = set(first)
            others = [place for place in range(len(tensors)) if place not in taken]
            buckets = _split_into_buckets(tensors, first)
        read = [place for bucket in (*buckets, others) for place in bucket]
        # argsort inverts the permutation, so that one index restores the order of the tensors
        return cls(buckets, tuple(others), torch.tensor(read, device="cpu").argsort())

    def norms(self, tensors: Sequence[Tensor], norm_type: float, dtype: torch.dtype | None) -> Tensor:
        """Norm of each tensor, shape ``(n,)``, in the order of the tensors; with the bits of ``torch._foreach_norm``."""
        # a single bucket is in order already
        if len(self.buckets) == 1 and not self.others:
            return _stacked_norms([tensors[place] for place in self.buckets[0]], norm_type, dtype, out=None)
        # written into a buffer that is kept between steps, which saves an allocation and a concatenation
        norms, parts = self._output(dtype or tensors[0].dtype.to_real())
        for bucket, part in zip(self.buckets, parts, strict=False):
            _stacked_norms([tensors[place] for place in bucket], norm_type, dtype, out=part)
        if self.others:
            alone = [tensors[place] for place in self.others]
            torch.stack(torch._foreach_norm(alone, norm_type, dtype=dtype), out=parts[-1])
        # a copy, so that the buffer may be written again at the next step
        return norms[self.order]

    def _output(self, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Buffer for the norms of one dtype, in the order of reading, and its view for each read."""
        if dtype not in self._outputs:
            norms = torch.empty(len(self.order), dtype=dtype, device="cpu")
            sizes = [len(read) for read in (*self.buckets, self.others)]
            self._outputs[dtype] = norms, norms.split(sizes)  # type: ignore[no-untyped-call]
        return self._outputs[dtype]


def _is_dense_in_order(tensor: Tensor) -> bool:
    """Return whether a gradient of this parameter lies in memory as its row of a stack would.

    Others would be summed up in another order than alone, which changes the last bits.
    """
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def _split_into_buckets(tensors: Sequence[Tensor], places: list[int]) -> tuple[tuple[int, ...], ...]:
    count = MAX_BUCKET_ENTRIES // tensors[places[0]].numel()
    return tuple(tuple(places[start : start + count]) for start in range(0, len(places), count))


def _stacked_norms(tensors: list[Tensor], norm_type: float, dtype: torch.dtype | None, *, out: Tensor | None) -> Tensor:
    dimensions = tuple(range(1, 1 + tensors[0].ndim))
    norms: Tensor = torch.linalg.vector_norm(torch.stack(tensors), norm_type, dim=dimensions, dtype=dtype, out=out)
    return norms
