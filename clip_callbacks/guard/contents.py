"""Contents of tensors and containers at one moment, to be restored in place or compared later."""

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

MAX_COPIED_ENTRIES = 1 << 14
"""Largest tensor that is copied, in entries: 64 KiB in float32. Of a larger one only a fingerprint is kept."""

MAX_DEPTH = 3
"""Levels of nested containers that :func:`comparable` descends."""


class Contents:
    """Contents of containers and tensors at the moment when they are added, each only once.

    Of a container its items are kept, of a small tensor a copy. Of a large tensor, and of one that cannot be copied plainly, a
    fingerprint is kept, which shows later whether it has changed.

    Args:
        without: Containers to leave out.
    """

    def __init__(self, without: Iterable[Any] = ()) -> None:
        # The values are held too, since the id of an object that is gone may be given to another one.
        self._seen: dict[int, Any] = {id(value): value for value in without}
        self._containers: list[tuple[Any, Any]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._fingerprints: list[tuple[str, Tensor, tuple[int | None, int | None]]] = []

    def add(self, name: str, value: Any) -> None:
        """Add the present content of a value, and of everything in it.

        Args:
            name: Name for :meth:`restore`; items of dictionaries are named by their keys, if these are strings.
            value: Container, tensor, or any other object, of which nothing is kept.
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
        # Subclasses of other packages, such as low-bit states, need not implement `clone` and `copy_`.
        is_plain = type(shard) is Tensor and shard.layout is torch.strided and not overlaps(shard)
        if is_plain and shard.numel() <= MAX_COPIED_ENTRIES:
            self._copies.append((tensor, shard.clone()))
        else:
            self._fingerprints.append((name, tensor, fingerprint(tensor)))

    @torch.no_grad()
    def restore(self) -> list[str]:
        """Restore the items of all containers and the entries of small tensors.

        This bypasses the tensors' version counters, as a rollback does, so that autograd sees no change.

        Returns:
            The names of tensors that have changed and stay as they are.
        """
        for container, content in self._containers:
            # In place, because an optimizer's own code may hold references to its groups and to lists in its state.
            container.clear()
            fill = container.extend if isinstance(content, list) else container.update
            fill(content)
        for tensor, copy in self._copies:
            shard_of(tensor).data.copy_(copy)
        return sorted({name for name, tensor, before in self._fingerprints if fingerprint(tensor) != before})


def comparable(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return an object that equals that of another value if both have the same content, as far as this can be seen.

    Tensors, plain values and containers are compared by content, functions by their type only, and other objects by identity.
    """
    if isinstance(value, Tensor):
        version, bits = fingerprint(value)
        return value.shape, value.dtype, version if bits is None else bits
    if isinstance(value, (Number, str, bytes, type(None))):
        return type(value), repr(value)  # as text, because a NaN does not equal itself
    if depth and isinstance(value, Mapping):
        # Keys may be parameters, and `==` of two tensors compares their entries and returns no bool.
        return [(key if isinstance(key, str) else id(key), comparable(item, depth - 1)) for key, item in value.items()]
    if depth and isinstance(value, (list, tuple, deque)):
        return [comparable(item, depth - 1) for item in value]
    if isinstance(value, (set, frozenset)):
        # by hash, since members of different types have no order
        return sorted(map(hash, value))
    # A lambda or bound method may be made anew in each step without any effect.
    return type(value) if callable(value) else id(value)
