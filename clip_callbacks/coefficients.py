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
    if not deferred and isinstance(limits, float):
        if len(norms) == 1:
            coefficient = _coefficient(norms.tolist()[0], limits, norms.dtype)
            return (norms.new_tensor(coefficient), True) if coefficient < 1.0 else (ones_like(norms), False)
        if _largest(norms) + EPS <= limits * CLEARLY:
            return ones_like(norms), False
    # reciprocal, then product: the two roundings of `max_norm / (total_norm + 1e-6)` in torch, for the same bits
    ratios = (norms + EPS).reciprocal() * limits if isinstance(limits, float) else limits / norms
    if not deferred and _smallest(ratios) >= 1.0:
        return ones_like(norms), False
    if not deferred and _all_count(norms):
        return ratios.clamp(max=1.0), True
    limited = torch.where((norms > 0) & (norms < math.inf), ratios, 1.0).clamp(max=1.0)
    return limited, deferred or _smallest(limited) < 1.0


def _largest(numbers: Tensor) -> float:
    """On the host; NaN or any other if one is NaN."""
    return max(_listed(numbers if len(numbers) <= FEW else numbers.amax(0, keepdim=True)), default=0.0)


def _smallest(numbers: Tensor) -> float:
    """On the host; NaN or any other if one is NaN."""
    return min(_listed(numbers if len(numbers) <= FEW else numbers.amin(0, keepdim=True)), default=1.0)


def _all_count(norms: Tensor) -> bool:
    """Whether all are above 0 and finite."""
    if len(norms) > FEW:
        return _smallest(norms) > 0.0 and _largest(norms) < math.inf
    numbers = _listed(norms)
    return min(numbers) > 0.0 and math.isfinite(sum(numbers))


def _listed(numbers: Tensor) -> list[float]:
    listed: list[float] = numbers.tolist()
    return listed


def _coefficient(norm: float, limit: float, dtype: torch.dtype) -> float:
    """The same on the host, each operation rounded to the dtype as torch rounds it: most steps need no tensor at all."""
    if not 0.0 < norm < math.inf:
        return 1.0
    if dtype is torch.float64:
        return 1.0 / (norm + EPS) * limit
    return _float32(_float32(1.0 / _float32(norm + _float32(EPS))) * _float32(limit))


def _float32(number: float) -> float:
    return c_float(number).value


_ONES: dict[tuple[int, torch.dtype], Tensor] = {}


def ones_like(norms: Tensor) -> Tensor:
    """Ones like norms, on a CPU made once: what most steps report costs nothing."""
    if type(norms) is not Tensor or not norms.is_cpu:  # made while a graph is captured or a program traced, they belong to that
        return torch.ones_like(norms)
    key = len(norms), norms.dtype
    if key not in _ONES:
        _ONES[key] = torch.ones_like(norms)
    return _ONES[key]
