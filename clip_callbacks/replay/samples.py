"""Parts of a batch: which tensors in it have a sample in each row, and the same batch with some of the samples only."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from clip_callbacks.bundles.batch_tensors import tensors_in


def batch_size(batch: Any) -> int | None:
    """The most common first dimension among the tensors of a batch, of equally common ones the first; None without tensors."""
    sizes = Counter([tensor.shape[0] for tensor in tensors_in(batch) if tensor.ndim] + [len(array) for array in _arrays_in(batch)])
    return sizes.most_common(1)[0][0] if sizes else None


def chosen(value: Any, samples: Sequence[int], size: int) -> Any:
    """A batch with some samples only: of each tensor, array and list with as many rows as the batch these rows.

    Args:
        value: The batch, or a part of it.
        samples: Which.
        size: Samples in the whole batch.
    """
    if isinstance(value, Tensor) or _is_array(value):
        return value[list(samples)] if value.ndim and value.shape[0] == size else value
    if isinstance(value, Mapping):
        return {key: chosen(entry, samples, size) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) == size and not any(_has_rows(entry, size) for entry in value):
            return type(value)([value[place] for place in samples])
        parts = [chosen(entry, samples, size) for entry in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return _chosen_fields(value, samples, size) if is_dataclass(value) and not isinstance(value, type) else value


def _chosen_fields(value: Any, samples: Sequence[int], size: int) -> Any:
    part = copy.copy(value)
    for field in fields(value):
        object.__setattr__(part, field.name, chosen(getattr(value, field.name), samples, size))
    return part


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
