"""Vectors of norms that are read on the host, as numbers of Python where there are few.

An operation of torch takes a few microseconds, and in a fit, where a step finds little of what it needs in the caches, ten to
twenty.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EUCLIDEAN = 2.0
"""The order p of :func:`norm_of_products`."""

MAX_VALUES_FOR_PYTHON = 256
"""Number of values up to which Python is no slower than an operation of torch in a fit."""


def extremes(values: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest of values that are 0 or more; both NaN if any is NaN, and (inf, 0) if there is none."""
    if values.numel() > MAX_VALUES_FOR_PYTHON:
        values = torch.stack(torch.aminmax(values))
    listed: list[float] = values.tolist()
    if not listed:
        return math.inf, 0.0
    if sum(listed) >= 0.0:
        return min(listed), max(listed)
    return math.nan, math.nan  # Python's min and max pass over a NaN, the sum of values that are 0 or more does not


def norm_of_products(norms: Tensor, factors: Tensor) -> float:
    """Return the Euclidean norm of ``norms * factors`` in float64, which neither overflows nor underflows on the way.

    An infinite norm hides a NaN.
    """
    return math.hypot(*[norm * factor for norm, factor in zip(norms.tolist(), factors.tolist(), strict=True)])
