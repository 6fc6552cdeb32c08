"""Norms of many small CPU tensors in few kernel calls.

On a CPU a multi-tensor norm calls one kernel for each tensor, and for a small tensor the call costs ten times the arithmetic. Small
tensors of one shape are therefore stacked into buckets and reduced row by row in one call. Each row is reduced in the order in
which the tensor alone would be, so that the norms have the same bits, if gradients lie in memory as autograd lays them. On a GPU
the multi-tensor norm is a few kernels already, and needs no buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from clip_callbacks.core.piecewise_norms import accumulation_dtype, norms_of_each

MAX_SMALL_ENTRIES = 4096
"""Largest number of entries of a tensor that goes into a bucket: above it the arithmetic outweighs the call."""

MAX_BUCKET_ENTRIES = 1 << 16
"""Largest number of entries of a bucket, 256 KiB in float32: the memory that reading needs beside the gradients."""

MIN_TENSORS = 16
"""Smallest number of tensors of one shape for which a bucket pays in a fit, where a step finds little in the caches."""

MIN_TENSORS_BESIDE_OTHERS = 32
"""The same where other tensors are read one by one, so that a bucket adds calls and saves none."""


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
    _outputs: dict[torch.dtype, _Output] = field(default_factory=dict, repr=False)

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
        if len(first) + len(second) < len(tensors) or len(second) < MIN_TENSORS:
            second = []
        taken = {*first, *second}
        others = [place for place in range(len(tensors)) if place not in taken]
        if len(first) < (MIN_TENSORS_BESIDE_OTHERS if others else MIN_TENSORS):
            return None
        buckets = _split_into_buckets(tensors, first)
        if second:
            buckets += _split_into_buckets(tensors, second)
        read = [place for bucket in (*buckets, others) for place in bucket]
        # argsort inverts the permutation, so that one index restores the order of the tensors
        return cls(buckets, tuple(others), torch.tensor(read, dtype=torch.int64, device="cpu").argsort())

    def norms(self, tensors: list[Tensor], norm_type: float) -> Tensor:
        """Norm of each tensor, shape ``(n,)``, in the order of the tensors; with the bits of :func:`norms_of_each`."""
        dtype = tensors[0].dtype
        output = self._outputs.get(dtype) or self._make_output(dtype)
        for take, part in output.buckets:
            stack = torch.stack(take(tensors))
            torch.linalg.vector_norm(stack, norm_type, dim=tuple(range(1, stack.ndim)), dtype=output.accumulated, out=part)
        if self.others:
            torch.stack(norms_of_each([tensors[place] for place in self.others], norm_type), out=output.others)
        # a copy, so that the buffer may be written again at the next step
        return output.norms.index_select(0, self.order)

    def _make_output(self, dtype: torch.dtype) -> _Output:
        """Plan where the norms of tensors of one dtype are written."""
        accumulated = accumulation_dtype(dtype)
        norms = torch.empty(len(self.order), dtype=accumulated or dtype.to_real(), device="cpu")
        *parts, others = norms.split([*map(len, self.buckets), len(self.others)])  # type: ignore[no-untyped-call]
        takers = [itemgetter(*bucket) for bucket in self.buckets]
        self._outputs[dtype] = _Output(norms, accumulated, list(zip(takers, parts, strict=True)), others)
        return self._outputs[dtype]


@dataclass(frozen=True, eq=False)
class _Output:
    """Where the norms of tensors of one dtype are written, which saves an allocation and a concatenation at each step.

    Args:
        norms: All norms, in the order of reading.
        accumulated: The dtype to accumulate in; None for the tensors' own.
        buckets: For each bucket a function that takes its tensors from all, and the part of ``norms`` for theirs.
        others: The part of ``norms`` for the tensors that are read one by one.
    """

    norms: Tensor
    accumulated: torch.dtype | None
    buckets: list[tuple[itemgetter[Any], Tensor]]
    others: Tensor


def _is_dense_in_order(tensor: Tensor) -> bool:
    """Return whether a gradient of this parameter lies in memory as its row of a stack would.

    Others would be summed up in another order than alone, which changes the last bits.
    """
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def _split_into_buckets(tensors: Sequence[Tensor], places: list[int]) -> tuple[tuple[int, ...], ...]:
    """Divide tensors of one shape into buckets of equal size, so that each has at least two."""
    largest = MAX_BUCKET_ENTRIES // tensors[places[0]].numel()
    count = -(-len(places) // largest)
    return tuple(tuple(places[i * len(places) // count : (i + 1) * len(places) // count]) for i in range(count))
