"""A limit that is a quantile of the last norms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import clip_callbacks.core.limits._window as norm_window
from clip_callbacks.core.arguments import as_count, as_finite
from clip_callbacks.core.limits._window_of_one import WindowOfOne
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitOfOne, LimitState, step_of_one

MAX_RATIO_TO_LARGEST = 10.0
"""Largest ratio of a norm that enters the window to the largest one in it; a larger norm enters as that."""


@dataclass(frozen=True)
class QuantileLimit(Limit):
    r"""AutoClip: a quantile of the block's last norms, which fits losses of any scale.

    .. math::
        \ell_b(t) = Q_{\text{quantile}}\bigl(n_b(t - \text{window} + 1), \dots, n_b(t)\bigr)

    with the norms :math:`n_b` of block b before clipping, this step's included: the exact quantile of the window, with linear
    interpolation. With the usual 0.1 nine steps in ten are clipped: AutoClip sets the length of the steps. To cut peaks only,
    take 0.9 and more.

    A norm enters the window unclipped, because a limit that saw its own clipped norms could never rise. But it enters as at most 10
    times the largest norm in the window, so that at high quantiles a single spike cannot lift the limit far.

    The state takes ``16 * window`` bytes for each block: 16 kB with the defaults, and with ``scope="unit"`` 16 kB for each output
    row.

    Source: Seetharaman, Wichern, Pardo and Le Roux, "AutoClip: Adaptive gradient clipping for source separation networks", MLSP
    2020 (arXiv 2007.14469), equation 3. Unlike there, the history is bounded, and holds finite norms above 0 only.

    Args:
        quantile: Quantile of the norms, between 0 and 1; 0.1 is the paper's p = 10.
        window: Number of norms that are kept for each block, at least 2.
        warmup: Number of norms of a block before it has a limit, at least 0.

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
        """Return an empty window for each block."""
        return norm_window.empty(self.window, blocks)

    def _of_one(self, state: LimitState) -> LimitOfOne:
        """Return the limit in numbers of Python, for a single block on the host."""
        return _QuantileOfOne(self, WindowOfOne.of(state))

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """Return the limit of each block, and the state after the step."""
        single = step_of_one(self, blocks, state)
        if single is not None:
            return single
        norms = blocks.norms.double()
        # the largest of an empty window is inf: the first norm has no bound
        entering = torch.minimum(norms, MAX_RATIO_TO_LARGEST * norm_window.largest(state))
        after = norm_window.add(entering, norms > 0, state)
        # after the norm has entered: as in the paper, the history includes this step
        limits = norm_window.quantile(after, self.quantile)
        if self.warmup:
            # `>`, because the norm of this step is counted already
            limits = torch.where(after["count"] > self.warmup, limits, torch.inf)
        return limits, after


class _QuantileOfOne(LimitOfOne):
    """The arithmetic of :meth:`QuantileLimit.step` with numbers."""

    __slots__ = ("_limit", "_window")

    def __init__(self, limit: QuantileLimit, window: WindowOfOne) -> None:
        self._limit, self._window = limit, window

    def step(self, value: float, *, are_losses: bool = False) -> tuple[float, LimitOfOne]:
        window, after = self._window, self
        if value > 0:
            window = window.added(min(value, MAX_RATIO_TO_LARGEST * window.largest()))
            after = _QuantileOfOne(self._limit, window)
        if window.count <= self._limit.warmup:
            return math.inf, after
        return window.quantile(self._limit.quantile), after

    def state(self) -> LimitState:
        return self._window.state()
