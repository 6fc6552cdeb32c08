"""Whether tensors of any dtype have changed, found out from their bits: ``tensor.data`` goes around version counters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from clip_callbacks.core.reduction import shard_of

PIECE = 1 << 22
"""Entries that are summed at a time: torch holds them in int64 meanwhile."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an entry, the dtype as which it can be read."""


def fingerprint(tensor: Tensor) -> tuple[int | None, int | None]:
    """The version of a tensor and the sum of its bits, of this rank's shard: together they tell of most changes.

    ``tensor.data`` goes around versions; what only moves entries around leaves the sum as it is. Each may be None: a tensor made
    in inference mode counts no versions, a subclass of another package may not show its bits, and one of a lazy module has neither.
    """
    if is_lazy(tensor):
        return None, None
    version = None if tensor.is_inference() else tensor._version
    return version, sum_of_bits(tensor)


@torch.no_grad()
def sum_of_bits(tensor: Tensor) -> int | None:
    """The sum of a tensor's entries, read as integers, of this rank's shard; None where they cannot be read so.

    It takes any dtype, those without a norm too, and tells 0.0 from -0.0 and one NaN from another.
    """
    try:
        shard = shard_of(tensor).detach()
        if shard.is_quantized:
            shard = shard.int_repr()
        if shard.is_complex():
            shard = torch.view_as_real(shard)
        integers = shard.view(INTEGERS[shard.element_size()])
        return sum(int(piece.sum(dtype=torch.int64)) for piece in _pieces(integers))
    except Exception:  # what subclasses of other packages raise is theirs to choose
        return None


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.numel() <= PIECE:
        return (tensor,)
    pieces: tuple[Tensor, ...] = tensor.split(max(1, PIECE * len(tensor) // tensor.numel()))  # type: ignore[no-untyped-call]
    return pieces
