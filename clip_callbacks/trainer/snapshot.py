"""One copy of tensors in dictionaries and lists, made again and again in the same memory, and put back in place."""

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
AS_IS = object()
"""Stands for a tensor without values, as that of a lazy module before its first pass, or one on the meta device: whatever it has
become stays."""


def overlaps(tensor: Tensor) -> bool:
    """Whether entries of a tensor share memory, as after ``expand``: nothing can be written there."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def parts_of(tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that one is made of, as optimizers keep 8-bit states, by its attributes; none of a plain one."""
    wrapper: Any = tensor
    if not is_traceable_wrapper_subclass(wrapper):
        return {}
    return {name: getattr(wrapper, name) for name in wrapper.__tensor_flatten__()[0]}


def is_opaque(tensor: Tensor) -> bool:
    """Whether a tensor's class decides what every function does with it, and does not tell what tensors it is made of."""
    if parts_of(tensor):
        return False
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


@torch.no_grad()
def can_be_copied(tensor: Tensor) -> bool:
    """Whether a copy can be made of a tensor; of one of an exotic kind this is tried."""
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
    """Not so of integers of fewer than 8 bits, which torch only has names for."""
    return _has_clone(torch.empty(1, dtype=dtype, device="cpu"))


def _has_clone(tensor: Tensor) -> bool:
    try:
        tensor.detach().clone()
    except Exception:  # of somebody else's class: whatever it is
        return False
    return True


@dataclass(frozen=True, eq=False)
class Slot:
    """Where a tensor stood.

    Args:
        copy: Of this rank's shard, on the host.
        device: Where the tensor was.
        like: The tensor itself if it is sharded: no other can be made like it without its mesh.
    """

    copy: Tensor
    device: torch.device
    like: Tensor | None

    def fits(self, live: Any) -> bool:
        """Whether what stands there now can take the copy in."""
        if not isinstance(live, Tensor) or live.layout is not torch.strided:
            return False
        shard = shard_of(live)
        is_alike = (shard.shape, shard.dtype, shard.device) == (self.copy.shape, self.copy.dtype, self.device)
        return is_alike and not overlaps(shard) and (shard is live) == (self.like is None)

    def renewed(self) -> Tensor:
        """A tensor to take the place of one that is gone."""
        if self.like is not None:
            return self.like
        return torch.empty_like(self.copy, device=self.device, pin_memory=False)


@dataclass(frozen=True, eq=False)
class WholeSlot:
    """Where a tensor stood that is made of others.

    Args:
        like: The tensor itself: its class may make no other like it.
        parts: What was kept of the tensors that it is made of, by their attributes.
    """

    like: Tensor
    parts: dict[str, Any]


class Snapshot:
    """Memory for one copy of a tree: dictionaries, lists and tuples of tensors and of anything else.

    Copies of tensors are on the host: pinned and asynchronous if they come from a GPU. They are then enqueued on its current
    stream, before the step that follows there and changes the tensors, and the host waits for them only before it reads them.
    """

    def __init__(self) -> None:
        self._rooms: dict[Path, Tensor] = {}
        self._events: list[DeviceEvent] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(room.numel() * room.element_size() for room in self._rooms.values())

    @torch.no_grad()
    def keep(self, tree: Any) -> Any:
        """Copy a tree, over what was copied before: tensors that are new get new room, those that are gone leave theirs.

        Returns:
            The tree with a :class:`Slot` for each tensor, for :meth:`put_back`.
        """
        copying = _Copying(self._rooms)
        kept = copying.visit(tree, ())
        self._rooms = copying.rooms
        if copying.pairs:
            rooms, lives = zip(*copying.pairs, strict=True)
            torch._foreach_copy_(rooms, lives, non_blocking=True)
        self._events = [DeviceEvent(device) for device in {live.device for _, live in copying.pairs} if device.type == "cuda"]
        return kept

    @torch.no_grad()
    def put_back(self, kept: Any, live: Any) -> Any:
        """Make a tree what it was: in the tensors, dictionaries and lists that stand there now, if they can take it in.

        It goes around the tensors' version counters: a graph made before, whose gradients nobody will use, is not to raise.

        Args:
            kept: What :meth:`keep` returned.
            live: What stands there now.

        Returns:
            What is to stand there.
        """
        for event in self._events:
            event.wait()
        writing = _Writing()
        tree = writing.visit(kept, live)
        if writing.pairs:
            targets, copies = zip(*writing.pairs, strict=True)
            torch._foreach_copy_(targets, copies)
        return tree


