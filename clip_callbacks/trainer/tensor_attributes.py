"""Tensors that modules keep in plain attributes, where neither a checkpoint nor a skipped step knows of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from clip_callbacks.core.diagnosis import Offender, offenders_among
from clip_callbacks.core.nonfinite import has_arithmetic
from clip_callbacks.core.reduction import shard_of
from clip_callbacks.core.tensor_table import without_wrappers

DEPTH = 2
"""How deep collections are looked into: a state for each layer, of an LSTM each a pair."""
MOST = 64
"""Longer collections are records of what was, and carry nothing into the next batch."""

_OF_TORCH = frozenset(vars(nn.Module()))
_RECOMPUTED = ("_orig", "_g")
"""How names of parameters end from which a weight is computed anew in each forward pass, and kept in a plain attribute: so do
``nn.utils.spectral_norm``, ``weight_norm`` and ``prune``."""


def carried_tensors(module: nn.Module) -> tuple[Offender, ...]:
    """The tensors in plain attributes of a module, and of those inside, that hold NaN: by name, as ``encoder.hidden[1]``.

    They are in an attribute itself or in tuples, lists and dictionaries there, and have at least one dimension. Infinite entries
    alone do not count: masks and first extremes are so by design, and what has overflowed in one batch is NaN after the next. Nor
    do parameters and buffers, their gradients, weights that are computed anew in each forward pass, and torchmetrics.
    """
    known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    known |= {id(parameter.grad) for parameter in module.parameters()}
    found: dict[int, tuple[str, Tensor]] = {}
    for path, owner in module.named_modules():
        if isinstance(owner, Metric):
            continue
        for attribute, value in vars(owner).items():
            if attribute in _OF_TORCH:
                continue
            held = list(_tensors(value, f"{path}.{attribute}".lstrip(".")))
            if any(f"{attribute}{end}" in owner._parameters for end in _RECOMPUTED):
                known |= {id(tensor) for _, tensor in held}
            for name, tensor in held:
                found.setdefault(id(tensor), (without_wrappers(name), tensor))
    named = [(name, tensor) for key, (name, tensor) in found.items() if key not in known and _may_be_read(shard_of(tensor))]
    return tuple(offender for offender in offenders_among(named) if offender.nan)


def _tensors(value: Any, name: str, depth: int = DEPTH) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if not value.requires_grad:  # what the next batch is to read is detached; what is not is a record of outputs
            yield name, value
    elif isinstance(value, (tuple, list, dict)) and depth and len(value) <= MOST:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _tensors(item, f"{name}[{key!r}]", depth - 1)


def _may_be_read(tensor: Tensor) -> bool:
    """Whether a tensor has dimensions and entries of numbers: FullyShardedDataParallel leaves views of memory that it has freed."""
    if not has_arithmetic(tensor) or not tensor.ndim:
        return False
    return tensor.layout is not torch.strided or type(tensor) is not Tensor or tensor.untyped_storage().size() > 0
