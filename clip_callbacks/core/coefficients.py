r"""From norms and limits to coefficients: the one division.

.. math::
    c_b = \min\Bigl(1, \frac{\ell_b}{n_b + 10^{-6}}\Bigr)
"""

from __future__ import annotations

import math
from ctypes import c_float

import torch
from torch import Tensor

EPS = 1e-6
"""Added to a norm before the division, as ``torch.nn.utils.clip_grad_norm_`` does."""

EPS_FLOAT32 = c_float(EPS).value

CLEARLY = 1.0 - 1e-6
"""Below this share of the limit no rounding in float32 makes a coefficient less than 1: the division may be left out."""

FEW = 1024
"""Numbers that Python compares faster than a dispatched operation."""


def coefficients(norms: Tensor, limits: Tensor | float, *, deferred: bool = False) -> tuple[Tensor, bool]:
    """The one division of the package: limits into coefficients.

    Args:
        norms: Shape ``(B,)``. A block whose norm is 0 or not finite gets 1: such a norm never scales a gradient.
        limits: Shape ``(B,)``, or one number. To the norm a number is divided by 1e-6 is added, for torch's bits; limits
            that adapt to the norms may be as small as these are, so that nothing may be added.
        deferred: Whether nothing is to be read on the host.

    Returns:
        Coefficients of shape ``(B,)``, or 0-dim if there is one; and whether any is below 1, or, of a deferred step, may be.
    """
    if deferred:
        return _limited(norms, _ratios(norms, limits)), True
    smallest, largest = _ends(norms)
    if isinstance(limits, float):
        if len(norms) == 1:
            coefficient = _coefficient(largest, limits, norms.dtype)
            return (norms.new_tensor(coefficient), True) if coefficient < 1.0 else (ones_like(norms), False)
        if largest + EPS <= limits * CLEARLY:
            return ones_like(norms), False
    ratios = _ratios(norms, limits)
    least = _ends(ratios)[0]
    if least >= 1.0:
        return ones_like(norms), False
    if 0.0 < smallest <= largest < math.inf and least >= 0.0:
        return ratios.clamp(max=1.0), True
    limited = _limited(norms, ratios)
    return limited, _ends(limited)[0] < 1.0


def _ratios(norms: Tensor, limits: Tensor | float) -> Tensor:
    """Reciprocal, then product: the two roundings of ``max_norm / (total_norm + 1e-6)`` in torch, for the same bits."""
    return (norms + EPS).reciprocal() * limits if isinstance(limits, float) else limits / norms


def _limited(norms: Tensor, ratios: Tensor) -> Tensor:
    """1 also where a limit is NaN: that is none."""
    return torch.where((norms > 0) & (norms < math.inf) & (ratios < 1.0), ratios, 1.0)


def _ends(numbers: Tensor) -> tuple[float, float]:
    """The smallest and the largest, on the host; both NaN if any is."""
    if len(numbers) > FEW:
        numbers = torch.stack(torch.aminmax(numbers))
    listed: list[float] = numbers.tolist()
    if not listed:
        return math.inf, 0.0
    return (min(listed), max(listed)) if sum(listed) >= 0.0 else (math.nan, math.nan)


def _coefficient(norm: float, limit: float, dtype: torch.dtype) -> float:
    """The same on the host, each operation rounded to the dtype as torch rounds it: most steps need no tensor at all."""
    if not 0.0 < norm < math.inf:
        return 1.0
    if dtype is torch.float64:
        return 1.0 / (norm + EPS) * limit
    reciprocal = c_float(1.0 / c_float(norm + EPS_FLOAT32).value).value
    return c_float(reciprocal * c_float(limit).value).value


_ONES: dict[tuple[int, torch.dtype], Tensor] = {}


def ones_like(norms: Tensor) -> Tensor:
    """Ones like norms, on a CPU made once: what most steps report costs nothing."""
    if type(norms) is not Tensor or not norms.is_cpu:  # made while a graph is captured or a program traced, they belong to that
        return torch.ones_like(norms)
    key = len(norms), norms.dtype
    if key not in _ONES:
        _ONES[key] = torch.ones_like(norms)
    return _ONES[key]
