"""Whether weights have moved, found out from their bits: ``parameter.data`` goes around version counters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from clip_callbacks.core.reduction import shard_of

Fingerprints: TypeAlias = dict[str, list[int]]
"""By the name of what was looked at, a number for each of its tensors."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weight_fingerprints(weights: Mapping[str, Iterable[Tensor]]) -> Fingerprints:
    """Read tensors, this rank's shards of them, and make a number of each: for bad steps only.

    Args:
        weights: The tensors, by name.
    """
    return {name: _on_host(list(map(_fingerprint, tensors))) for name, tensors in weights.items()}


def _fingerprint(tensor: Tensor) -> Tensor:
    """The sum of the bits, as integers of the same width, which takes no memory; the version counter where they cannot be read."""
    shard = shard_of(tensor)
    is_plain = type(shard) in {Tensor, nn.Parameter} and shard.layout is torch.strided and not shard.is_quantized
    width = _INTEGERS.get(shard.element_size()) if is_plain and not shard.is_meta else None
    if width is None:
        return torch.tensor(tensor._version)
    return shard.detach().view(width).sum(dtype=width).long()


def _on_host(numbers: list[Tensor]) -> list[int]:
    """One transfer for each device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for number in numbers:
        by_device.setdefault(number.device, []).append(number)
    return [value for each in by_device.values() for value in torch.stack(each).tolist()]
