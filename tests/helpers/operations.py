"""Counts of dispatched operations."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clip_callbacks import (
    clip_step,
)


class Operations(TorchDispatchMode):
    """Counts dispatched operations."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


WRITES = {"aten._foreach_mul_", "aten.mul_", "aten._foreach_clamp_min_", "aten.copy_", "aten.fill_", "aten.zero_"}
SYNCS = {"aten._local_scalar_dense", "aten.equal", "aten.is_nonzero", "aten.nonzero"}


def reads(counts):
    """The number of calls that read gradients: multi-tensor norms, and stacks that a norm follows."""
    return counts["aten._foreach_norm"] + counts["aten.stack"] - (counts["aten._foreach_norm"] > 0)


def count(table, **options):
    clip_step(table, **options)  # grouping, names and indices are made once
    for parameter in table.tensors:
        if parameter.grad is not None:
            parameter.grad.fill_(1.0)
    with Operations() as operations:
        clip_step(table, **options)
    return operations.counts


class Transfers(Operations):
    """Records of each copy to the host whether the host waits for it."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function.overloadpacket) == "aten._to_copy" and torch.device((kwargs or {}).get("device", "cuda")).type == "cpu":
            self.waits.append(not kwargs.get("non_blocking"))
        return super().__torch_dispatch__(function, types, args, kwargs)
