"""Which backward passes have reached which gradients: Lightning does not tell, the gradients do."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from clip_callbacks.core.reduction import shard_of
from clip_callbacks.core.tensor_table import TensorTable

Fingerprints: TypeAlias = dict[int, tuple[int, int, int]]
"""Those of the gradients that there are, by their parameter's place in the table."""


def fingerprints(table: TensorTable) -> Fingerprints:
    """Where the gradients' entries are, and how often each was written in place; no entry is read.

    Args:
        table: The parameters.
    """
    wholes = [tensor.grad for tensor in table.tensors]
    return {place: _fingerprint(gradient) for place, gradient in enumerate(wholes) if gradient is not None}


def is_changed(table: TensorTable, before: Fingerprints) -> bool:
    """Whether any gradient has another fingerprint than it had; the first that has one is enough.

    Args:
        table: The parameters.
        before: What :func:`fingerprints` returned.
    """
    for place, tensor in enumerate(table.tensors):
        now = tensor.grad
        if (None if now is None else _fingerprint(now)) != before.get(place):
            return True
    return False


def _fingerprint(gradient: Tensor) -> tuple[int, int, int]:
    """Of a sharded gradient this rank's shard counts its writes too."""
    shard = shard_of(gradient)
    entries = shard if shard.layout is torch.strided else shard._values()
    return entries.data_ptr(), gradient._version, shard._version
