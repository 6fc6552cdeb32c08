"""Whether losses are finite. An infinite loss in float16 may be the loss scale's doing, and is left to the gradients to judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def are_finite(losses: Sequence[Tensor]) -> bool:
    """Whether all losses are finite; this reads them."""
    return all(_is_finite(loss) for loss in losses)


def sum_of(losses: Sequence[Tensor]) -> Tensor:
    """The sum of losses, shape ``(1,)``, unread: finite only if each of them is."""
    first, *others = [_number(loss).reshape(1) for loss in losses]
    if not others:
        return first
    return torch.cat([first, *others]).sum(0, keepdim=True)


def _is_finite(loss: Tensor) -> bool:
    number: Any = _number(loss).tolist()  # reads the memory, where item() would call an operator
    while isinstance(number, list):  # of one entry, in any number of dimensions
        (number,) = number
    return math.isfinite(number)


def _number(loss: Tensor) -> Tensor:
    if loss.dtype is torch.float16:
        loss = torch.where(loss.isinf(), 0.0, loss.float())
    if loss.numel() == 1:
        return loss
    return loss.sum()
