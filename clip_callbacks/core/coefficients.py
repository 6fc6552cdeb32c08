r"""Coefficients from norms and limits, by the one division of the package.

.. math::
    c_b = \min\Bigl(1, \frac{\ell_b}{n_b + 10^{-6}}\Bigr)

for a fixed limit :math:`\ell`, as in torch; for limits that adapt to the norms nothing is added.
"""

from __future__ import annotations

import math
from ctypes import c_float
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from clip_callbacks.core.few_values import extremes

EPS = 1e-6
"""Added to a norm before the division, as ``torch.nn.utils.clip_grad_norm_`` does."""

EPS_FLOAT32 = c_float(EPS).value
"""EPS rounded to float32."""

SAFE_SHARE_OF_LIMIT = 1.0 - 1e-6
"""Share of the limit up to which a norm needs no division: no rounding in float32 makes its coefficient less than 1."""


def coefficients(norms: Tensor, limits: Tensor | float, *, deferred: bool = False) -> tuple[Tensor, bool]:
    """Divide limits by norms: the one division of the package.

    Args:
        norms: Norms of the blocks, shape ``(B,)``, or 0-dim for one block. A block whose norm is 0 or not finite gets the
            coefficient 1: such a norm never scales a gradient.
        limits: Limits of the blocks, shape ``(B,)``, or one number for all. Under a number 1e-6 is added to the norm, for torch's
            bits. A tensor may come from an adaptive limit, which can be as small as 1e-6 itself, so that nothing is added.
        deferred: If True, nothing is read on the host.

    Returns:
        Coefficients of shape ``(B,)``, or 0-dim if one is for all; and whether any is below 1 (under ``deferred`` always True,
        because the host does not know).

    Raises:
        ValueError: If a limit is below 0, which would turn gradients round. On a device that the host must not read it counts as 0.
    """
    if deferred:
        return _limited_on_device(norms, limits), True
    if isinstance(limits, float) and norms.numel() == 1:
        return _coefficient_of_one(norms, limits)
    smallest, largest = extremes(norms)
    # most healthy steps end here, after one read and no operation on tensors; False for a NaN
    if isinstance(limits, float) and largest + EPS <= limits * SAFE_SHARE_OF_LIMIT:
        return ones_like(norms), False
    ratios = _ratios(norms, limits)
    are_ordinary = 0.0 < smallest <= largest < math.inf  # False for a NaN
    if isinstance(limits, float) and are_ordinary:
        # no rounding changes the order of numbers, so that the extremes of the ratios are those of the norms
        least, most = _ratio(largest, limits, norms.dtype), _ratio(smallest, limits, norms.dtype)
    else:
        least, most = extremes(ratios)
    if least >= 1.0:
        return ones_like(norms), False
    if are_ordinary and least >= 0.0:
        if most > 1.0:
            ratios.clamp_(max=1.0)
        return ratios, True
    limited = _limited(norms, ratios)
    least = float(limited.amin())
    _check_sign(least, limits)
    return limited, least < 1.0


def _ratios(norms: Tensor, limits: Tensor | float) -> Tensor:
    if not isinstance(limits, float):
        return limits / norms
    divisors = norms + _operand(EPS, norms)
    # Reciprocal, then product, because torch evaluates `max_norm / (total_norm + 1e-6)` in this way: two roundings, equal bits.
    return divisors.reciprocal_().mul_(_operand(limits, norms))


def _operand(number: float, norms: Tensor) -> Tensor | float:
    """Return a number as a 0-dim tensor of the dtype of norms on the CPU, where a product with it takes a third of the time."""
    # not elsewhere: a tensor made outside a program that is traced does not belong to it
    if type(norms) is Tensor and norms.is_cpu:
        return _constant(number, norms.dtype)
    return number


@lru_cache(maxsize=64)
def _constant(number: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(number, dtype=dtype, device="cpu")


def _limited(norms: Tensor, ratios: Tensor) -> Tensor:
    """Return coefficients from ratios: 1 where the norm is 0 or not finite, or where the limit is NaN, which is no limit."""
    return torch.where((norms > 0) & (norms < math.inf) & (ratios < 1.0), ratios, 1.0)


def _limited_on_device(norms: Tensor, limits: Tensor | float) -> Tensor:
    """Return coefficients without a host sync."""
    found = _limited(norms, _ratios(norms, limits))
    if isinstance(limits, Tensor):
        return found.clamp_(min=0.0)
    _check_sign(limits, limits)
    return found


def _coefficient_of_one(norms: Tensor, limit: float) -> tuple[Tensor, bool]:
    """Return the coefficient of a single block, and whether it is below 1.

    It is computed on the host, with every operation rounded to the dtype of the norm as torch rounds it.

    Args:
        norms: Norm of the block, float32 or float64, one entry.
        limit: Limit of the block.
    """
    norm: Any = norms.tolist()
    if norms.ndim:
        (norm,) = norm
    # the healthy step of most runs ends here; so does a NaN, which fails every comparison
    if norm + EPS <= limit * SAFE_SHARE_OF_LIMIT or not 0.0 < norm < math.inf:
        return ones_like(norms), False
    coefficient = _ratio(norm, limit, norms.dtype)
    if 0.0 <= coefficient < 1.0:
        return norms.new_full((), coefficient), True
    _check_sign(coefficient, limit)
    return ones_like(norms), False


def _check_sign(coefficient: float, limits: Tensor | float) -> None:
    if coefficient < 0.0:
        if isinstance(limits, Tensor):
            limits = float(limits.amin())
        raise ValueError(f"`step` of a limit must return limits of 0 or more, got {limits:.4g}, which would turn gradients round.")


def _ratio(norm: float, limit: float, dtype: torch.dtype) -> float:
    """Return one of the ratios of :func:`_ratios` for a fixed limit, in the bits of a dtype, float32 or float64."""
    if dtype is torch.float64:
        return 1.0 / (norm + EPS) * limit
    # A float64 operation on float32 numbers, rounded to float32, has the bits of the float32 operation.
    reciprocal = c_float(1.0 / c_float(norm + EPS_FLOAT32).value).value
    return c_float(reciprocal * c_float(limit).value).value


def ones_like(norms: Tensor) -> Tensor:
    """Return ones of the shape, dtype and device of norms."""
    # Not cached elsewhere: a tensor made while a CUDA graph is captured, or a program traced, belongs to that graph or program.
    if type(norms) is not Tensor or not norms.is_cpu:
        return torch.ones_like(norms)
    return ones(norms.numel(), norms.dtype)


@lru_cache(maxsize=1024)
def ones(count: int, dtype: torch.dtype) -> Tensor:
    """Return ones of shape ``(count,)`` on the CPU, made once, because most steps report nothing else."""
    return torch.ones(count, dtype=dtype, device="cpu")
