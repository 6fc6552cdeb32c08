"""Tensors in plain attributes of modules, such as a hidden state that is carried over to the next batch.

Trap: neither a checkpoint nor a skipped step restores them, so that one NaN in such a tensor makes every later batch bad.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from clip_callbacks.core.diagnosis import NonFiniteTensor, nonfinite_among
from clip_callbacks.core.nonfinite import has_arithmetic
from clip_callbacks.core.reduction import shard_of
from clip_callbacks.core.tensor_table import without_wrappers

MAX_DEPTH = 2
"""Depth of nested collections that are searched: states are kept for each layer, and that of an LSTM is a pair."""
MAX_LENGTH = 64
"""Number of items of a collection that is searched. Longer ones are histories, which the next batch does not read."""

_ATTRIBUTES_OF_MODULES = frozenset(vars(nn.Module()))
_RECOMPUTED_SUFFIXES = ("_orig", "_g")
"""Suffixes of parameters from which ``spectral_norm``, ``weight_norm`` and ``prune`` of ``nn.utils`` compute a weight in each
forward pass; they keep that weight in a plain attribute."""


def nan_attributes(module: nn.Module) -> tuple[NonFiniteTensor, ...]:
    """Find tensors with NaN in plain attributes of a module and its submodules, such as ``encoder.hidden[1]``.

    Tensors in tuples, lists and dictionaries count; 0-dim tensors do not. Tensors with infinite entries only are left out: masks
    and initial extremes are infinite by design, and an overflow of one batch is NaN after the next. Also left out are parameters,
    buffers, gradients, weights that are recomputed in each forward pass, and torchmetrics.
    """
    known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    known |= {id(parameter.grad) for parameter in module.parameters()}
    found: dict[int, tuple[str, Tensor]] = {}
    for path, owner in module.named_modules():
        if isinstance(owner, Metric):
            continue
        for attribute, value in vars(owner).items():
            if attribute in _ATTRIBUTES_OF_MODULES:
                continue
            held = list(_tensors(value, f"{path}.{attribute}".lstrip(".")))
            if any(f"{attribute}{suffix}" in owner._parameters for suffix in _RECOMPUTED_SUFFIXES):
                known |= {id(tensor) for _, tensor in held}
            for name, tensor in held:
                found.setdefault(id(tensor), (without_wrappers(name), tensor))
    named = [(name, tensor) for key, (name, tensor) in found.items() if key not in known and _may_be_read(shard_of(tensor))]
    return tuple(tensor for tensor in nonfinite_among(named) if tensor.nan)


def _tensors(value: Any, name: str, depth: int = MAX_DEPTH) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if not value.requires_grad:  # a state for the next batch is detached; a tensor with a graph is a recorded output
            yield name, value
    elif isinstance(value, (tuple, list, dict)) and depth and len(value) <= MAX_LENGTH:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _tensors(item, f"{name}[{key!r}]", depth - 1)


def _may_be_read(tensor: Tensor) -> bool:
    """Return whether a tensor has at least one dimension, a numeric dtype, and memory."""
    if not has_arithmetic(tensor) or not tensor.ndim:
        return False
    # FullyShardedDataParallel leaves views of memory that it has freed, which must not be read
    return tensor.layout is not torch.strided or type(tensor) is not Tensor or tensor.untyped_storage().size() > 0
