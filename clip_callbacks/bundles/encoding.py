"""Batches in plain containers and tensors, so that reading them needs no class and runs no code."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clip_callbacks.bundles.batch_tensors import tensors_in

_NDARRAY = "clip_callbacks.ndarray"


def encoded(value: Any) -> Any:
    """Return a batch as it is written: tensors detached, on the CPU, and views without the rest of their storage.

    NumPy's arrays become tensors, and mappings dictionaries, so that reading the batches of a text library needs none of its
    classes. Other objects stay as they are.
    """
    if type(value) is Tensor:
        return _compact(value)
    if isinstance(value, Mapping):
        return {key: encoded(entry) for key, entry in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(encoded(entry) for entry in value)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map(encoded, value))
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype.kind in "biufc":
        return {_NDARRAY: torch.from_numpy(numpy.array(value)), "scalar": isinstance(value, numpy.generic)}
    return value


def decoded(value: Any) -> Any:
    """Undo :func:`encoded`, except that mappings stay dictionaries.

    An object that occurs several times is decoded once, so that a small file of nested references cannot fill the memory.
    """
    return _decoded(value, {})


def _decoded(value: Any, known: dict[int, Any]) -> Any:
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, dict):
        if _NDARRAY in value:
            array = value[_NDARRAY].numpy()
            return array[()] if value["scalar"] else array
        known[id(value)] = whole = {}
        whole.update({key: _decoded(entry, known) for key, entry in value.items()})
        return whole
    if type(value) is list:
        entries: list[Any] = []
        known[id(value)] = entries
        entries.extend(_decoded(entry, known) for entry in value)
        return entries
    if isinstance(value, tuple) and (type(value) is tuple or hasattr(value, "_make")):
        parts = [_decoded(entry, known) for entry in value]
        make: Any = getattr(value, "_make", tuple)
        known[id(value)] = made = make(parts)
        return made
    return value


def _compact(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.layout is torch.strided and not tensor.is_nested and tensor.untyped_storage().nbytes() > tensor.nbytes:
        return tensor.clone()
    return tensor


def bytes_of(value: Any) -> int:
    """Return the size in bytes that the tensors in a value take on disk."""
    return sum(_nbytes(tensor) for tensor in tensors_in(value))


def _nbytes(tensor: Tensor) -> int:
    if tensor.layout is torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    return tensor.nbytes
