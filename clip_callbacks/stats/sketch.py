r"""Quantiles of streams of norms in bounded memory, each within 1 %.

Bin i counts what lies in :math:`(\gamma^{i-1}, \gamma^i]` with :math:`\gamma = (1 + \alpha) / (1 - \alpha)`. Whatever lies there is
within a share :math:`\alpha` of :math:`2 \gamma^i / (\gamma + 1)`, which is what the sketch answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ACCURACY = 0.01
"""The relative error of a quantile at most."""

LOWEST, HIGHEST = 1e-16, 1e16
"""Norms above 0 that are smaller or larger count as these."""

GAMMA = (1 + ACCURACY) / (1 - ACCURACY)
"""The upper end of a bin over its lower end."""

FIRST = math.ceil(math.log(LOWEST) / math.log(GAMMA))
"""The power of gamma that the first bin of norms above 0 ends with; before it there is the bin of 0."""

BINS = math.ceil(math.log(HIGHEST) / math.log(GAMMA)) - FIRST + 2
"""How many bins each block has: about 3,700, which take 15 kB."""


class NormSketch:
    r"""Quantiles of the norms of B blocks over steps, at a cost for each step that stays the same however many there were.

    The q-quantile of n norms is that of rank :math:`q (n - 1)` from below, counted from 0; between two ranks it is interpolated
    linearly, as :func:`torch.quantile` does, and the answer is within 1 % of it.

    Source: Masson, Rim, Lee, "DDSketch: A fast and fully-mergeable quantile sketch with relative-error guarantees", VLDB 2019,
    arXiv 1908.10693, definitions 2 and 3. Unlike there, bins are laid out for all norms between 1e-16 and 1e16 and never collapse,
    norms outside count in the bins at the ends, and the quantile between two norms is not the lower one.

    Args:
        blocks: B.

    Example::

        >>> sketch = NormSketch(2)
        >>> sketch.add(torch.tensor([[1.0, 0.0], [2.0, 10.0], [3.0, 20.0]]))
        >>> sketch.quantiles((0.25, 1.0))
        tensor([[ 1.4918,  5.0373],
                [ 2.9742, 19.8867]], dtype=torch.float64)
    """

    def __init__(self, blocks: int = 1) -> None:
        """Count nothing yet."""
        self.blocks = blocks
        self._counts: Tensor | None = None

    @property
    def count(self) -> Tensor:
        """How many norms of each block there were, int64 of shape ``(B,)``."""
        return torch.zeros(self.blocks, dtype=torch.int64) if self._counts is None else self._counts.sum(1, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Take in norms.

        Args:
            values: Shape ``(steps, B)``, finite and at least 0.

        Raises:
            ValueError: If they are not.
        """
        wide = values.detach().to("cpu", torch.float64)
        if wide.shape != (len(wide), self.blocks):
            raise ValueError(f"`values` must be of shape (steps, {self.blocks}), got {tuple(values.shape)}.")
        if not wide.numel():
            return
        smallest, largest = (float(end) for end in torch.aminmax(wide))
        if not 0 <= smallest <= largest < math.inf:
            raise ValueError(f"`values` must be finite and at least 0, got {smallest} to {largest}: leave bad steps out.")
        if self._counts is None:
            self._counts = torch.zeros(self.blocks, BINS, dtype=torch.int32)
        powers = wide.clamp(LOWEST, HIGHEST).log_().div_(math.log(GAMMA)).ceil_().to(torch.int64)
        bins = torch.where(wide > 0, (powers - (FIRST - 1)).clamp_(1, BINS - 1), 0)
        bins += torch.arange(self.blocks) * BINS
        self._counts.view(-1).index_add_(0, bins.view(-1), torch.ones(bins.numel(), dtype=torch.int32))

    def quantiles(self, shares: Sequence[float]) -> Tensor:
        """Quantiles of each block's norms.

        Args:
            shares: Between 0 and 1, Q of them.

        Returns:
            Shape ``(Q, B)``, float64; NaN for a block without a norm.
        """
        answers = torch.full((len(shares), self.blocks), math.nan, dtype=torch.float64)
        if self._counts is None:
            return answers
        up_to = self._counts.cumsum(1, dtype=torch.int64)
        counts = up_to[:, -1]
        ranks = torch.tensor(shares, dtype=torch.float64)[:, None] * (counts - 1).clamp(min=0)
        lower, upper = _at_ranks(up_to, ranks.floor()), _at_ranks(up_to, ranks.ceil())
        return torch.where(counts > 0, torch.lerp(lower, upper, ranks.frac()), answers)

    def reset(self) -> None:
        """Forget everything."""
        self._counts = None

    def rows(self, places: Sequence[int | None]) -> NormSketch:
        """A sketch of other blocks: for each the one of this sketch that it goes on with, or None for a new one."""
        sketch = NormSketch(len(places))
        if self._counts is not None:
            sketch._counts = torch.zeros(len(places), BINS, dtype=torch.int32)
            for row, place in enumerate(places):
                if place is not None:
                    sketch._counts[row] = self._counts[place]
        return sketch

    def state(self) -> dict[str, Tensor]:
        """The bins that are not empty: of which block, which bin, how many norms; what a bin stands for never changes."""
        counts = torch.zeros(self.blocks, 0, dtype=torch.int32) if self._counts is None else self._counts
        blocks, bins = counts.nonzero().unbind(1)
        return {"blocks": blocks.to(torch.int32), "bins": bins.to(torch.int16), "counts": counts[blocks, bins]}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state` returned, of a sketch of as many blocks."""
        self.reset()
        if len(state["counts"]):
            self._counts = torch.zeros(self.blocks, BINS, dtype=torch.int32)
            self._counts[state["blocks"].long().cpu(), state["bins"].long().cpu()] = state["counts"].cpu()


def _at_ranks(up_to: Tensor, ranks: Tensor) -> Tensor:
    """The norms of some ranks, counted from 0: of the bins that they are in, what each stands for.

    Args:
        up_to: How many norms there are in each bin and those below it, ``(B, BINS)``.
        ranks: Whole numbers, ``(Q, B)``.

    Returns:
        Shape ``(Q, B)``: no norm in a bin is further away than 1 %.
    """
    bins = torch.searchsorted(up_to, ranks.T.to(torch.int64).contiguous(), right=True).T
    return torch.where(bins > 0, torch.exp((bins + (FIRST - 1)).double() * math.log(GAMMA)) * (2 / (GAMMA + 1)), 0.0)
