"""Limits that are a quantile of the norms seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import clip_callbacks.core.limits._window as last_norms
from clip_callbacks.core.arguments import as_count, as_finite
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitState

ROOM = 10.0
"""How many times as large as the largest norm of a window the next one may be in it."""


@dataclass(frozen=True)
class QuantileLimit(Limit):
    r"""AutoClip: a quantile of the last norms, this step's included; one setting for losses of any scale.

    .. math::
        \ell_b(t) = Q_{\text{quantile}}\bigl(n_b(t - \text{window} + 1), \dots, n_b(t)\bigr)

    exact over the window, with linear interpolation. With the usual 0.1 nine steps in ten are clipped: AutoClip sets the length of
    steps rather than cutting peaks; for the latter take 0.9 and more.

    A norm enters the window as it is, since a limit that saw its own clipped norms could never rise; but at most 10 times as large
    as the largest one there, so that at high quantiles no single spike lifts the limit far.

    Remembers ``16 * window`` bytes for each block: 16 kB with the defaults, but 16 kB for each output row under ``scope="unit"``.

    Source: Seetharaman, Wichern, Pardo and Le Roux, "AutoClip: Adaptive gradient clipping for source separation networks", MLSP
    2020 (arXiv 2007.14469), equation 3. Unlike there, the history is bounded, and takes in finite norms above 0 only.

    Args:
        quantile: Between 0 and 1: 0.1 is their p = 10.
        window: How many norms of each block are remembered, at least 2.
        warmup: How many norms a block must have shown before it has a limit.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> limit = QuantileLimit(quantile=0.5)
        >>> state = limit.init(1)
        >>> for norm in (1.0, 2.0, 9.0):
        ...     value, state = limit.step(BlockNorms(torch.tensor([norm])), state)
        >>> value
        tensor([2.], dtype=torch.float64)
    """

    quantile: float = 0.1
    window: int = 1000
    warmup: int = 0

    def __post_init__(self) -> None:
        """Check every argument."""
        object.__setattr__(self, "quantile", as_finite(self.quantile, "quantile", high=1.0))
        as_count(self.window, "window", least=2)
        as_count(self.warmup, "warmup", least=0)

    def init(self, blocks: int) -> LimitState:
        """An empty window."""
        return last_norms.empty(self.window, blocks)

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """A limit for each block."""
        norms = blocks.norms.double()
        after = last_norms.add(torch.minimum(norms, ROOM * last_norms.largest(state)), norms > 0, state)
        limits = last_norms.quantile(after, self.quantile)
        return (torch.where(after["count"] > self.warmup, limits, torch.inf) if self.warmup else limits), after
