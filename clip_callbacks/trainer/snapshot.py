"""Snapshots of nested dictionaries and lists of tensors, in memory that is reused, restored in place.

Traps: optimizer states may be tensor subclasses that have no ``empty_like`` (low-bit states of torchao), are made of other tensors,
or are quantized; two places may hold the same tensor; and other code holds references, so that tensors, dictionaries and lists must
be restored in place.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from clip_callbacks.core.reduction import shard_of
from clip_callbacks.trainer.device_event import DeviceEvent

Path = tuple[Any, ...]
NO_VALUES = object()
"""Placeholder for a tensor without values: of a lazy module before its first forward pass, or on the meta device. It is not
restored."""


def overlaps(tensor: Tensor) -> bool:
    """Return whether entries of a tensor share memory, as after ``expand``. In-place writes to it raise."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def parts_of(tensor: Tensor) -> dict[str, Tensor]:
    """Return the tensors that a wrapper subclass consists of, such as an 8-bit state, by attribute; empty for a plain tensor."""
    wrapper: Any = tensor
    if not is_traceable_wrapper_subclass(wrapper):
        return {}
    return {name: getattr(wrapper, name) for name in wrapper.__tensor_flatten__()[0]}


def is_opaque(tensor: Tensor) -> bool:
    """Return whether a tensor's class overrides ``__torch_dispatch__`` and does not show the tensors that it consists of."""
    if parts_of(tensor):
        return False
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


@torch.no_grad()
def can_be_copied(tensor: Tensor) -> bool:
    """Return whether a tensor can be copied. For opaque subclasses and quantized tensors a copy is tried."""
    shard = shard_of(tensor)
    if is_lazy(shard) or shard.is_meta:
        return True
    if parts := parts_of(shard):
        return all(map(can_be_copied, parts.values()))
    if is_opaque(shard) or shard.is_quantized:
        return _has_clone(shard)
    return _dtype_has_copies(shard.dtype)


@cache
def _dtype_has_copies(dtype: torch.dtype) -> bool:
    """Return whether a dtype has copies: integers of fewer than 8 bits have none in torch."""
    return _has_clone(torch.empty(1, dtype=dtype, device="cpu"))


def _has_clone(tensor: Tensor) -> bool:
    try:
        tensor.detach().clone()
    except Exception:  # subclasses of other packages may raise anything
        return False
    return True


@dataclass(frozen=True, eq=False)
class SavedTensor:
    """A tensor in a snapshot.

    Args:
        copy: The copy of this rank's shard, on the host.
        device: The device of the tensor.
        like: The tensor itself if it is sharded, because another one could not be made without its mesh; else None.
    """

    copy: Tensor
    device: torch.device
    like: Tensor | None

    def fits(self, live: Any) -> bool:
        """Return whether the copy can be written to the object in the tensor's place."""
        if not isinstance(live, Tensor) or live.layout is not torch.strided:
            return False
        shard = shard_of(live)
        is_alike = (shard.shape, shard.dtype, shard.device) == (self.copy.shape, self.copy.dtype, self.device)
        return is_alike and not overlaps(shard) and (shard is live) == (self.like is None)

    def new_tensor(self) -> Tensor:
        """Return a tensor to write the copy to, if the one in its place does not fit."""
        if self.like is not None:
            return self.like
        return torch.empty_like(self.copy, device=self.device, pin_memory=False)


@dataclass(frozen=True, eq=False)
class SavedWrapper:
    """A tensor that consists of other tensors, in a snapshot.

    Args:
        like: The tensor itself, because its class may not be able to make another one.
        parts: The saved tensors that it consists of, by attribute.
    """

    like: Tensor
    parts: dict[str, Any]


class Snapshot:
    """Memory for one copy of a tree of dictionaries, lists and tuples with tensors and other objects.

    Copies of tensors are on the host. From a GPU they are made asynchronously to pinned memory, on its current stream: before the
    optimizer step on that stream changes the tensors. The host waits for them only when it restores.
    """

    def __init__(self) -> None:
        self._copies: dict[Path, Tensor] = {}
        self._events: list[DeviceEvent] = []

    @property
    def nbytes(self) -> int:
        """Size of the copies in bytes."""
        return sum(each.numel() * each.element_size() for each in self._copies.values())

    @torch.no_grad()
    def keep(self, tree: Any) -> Any:
        """Copy a tree, and overwrite the copy before. Memory is allocated and freed only where tensors are new or gone.

        Returns:
            The tree with a :class:`SavedTensor` for each tensor, for :meth:`restore`.
        """
        copying = _Copying(self._copies)
        kept = copying.visit(tree, ())
        self._copies = copying.memory
        if copying.pairs:
            copies, lives = zip(*copying.pairs, strict=True)
            torch._foreach_copy_(copies, lives, non_blocking=True)
        self._events = [DeviceEvent(device) for device in {live.device for _, live in copying.pairs} if device.type == "cuda"]
        return kept

    @torch.no_grad()
    def restore(self, saved: Any, live: Any) -> Any:
        """Restore a tree, in place where the present tensors, dictionaries and lists fit.

        Version counters of tensors do not rise, so that backward passes of graphs from before do not raise.

        Args:
            saved: The return value of :meth:`keep`.
            live: The present tree.

        Returns:
            The tree to put in place of ``live``.
        """
        for event in self._events:
            event.wait()
        writing = _Writing()
        tree = writing.visit(saved, live)
        if writing.pairs:
            targets, copies = zip(*writing.pairs, strict=True)
            torch._foreach_copy_(targets, copies)
        return tree


