r"""Mean, standard deviation and share of zeros of the entries of gradients.

.. math::
    \bar g = \frac{1}{n} \sum_j g_j, \qquad
    \sigma = \sqrt{\frac{1}{n} \sum_j (g_j - \bar g)^2}, \qquad
    \text{zeros} = \frac{|\{j : g_j = 0\}|}{n}

Entries are converted to float64, a chunk at a time: squares of float32 numbers stay in its range, and a mean far larger than the
spread costs no digits, because the mean of the chunk is subtracted before squaring. Chunks, tensors and ranks are then combined by
their counts (Chan, Golub and LeVeque, 1979):

.. math::
    M = \sum_i M_i + \sum_i n_i (\bar g_i - \bar g)^2, \qquad \sigma = \sqrt{M / n}
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from clip_callbacks.core.blocks import OUTSIDE, Partition
from clip_callbacks.core.gradients import Gradients
from clip_callbacks.core.tensor_norms import float64_device

MAX_ENTRIES_ON_CPU = 1 << 17
"""Largest number of entries that a CPU converts together, to 1 MiB in float64: larger memory is given back and mapped each time."""

MAX_ENTRIES_ELSEWHERE = 1 << 23
"""Largest number of entries that another device converts together, to 64 MiB in float64."""

MOMENTS = 4
"""Number of moments of a set of entries: their count, their mean, the sum of squared deviations from it, the count of zeros."""


class Statistics(NamedTuple):
    """Statistics of B blocks of gradient entries, each float64 of shape ``(B,)`` on the host.

    They are NaN for a block that has no gradient, or whose mean or standard deviation is not finite.

    Args:
        mean: Means of the entries.
        std: Population standard deviations of the entries.
        zeros: Shares of entries that are exactly 0, between 0 and 1.
    """

    mean: Tensor
    std: Tensor
    zeros: Tensor


class GradientMoments:
    """Moments of one step's gradients, computed at once on their device, without a host sync.

    A complex entry counts as two, its real and its imaginary part. Entries that a sparse gradient does not store count as zeros.

    Args:
        gradients: The gradients.
        blocks: Partition of their table's parameters into B blocks.
        factor: Factor on the gradients, a number or a tensor of one entry, that leads to those whose statistics are wanted.
    """

    @torch.no_grad()
    def __init__(self, gradients: Gradients, blocks: Partition, factor: float | Tensor = 1.0) -> None:
        self._blocks = blocks
        self._factor = factor
        self._reduction = gradients.table.reduction
        pairs = zip(gradients.positions, gradients.tensors, strict=True)
        tensors = {position: _as_real(tensor) for position, tensor in pairs if blocks.index[position] != OUTSIDE}
        self._unstored = _unstored(gradients, blocks, tensors)
        read = [(owners, _row_moments(rows)) for owners, rows in _batches(tensors)]
        self._owners = [owner for owners, _ in read for owner in owners]
        self._moments: Tensor | None = None
        if read:
            self._moments = torch.cat([moments.to(read[0][1].device) for _, moments in read])

    def statistics(self) -> Statistics:
        """Return the statistics of the blocks. This reads the moments on the host.

        Where ranks hold parts of the gradients, this is a collective, and all ranks get equal statistics of whole tensors.
        """
        moments, owners, count = self._on_host(), [*self._owners, *self._unstored], len(self._blocks.names)
        places = torch.tensor(owners, dtype=torch.int64, device="cpu")
        if self._reduction:
            # a non-finite copy on a rank whose copy does not count still reaches the result, as in norms: 0 * NaN is NaN
            moments[:, [0, 2, 3]] *= self._reduction.counts.cpu()[places, None]
        combined = _combined(moments, self._blocks.numbers[places], count)
        if self._reduction:
            everybody = self._reduction.of_each_rank(combined)
            numbers = torch.arange(count, dtype=torch.int64, device="cpu").repeat(len(everybody))
            combined = _combined(everybody.reshape(-1, MOMENTS), numbers, count)
        return _statistics(combined, float(self._factor))

    def _on_host(self) -> Tensor:
        """Return the moments of all sets of entries, those of unstored ones last, float64 of shape ``(sets, 4)``."""
        unstored = torch.tensor([[count, 0, 0, count] for count in self._unstored.values()], dtype=torch.float64, device="cpu")
        unstored = unstored.reshape(-1, MOMENTS)
        if self._moments is None:
            return unstored
        return torch.cat([self._moments.cpu(), unstored])


def _as_real(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.detach().reshape(-1)


def _unstored(gradients: Gradients, blocks: Partition, stored: Mapping[int, Tensor]) -> dict[int, int]:
    """Return the number of entries that each sparse gradient does not store, by the position of its parameter."""
    counts = {}
    for position in gradients.table.nonempty[0]:
        gradient = gradients.table.tensors[position].grad
        if gradient is not None and gradient.layout is not torch.strided and blocks.index[position] != OUTSIDE:
            counts[position] = gradient.numel()
            if gradient.is_complex():
                counts[position] *= 2
            # a sparse gradient that stores nothing is not among the gradients
            if position in stored:
                counts[position] -= stored[position].numel()
    return counts


def _batches(tensors: Mapping[int, Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield tensors, read together as rows where they have equal sizes, dtypes and devices; a large one in rows of its own.

    Args:
        tensors: Flat tensors by the positions of their parameters, none of them empty.

    Yields:
        The positions that rows belong to, and the rows.
    """
    kinds: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for position, tensor in tensors.items():
        kinds.setdefault((tensor.numel(), tensor.dtype, tensor.device), []).append(position)
    for (size, _, device), positions in kinds.items():
        limit = MAX_ENTRIES_ON_CPU if device.type == "cpu" else MAX_ENTRIES_ELSEWHERE
        together = max(1, limit // size)
        for start in range(0, len(positions), together):
            batch = positions[start : start + together]
            if len(batch) > 1:
                yield batch, torch.stack([tensors[position] for position in batch])
            else:
                for piece in tensors[batch[0]].split(limit):  # type: ignore[no-untyped-call]
                    yield batch, piece.unsqueeze(0)


def _row_moments(rows: Tensor) -> Tensor:
    """Return the moments of each of k rows, float64 of shape ``(k, 4)``."""
    rows = rows.to(float64_device(rows.device))
    wide = rows.to(torch.float64, copy=True)
    means = wide.mean(1)
    squares = torch.linalg.vector_norm(wide.sub_(means.unsqueeze(1)), dim=1).square()
    # as float32, which counts exactly up to 2^24: on a CPU a sum of bools takes four times as long, one of float64 twice
    zeros = torch.eq(rows, 0.0, out=torch.empty_like(rows, dtype=torch.float32)).sum(1)
    return torch.stack([torch.full_like(means, rows.shape[1]), means, squares, zeros.double()], dim=1)


def _combined(moments: Tensor, blocks: Tensor, count: int) -> Tensor:
    """Combine moments of sets of entries to those of blocks.

    Args:
        moments: Moments of each set, ``(sets, 4)``.
        blocks: Block number of each set, ``(sets,)``.
        count: Number B of blocks.

    Returns:
        Moments of the blocks, ``(B, 4)``; all 0 for a block without entries.
    """
    counts, means, squares, zeros = moments.unbind(1)
    sums = moments.new_zeros(count, MOMENTS)
    sums.index_add_(0, blocks, torch.stack([counts, counts * means, squares, zeros], dim=1))
    # 0, and not NaN, without entries: another rank may have some
    sums[:, 1] /= sums[:, 0].clamp(min=1.0)
    sums[:, 2].index_add_(0, blocks, counts * (means - sums[blocks, 1]).square())
    return sums


def _statistics(moments: Tensor, factor: float) -> Statistics:
    counts, means, squares, zeros = moments.unbind(1)
    # 0 / 0 is NaN, of a block without entries
    each = Statistics(means * factor, (squares / counts).sqrt() * abs(factor), zeros / counts)
    are_finite = each.mean.isfinite() & each.std.isfinite()
    return Statistics(*(torch.where(are_finite, values, math.nan) for values in each))
