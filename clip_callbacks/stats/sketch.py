r"""Quantiles of streams of norms in bounded memory, each within 1 %.

Bin i counts the norms in :math:`(\gamma^{i-1}, \gamma^i]`, where :math:`\gamma = (1 + \alpha) / (1 - \alpha)`. Each of them is
represented by :math:`2 \gamma^i / (\gamma + 1)`, with a relative error of at most :math:`\alpha`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

SketchState: TypeAlias = Mapping[str, Tensor]
"""The bins of a sketch that are not empty, as three tensors of equal length."""

RELATIVE_ERROR = 0.01
"""Largest relative error of a quantile: alpha."""

SMALLEST_NORM, LARGEST_NORM = 1e-16, 1e16
"""Norms that smaller and larger norms count as; 0 has a bin of its own."""

GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
"""Ratio of the upper end of a bin to its lower end."""

FIRST_POWER = math.ceil(math.log(SMALLEST_NORM) / math.log(GAMMA))
"""Power of gamma at which the first bin of positive norms ends; the bin of 0 precedes it."""

BIN_COUNT = math.ceil(math.log(LARGEST_NORM) / math.log(GAMMA)) - FIRST_POWER + 2
"""Number of bins of each block: about 3,700, in 15 kB."""


class NormSketch:
    r"""Quantiles of the norms of B blocks over steps, in constant memory and at a constant cost per step.

    The q-quantile of n norms is the one of rank :math:`q (n - 1)` in ascending order, counted from 0, with linear interpolation
    between ranks, as in :func:`torch.quantile`. The sketch returns it with a relative error of at most 1 %.

    Source: Masson, Rim, Lee, "DDSketch: A fast and fully-mergeable quantile sketch with relative-error guarantees", VLDB 2019,
    arXiv 1908.10693, definitions 2 and 3. Unlike there, bins are allocated for all norms between 1e-16 and 1e16 and never
    collapse, norms outside count in the bins at the ends, and quantiles are interpolated.

    Args:
        blocks: Number B of blocks.

    Example::

        >>> sketch = NormSketch(2)
        >>> sketch.add(torch.tensor([[1.0, 0.0], [2.0, 10.0], [3.0, 20.0]]))
        >>> sketch.quantiles((0.25, 1.0))
        tensor([[ 1.4918,  5.0373],
                [ 2.9742, 19.8867]], dtype=torch.float64)
    """

    def __init__(self, blocks: int = 1) -> None:
        """Begin without norms."""
        self.blocks = blocks
        self._counts: Tensor | None = None

    @property
    def count(self) -> Tensor:
        """Return the number of norms of each block, int64 of shape ``(B,)``."""
        if self._counts is None:
            return torch.zeros(self.blocks, dtype=torch.int64, device="cpu")
        return self._counts.sum(1, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Add the norms of some steps.

        Args:
            values: Norms, finite and at least 0, shape ``(steps, B)``.

        Raises:
            ValueError: If any norm is negative or not finite, or the shape is another.
        """
        wide = values.detach().to("cpu", torch.float64)
        if wide.shape != (len(wide), self.blocks):
            raise ValueError(f"`values` must be of shape (steps, {self.blocks}), got {tuple(values.shape)}.")
        if not wide.numel():
            return
        smallest, largest = (float(end) for end in torch.aminmax(wide))
        if not 0 <= smallest <= largest < math.inf:
            raise ValueError(f"`values` must be finite and at least 0, got {smallest} to {largest}. Leave bad steps out.")
        if self._counts is None:
            self._counts = torch.zeros(self.blocks, BIN_COUNT, dtype=torch.int32, device="cpu")
        powers = wide.clamp(SMALLEST_NORM, LARGEST_NORM).log_().div_(math.log(GAMMA)).ceil_().to(torch.int64)
        bins = torch.where(wide > 0, (powers - (FIRST_POWER - 1)).clamp_(1, BIN_COUNT - 1), 0)
        bins += torch.arange(self.blocks, dtype=torch.int64, device="cpu") * BIN_COUNT
        self._counts.view(-1).index_add_(0, bins.view(-1), torch.ones(bins.numel(), dtype=torch.int32, device="cpu"))

    def quantiles(self, shares: Sequence[float]) -> Tensor:
        """Return quantiles of each block's norms.

        Args:
            shares: Q numbers between 0 and 1.

        Returns:
            Quantiles, float64 of shape ``(Q, B)``; NaN for a block without norms.
        """
        answers = torch.full((len(shares), self.blocks), math.nan, dtype=torch.float64, device="cpu")
        if self._counts is None:
            return answers
        up_to = self._counts.cumsum(1, dtype=torch.int64)
        counts = up_to[:, -1]
        ranks = torch.tensor(shares, dtype=torch.float64, device="cpu")[:, None] * (counts - 1).clamp(min=0)
        lower, upper = _at_ranks(up_to, ranks.floor()), _at_ranks(up_to, ranks.ceil())
        return torch.where(counts > 0, torch.lerp(lower, upper, ranks.frac()), answers)

    def representatives(self) -> Tensor:
        """Return as many norms as the first block has, float64 of shape ``(steps,)``, in ascending order.

        The norms of a bin are spread evenly over it. Each is within 2 %, the width of a bin.
        """
        if self._counts is None:
            return torch.empty(0, dtype=torch.float64, device="cpu")
        counts = self._counts[0].long()
        bins = torch.arange(BIN_COUNT, dtype=torch.int64, device="cpu").repeat_interleave(counts)
        place_in_bin = torch.arange(len(bins), dtype=torch.int64, device="cpu") - (counts.cumsum(0) - counts)[bins]
        powers = bins + (FIRST_POWER - 2) + (place_in_bin.double() + 0.5) / counts[bins]
        return torch.where(bins > 0, torch.exp(powers * math.log(GAMMA)), 0.0)

    def merge(self, other: NormSketch) -> None:
        """Add all norms of a sketch of as many blocks."""
        if other._counts is None:
            return
        if self._counts is None:
            self._counts = torch.zeros_like(other._counts)
        self._counts += other._counts

    def reset(self) -> None:
        """Discard all norms."""
        self._counts = None

    @classmethod
    def joined(cls, sketches: Sequence[NormSketch]) -> NormSketch:
        """Return a sketch with the blocks of several sketches, each of which has norms."""
        joined = cls(sum(sketch.blocks for sketch in sketches))
        joined._counts = torch.cat([sketch._counts for sketch in sketches if sketch._counts is not None])
        return joined

    def rows(self, places: Sequence[int | None]) -> NormSketch:
        """Return a sketch of other blocks.

        Args:
            places: Index in this sketch of each block of the other one; None for a block that begins without norms.
        """
        sketch = NormSketch(len(places))
        if self._counts is not None:
            sketch._counts = torch.zeros(len(places), BIN_COUNT, dtype=torch.int32, device="cpu")
            for row, place in enumerate(places):
                if place is not None:
                    sketch._counts[row] = self._counts[place]
        return sketch

    def state(self) -> SketchState:
        """Return the block, the index and the count of each bin that is not empty; the ends of a bin never change."""
        counts = torch.zeros(self.blocks, 0, dtype=torch.int32, device="cpu") if self._counts is None else self._counts
        blocks, bins = counts.nonzero().unbind(1)
        return {"blocks": blocks.to(torch.int32), "bins": bins.to(torch.int16), "counts": counts[blocks, bins]}

    def load(self, state: SketchState) -> None:
        """Continue from a state of :meth:`state`, of a sketch of as many blocks."""
        self.reset()
        if len(state["counts"]):
            self._counts = torch.zeros(self.blocks, BIN_COUNT, dtype=torch.int32, device="cpu")
            self._counts[state["blocks"].long().cpu(), state["bins"].long().cpu()] = state["counts"].cpu()


def _at_ranks(up_to: Tensor, ranks: Tensor) -> Tensor:
    """Return the norms of some ranks, each with a relative error of at most 1 %.

    Args:
        up_to: Cumulative number of norms up to each bin, shape ``(B, BIN_COUNT)``.
        ranks: Ranks in ascending order of the norms, counted from 0, whole numbers of shape ``(Q, B)``.

    Returns:
        Norms, float64 of shape ``(Q, B)``.
    """
    bins = torch.searchsorted(up_to, ranks.T.to(torch.int64).contiguous(), right=True).T
    return torch.where(bins > 0, torch.exp((bins + (FIRST_POWER - 1)).double() * math.log(GAMMA)) * (2 / (GAMMA + 1)), 0.0)