class _Copying:
    """One traversal of a live tree."""

    def __init__(self, known: dict[Path, Tensor]) -> None:
        self._known = known
        self._slots: dict[int, SavedTensor | SavedWrapper] = {}
        self.memory: dict[Path, Tensor] = {}
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def visit(self, live: Any, path: Path) -> Any:
        if isinstance(live, Tensor):
            return self._tensor(live, path)
        if isinstance(live, dict):
            return {key: self.visit(value, (*path, _path_key(key))) for key, value in live.items()}
        if type(live) in {list, tuple}:
            return type(live)(self.visit(value, (*path, place)) for place, value in enumerate(live))
        return deepcopy(live)

    def _tensor(self, live: Tensor, path: Path) -> Any:
        if is_lazy(live) or live.is_meta:
            return NO_VALUES
        shard = shard_of(live)
        parts = parts_of(shard)
        if not parts and (is_opaque(shard) or live.layout is not torch.strided):
            return live.detach().clone()  # sparse and opaque tensors are few and small: their copies stay on the device
        if id(live) not in self._slots:
            slot: SavedTensor | SavedWrapper
            if parts:
                slot = SavedWrapper(live, {name: self.visit(part, (*path, name)) for name, part in parts.items()})
            else:
                slot = self._plain(live, shard, path)
            self._slots[id(live)] = slot
        return self._slots[id(live)]

    def _plain(self, live: Tensor, shard: Tensor, path: Path) -> SavedTensor:
        memory = self._known.get(path)
        if memory is None or (memory.shape, memory.dtype, memory.is_pinned()) != (shard.shape, shard.dtype, shard.is_cuda):
            memory = torch.empty_like(shard, device="cpu", pin_memory=shard.is_cuda, requires_grad=False)
        self.memory[path] = memory
        self.pairs.append((memory, shard))
        return SavedTensor(memory, shard.device, None if shard is live else live)


def _path_key(key: Any) -> Any:
    """Return the element of a path for a dictionary's key. Tensors would be compared entry by entry, their ids are not."""
    if isinstance(key, Tensor):
        return id(key)
    return key


class _Writing:
    """One traversal of a saved tree and the live tree in its place."""

    def __init__(self) -> None:
        self._targets: dict[int, Tensor] = {}
        self._taken: set[int] = set()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def visit(self, saved: Any, live: Any) -> Any:
        if isinstance(saved, SavedWrapper):
            return self._wrapper(saved)
        if isinstance(saved, SavedTensor):
            return self._target(saved, live)
        if saved is NO_VALUES:
            return live
        if isinstance(saved, dict):
            return self._dictionary(saved, live)
        if type(saved) in {list, tuple}:
            return self._sequence(saved, live)
        return saved.clone() if isinstance(saved, Tensor) else deepcopy(saved)

    def _dictionary(self, saved: dict[Any, Any], live: Any) -> dict[Any, Any]:
        target = live if isinstance(live, dict) else {}
        restored = {key: self.visit(value, target.get(key)) for key, value in saved.items()}
        target.clear()  # and filled again: the order of keys is restored, too
        target.update(restored)
        return target

    def _sequence(self, saved: Any, live: Any) -> Any:
        others = live if isinstance(live, (list, tuple)) else ()
        items = [self.visit(value, other) for value, other in zip(saved, chain(others, repeat(None)), strict=False)]
        if isinstance(saved, list) and isinstance(live, list):
            live[:] = items
            return live
        return type(saved)(items)

    def _wrapper(self, slot: SavedWrapper) -> Tensor:
        """Restore the tensors that a wrapper consists of, once: it may stand in two places."""
        if id(slot) not in self._targets:
            self._targets[id(slot)] = slot.like
            shard = shard_of(slot.like)
            for name, now in parts_of(shard).items():
                then = self.visit(slot.parts[name], now)
                if then is not now:
                    setattr(shard, name, then)
        return self._targets[id(slot)]

    def _target(self, slot: SavedTensor, live: Any) -> Tensor:
        """Choose the tensor to write a copy to, once for each saved tensor: two places may have held the same, or hold it now."""
        if id(slot) not in self._targets:
            target: Tensor = live
            if not slot.fits(live) or id(live) in self._taken:
                target = slot.new_tensor()
            self._targets[id(slot)] = target
            self._taken.add(id(target))
            self.pairs.append((shard_of(target).data, slot.copy))  # writes through .data raise no version
        return self._targets[id(slot)]
