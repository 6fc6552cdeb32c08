"""Weight of the upper tail of each block's values: how much farther than normal values they reach above the median.

A window of some hundred values tells little about its tail. So the share of values far above the median is remembered for longer.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

FAR = 2.5
"""Robust standard deviations above the median from which a value counts for the tail; 0.6 % of normal values lie beyond them."""

EXTREME = 6.0
"""Robust standard deviations above the median up to which a value counts for the tail even if it is above the limit."""

FIRST_SHARE = 0.02
"""Share before any value is known, that of Student's t with 5 degrees of freedom: a limit that is too high at first is safer."""

FIRST_COUNT = 100
"""Number of values that the first share weighs as much as."""

MEMORY = 1000
"""Number of values over which the share is an exponential mean in the long run."""

CAUTION = 1.4
"""Factor of h. The share is uncertain, h is the logarithm of a false alarm, and Student's t has a heavier tail than its h tells."""

NORMAL = NormalDist()


def empty(blocks: int) -> Tensor:
    """Return the first share of each block, float64, shape ``(B,)``."""
    return torch.full((blocks,), FIRST_SHARE, dtype=torch.float64, device="cpu")


def add(share: Tensor, is_far: Tensor, judged: Tensor) -> Tensor:
    """Return the shares after one more value of each block.

    Args:
        share: Share of the values that were far above the median, float64, shape ``(B,)``; not changed.
        is_far: True for blocks whose new value is, bool, shape ``(B,)``.
        judged: Number of values that were judged before, int64, shape ``(B,)``.
    """
    # a plain mean of the first share and the values, until it is as long as the memory
    weight = 1.0 / (judged.clamp(min=0) + FIRST_COUNT + 1).clamp(max=MEMORY).double()
    return share + weight * (is_far.double() - share)


def widening(share: Tensor, z: float) -> Tensor:
    r"""Return the ratio, 1 or more, of the quantile with the z-score z to that of normal values with the same deviation.

    Values are taken for :math:`x \exp(h x^2 / 2)` of a normal x, which is Tukey's h distribution. Its h follows from the share p:
    FAR is the image of :math:`q = -\Phi^{-1}(p)`, so that :math:`h = 2 \ln(\text{FAR} / q) / q^2`.

    Args:
        share: Share of the values that were far above the median, float64, shape ``(B,)``.
        z: Number of standard deviations of a normal distribution.
    """
    # With q above FAR the tail would be lighter than a normal one, which a limit has no use for; below 1, most values are far.
    normal: Tensor = (-torch.special.ndtri(share)).clamp(1.0, FAR)
    h = CAUTION * 2.0 * (FAR / normal).log() / normal.square()
    widening: Tensor = (0.5 * z**2 * h).exp()
    return widening


def widening_of_one(share: float, z: float) -> float:
    """Return what :func:`widening` returns, of one block on the host."""
    normal = min(max(-NORMAL.inv_cdf(share), 1.0), FAR)
    # beyond e to the power of 700 Python raises an error where torch returns inf; a limit takes neither
    return math.exp(min(0.5 * z**2 * (CAUTION * 2.0 * math.log(FAR / normal) / normal**2), 700.0))


def add_of_one(share: float, is_far: bool, judged: int) -> float:
    """Return what :func:`add` returns, of one block on the host."""
    return share + 1.0 / min(max(judged, 0) + FIRST_COUNT + 1, MEMORY) * (is_far - share)
