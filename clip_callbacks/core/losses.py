"""Sums of losses, and checks of them for NaN and infinity.

An infinite float16 loss is taken as finite: it may be an effect of the loss scale, and the gradients will show whether it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def are_finite(losses: Sequence[Tensor]) -> bool:
    """Return whether all losses are finite. This reads them on the host."""
    for each in losses:
        loss = each
        if loss.ndim or loss.dtype is torch.float16:
            loss = as_checked(loss).reshape(())
        number: Any = loss.tolist()  # reads the memory, where item() would dispatch an operator
        if not math.isfinite(number):
            return False
    return True


def sum_of(losses: Sequence[Tensor]) -> Tensor:
    """The sum of losses, shape ``(1,)``, which is finite only if each of them is. Nothing is read on the host."""
    # added up, since inf and NaN survive a sum, or turn into NaN, so that one number tells of all
    first, *others = [as_checked(loss).reshape(1) for loss in losses]
    if not others:
        return first
    return torch.cat([first, *others]).sum(0, keepdim=True)


def weighted_sum(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of one loss or more, shape ``(1,)``, float64 where the device has it. Nothing is read on the host."""
    # in float32 a sum of losses, or of losses that are multiplied by a loss scale, may overflow where their mean does not
    parts = [_wide(entry_of(loss)) * weight for loss, weight in zip(losses, weights, strict=True)]
    return torch.cat([part.to(parts[0].device) for part in parts]).sum(0, keepdim=True)


def as_checked(loss: Tensor) -> Tensor:
    """Return a loss as the checks take it: the sum of one that has several entries, and 0 for an infinite float16 loss."""
    # Float16 only: bfloat16 reaches as far as float32. NaN stays NaN, because no loss scale makes one.
    if loss.dtype is torch.float16:
        loss = torch.where(loss.isinf(), 0.0, loss.float())
    if loss.numel() == 1:
        return loss
    return loss.sum()


def entry_of(loss: Tensor) -> Tensor:
    """Return a loss as a tensor of shape ``(1,)``; the sum of one that has several entries."""
    if loss.numel() != 1:
        loss = loss.sum()
    return loss.reshape(1)


def _wide(loss: Tensor) -> Tensor:
    if loss.device.type == "mps":  # which has no float64
        return loss.float()
    return loss.double()
