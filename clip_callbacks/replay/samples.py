"""Samples of a batch: their number, and a batch with some of them only."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from clip_callbacks.bundles.batch_tensors import tensors_in


def batch_size(batch: Any) -> int | None:
    """Return the most common first dimension of the tensors and arrays of a batch, on a tie the first; None if there are none."""
    sizes = Counter([tensor.shape[0] for tensor in tensors_in(batch) if tensor.ndim] + [len(array) for array in _arrays_in(batch)])
    return sizes.most_common(1)[0][0] if sizes else None


def select_samples(value: Any, samples: Sequence[int], size: int) -> Any:
    """Return a batch with some of its samples: those rows of every tensor, array and list that has one row for each sample.

    Args:
        value: The batch, or a part of it.
        samples: Indices of the samples.
        size: Number of samples in the whole batch.
    """
    if isinstance(value, Tensor) or _is_array(value):
        return value[list(samples)] if value.ndim and value.shape[0] == size else value
    if isinstance(value, Mapping):
        return {key: select_samples(entry, samples, size) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) == size and not any(_has_rows(entry, size) for entry in value):
            return type(value)([value[sample] for sample in samples])
        parts = [select_samples(entry, samples, size) for entry in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        part = copy.copy(value)
        for field in fields(value):
            object.__setattr__(part, field.name, select_samples(getattr(value, field.name), samples, size))
        return part
    return value


def _has_rows(value: Any, size: int) -> bool:
    return any(tensor.ndim and tensor.shape[0] == size for tensor in tensors_in(value)) or any(
        len(array) == size for array in _arrays_in(value)
    )


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and bool(getattr(value, "ndim", 0))


def _arrays_in(value: Any) -> Iterator[Any]:
    if _is_array(value):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _arrays_in(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _arrays_in(entry)