class _Copying:
    """One walk over a live tree."""

    def __init__(self, known: dict[Path, Tensor]) -> None:
        self._known = known
        self._slots: dict[int, Slot | WholeSlot] = {}
        self.rooms: dict[Path, Tensor] = {}
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
            return AS_IS
        shard = shard_of(live)
        parts = parts_of(shard)
        if not parts and (is_opaque(shard) or live.layout is not torch.strided):
            return live.detach().clone()  # these are few and small: they stay where they are
        if id(live) not in self._slots:
            slot: Slot | WholeSlot
            if parts:
                slot = WholeSlot(live, {name: self.visit(part, (*path, name)) for name, part in parts.items()})
            else:
                slot = self._slot(live, shard, path)
            self._slots[id(live)] = slot
        return self._slots[id(live)]

    def _slot(self, live: Tensor, shard: Tensor, path: Path) -> Slot:
        room = self._known.get(path)
        if room is None or (room.shape, room.dtype, room.is_pinned()) != (shard.shape, shard.dtype, shard.is_cuda):
            room = torch.empty_like(shard, device="cpu", pin_memory=shard.is_cuda, requires_grad=False)
        self.rooms[path] = room
        self.pairs.append((room, shard))
        return Slot(room, shard.device, None if shard is live else live)


def _path_key(key: Any) -> Any:
    """What stands for a dictionary's key in a path: two tensors would be compared entry by entry, their ids are not."""
    if isinstance(key, Tensor):
        return id(key)
    return key


class _Writing:
    """One walk over a copied tree and what stands in its place."""

    def __init__(self) -> None:
        self._targets: dict[int, Tensor] = {}
        self._taken: set[int] = set()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def visit(self, kept: Any, live: Any) -> Any:
        if isinstance(kept, (Slot, WholeSlot)):
            return self._whole(kept) if isinstance(kept, WholeSlot) else self._target(kept, live)
        if kept is AS_IS:
            return live
        if isinstance(kept, dict):
            into = live if isinstance(live, dict) else {}
            restored = {key: self.visit(value, into.get(key)) for key, value in kept.items()}
            into.clear()
            into.update(restored)
            return into
        if type(kept) in {list, tuple}:
            others = live if isinstance(live, (list, tuple)) else ()
            items = [self.visit(value, other) for value, other in zip(kept, chain(others, repeat(None)), strict=False)]
            if isinstance(kept, list) and isinstance(live, list):
                live[:] = items
                return live
            return type(kept)(items)
        return kept.clone() if isinstance(kept, Tensor) else deepcopy(kept)

    def _whole(self, slot: WholeSlot) -> Tensor:
        """The tensor that there was, with its parts in place; it may stand in two places."""
        if id(slot) not in self._targets:
            self._targets[id(slot)] = slot.like
            shard = shard_of(slot.like)
            for name, now in parts_of(shard).items():
                then = self.visit(slot.parts[name], now)
                if then is not now:
                    setattr(shard, name, then)
        return self._targets[id(slot)]

    def _target(self, slot: Slot, live: Any) -> Tensor:
        """One tensor for each that there was: two places may have held the same, and may hold the same now."""
        if id(slot) not in self._targets:
            target: Tensor = live
            if not slot.fits(live) or id(live) in self._taken:
                target = slot.renewed()
            self._targets[id(slot)] = target
            self._taken.add(id(target))
            self.pairs.append((shard_of(target).data, slot.copy))
        return self._targets[id(slot)]
