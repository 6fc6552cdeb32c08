"""What tensors and containers hold at one moment: to be put back in place, or only to be compared."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, MutableMapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from clip_callbacks.core.reduction import shard_of
from clip_callbacks.trainer.fingerprints import fingerprint
from clip_callbacks.trainer.snapshot import overlaps

MAX_ENTRIES = 1 << 14
"""Entries of a tensor that is copied: 64 KiB in float32. A larger one is only looked at, before and after."""

MAX_DEPTH = 3
"""How far containers within containers are looked at for a picture."""


class Contents:
    """Containers and tensors as they are when they are added, each once, wherever else they stand.

    Containers keep what they hold, and small tensors get copies. Of large tensors, and of those that not everybody can copy, a
    fingerprint says later whether they have changed.

    Args:
        without: Containers to leave out.
    """

    def __init__(self, without: Iterable[Any] = ()) -> None:
        self._seen: dict[int, Any] = {id(value): value for value in without}
        self._containers: list[tuple[Any, Any]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._fingerprints: list[tuple[str, Tensor, tuple[int | None, int | None]]] = []

    def add(self, name: str, value: Any) -> None:
        """Take a value as it is now, and all in it.

        Args:
            name: What to call it; what stands in dictionaries is called by its key, if that is a string.
            value: A container, a tensor, or anything else, which needs no copy.
        """
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._add_tensor(name, value)
        elif isinstance(value, MutableMapping):
            self._containers.append((value, dict(value)))
            for key, item in value.items():
                self.add(key if isinstance(key, str) else name, item)
        elif isinstance(value, set):
            self._containers.append((value, set(value)))
        elif isinstance(value, (list, deque, tuple)):
            if not isinstance(value, tuple):
                self._containers.append((value, list(value)))
            for item in value:
                self.add(name, item)

    def _add_tensor(self, name: str, tensor: Tensor) -> None:
        shard = shard_of(tensor).detach()
        is_plain = type(shard) is Tensor and shard.layout is torch.strided and not overlaps(shard)
        if is_plain and shard.numel() <= MAX_ENTRIES:
            self._copies.append((tensor, shard.clone()))
        else:
            self._fingerprints.append((name, tensor, fingerprint(tensor)))

    @torch.no_grad()
    def put_back(self) -> list[str]:
        """Have the same containers hold the same objects again, and small tensors the same entries.

        It goes around the tensors' version counters, as a rollback does.

        Returns:
            The names of tensors that have changed and stay as they are.
        """
        for container, content in self._containers:
            container.clear()
            fill = container.extend if isinstance(content, list) else container.update
            fill(content)
        for tensor, copy in self._copies:
            shard_of(tensor).data.copy_(copy)
        return sorted({name for name, tensor, before in self._fingerprints if fingerprint(tensor) != before})


def picture(value: Any, depth: int = MAX_DEPTH) -> Any:
    """What equals the picture of another value if that holds the same, as far as can be seen.

    Tensors, plain values and containers are looked into; of functions nothing is seen, of other objects only which they are.
    """
    if isinstance(value, Tensor):
        version, bits = fingerprint(value)
        return value.shape, value.dtype, version if bits is None else bits
    if isinstance(value, (Number, str, bytes, type(None))):
        return type(value), repr(value)  # in which a NaN equals a NaN
    if depth and isinstance(value, Mapping):
        return [(key if isinstance(key, str) else id(key), picture(item, depth - 1)) for key, item in value.items()]
    if depth and isinstance(value, (list, tuple, deque)):
        return [picture(item, depth - 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(hash, value))
    return type(value) if callable(value) else id(value)
