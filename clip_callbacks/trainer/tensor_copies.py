"""Copies of tensors that forward passes write to, made in place again and again, and put back around their version counters.

Around them, because a graph may have saved what is put back: batch normalization in training saves its statistics for the backward
pass and does not read them there, and a graph that another optimizer is still to use must not raise for a skipped step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from clip_callbacks.core.nonfinite import ARITHMETIC_DTYPES, has_arithmetic
from clip_callbacks.core.reduction import is_sharded, shard_of
from clip_callbacks.trainer.snapshot import overlaps

_PLAIN = {Tensor, torch.nn.Parameter, FakeTensor}
"""The last one stands for a plain tensor in dry runs."""

_WHOLE = frozenset([torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])


def fits_among_others(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a tensor can be copied together with others of its dtype: a plain one, or a sharded one of plain shards."""
    if tensor is None or is_lazy(tensor) or _is_wrapper(tensor):
        return False
    shard = shard_of(tensor)
    if shard.layout is not torch.strided or shard.is_inference() or overlaps(shard):
        return False
    if type(shard) in _PLAIN:
        return not shard.is_meta and (shard.dtype in _WHOLE or shard.dtype in ARITHMETIC_DTYPES)
    return has_arithmetic(shard)


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is made of others, as low-bit ones are; not a sharded one, whose shard is the one that counts."""
    return not is_sharded(tensor) and is_traceable_wrapper_subclass(tensor)


class Kept:
    """One tensor at one time: itself, and its content.

    Args:
        tensor: The tensor; None if there was none.
        content: A copy of its entries, of this rank's shard; None if there is nothing to copy, or no room.
    """

    def __init__(self, tensor: Tensor | None, content: Tensor | None) -> None:
        self.tensor = tensor
        self.content = content
        self.counted: tuple[Tensor, ...] = ()
        self._versions = 0
        if tensor is not None and not tensor.is_inference():
            self.counted = (tensor,) if tensor is shard_of(tensor) else (tensor, shard_of(tensor))

    @classmethod
    def of(cls, tensor: Tensor | None) -> Kept:
        """A tensor as it is now."""
        return cls(tensor, _copy(tensor))

    @classmethod
    def on_host(cls, tensor: Tensor | None, *, has_room: bool) -> Kept:
        """A tensor as it is now, its copy in the memory of the host."""
        kept = cls(tensor, _copy(tensor, torch.device("cpu")) if has_room else None)
        kept.note_versions()
        return kept

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return 0 if self.content is None else self.content.numel() * self.content.element_size()

    def note_versions(self) -> None:
        """Remember how often the tensor was written to."""
        self._versions = sum(tensor._version for tensor in self.counted)

    @property
    def has_been_written(self) -> bool:
        """Whether it was written to since, as far as version counters tell."""
        return sum(tensor._version for tensor in self.counted) != self._versions

    @property
    def is_still_there(self) -> bool:
        """Whether the content is bit for bit what it was; reads all of it. True where there is nothing to compare bit by bit."""
        if self.content is None or self.tensor is None or self.content.layout is not torch.strided or self.content.is_quantized:
            return True
        return have_same_bits(self.content, shard_of(self.tensor).detach().to(self.content.device))

    def restored(self) -> Tensor | None:
        """The tensor with its content of then; another one where it cannot be written to, as a sparse one.

        One made in inference mode nobody else can have written to either.
        """
        if self.tensor is None or self.content is None or self.tensor.is_inference():
            return self.tensor
        shard = shard_of(self.tensor)
        if shard.layout is not torch.strided or shard.is_quantized:
            return self.content.clone()
        if shard.shape != self.content.shape:
            if shard is not self.tensor:
                return self.content.clone()
            self.tensor.resize_(self.content.shape)
        # entries that share memory, as after expand, are written once
        once = tuple(slice(0, 1 if stride == 0 else None) for stride in shard.stride())
        shard.data[once].copy_(self.content[once])
        return self.tensor

    def write_where(self, flag: Tensor, target: Tensor | None) -> bool:
        """Put the content into a tensor if a flag is set, 0-dim bool, which stays unread; whether that can be done."""
        if target is None or self.content is None:
            return target is None and self.tensor is None
        shard = shard_of(target)
        is_alike = (shard.shape, shard.dtype, shard.layout) == (self.content.shape, self.content.dtype, torch.strided)
        if not is_alike or overlaps(shard) or shard.is_quantized or shard.is_inference():
            return False
        shard.data.copy_(torch.where(flag.to(shard.device), self.content.to(shard.device), shard))
        return True


class TensorCopies:
    """Copies of tensors by their names, side by side in one tensor for each dtype and device."""

    def __init__(self) -> None:
        self._live: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._rooms: list[_Room] = []
        self._others: tuple[TensorCopies, int] | None = None
        self._generation = 0
        self._is_complete = True

    def add(self, name: str, live: Tensor, content: Tensor | None) -> None:
        """Copy one more.

        Args:
            name: Its name.
            live: The tensor.
            content: Its entries at the time of the other copies; None: as they are.
        """
        self._live[name] = live
        self._pending[name] = shard_of(live).detach() if content is None else content
        self._is_complete = False

    def remove(self, name: str) -> Tensor | None:
        """Copy one no longer; its copy, if there was one."""
        if name not in self._live:
            return None
        copy = dict(self.named())[name].clone()
        del self._live[name]
        self._is_complete = False
        return copy

    @torch.no_grad()
    def _complete(self) -> None:
        """Make room for what was added."""
        known = {name: copy for room in self._rooms for name, copy in room.named()} | self._pending
        kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        for name, live in self._live.items():
            kinds.setdefault((live.dtype, live.device), []).append(name)
        rooms = [_Room({name: self._live[name] for name in names}, known) for names in kinds.values()]
        for room in rooms:
            room.fill(known)
        self._rooms, self._pending, self._is_complete = rooms, {}, True
        self._generation += 1

    @property
    def _each(self) -> list[_Room]:
        if not self._is_complete:
            self._complete()
        return self._rooms

    def keep(self) -> None:
        """Copy all as they are."""
        for room in self._each:
            room.keep()

    @property
    def resized(self) -> list[str]:
        """The names of tensors that have another shape than their copies: ``resize_`` leaves the tensor in its place."""
        return [name for name, copy in self.named() if shard_of(self._live[name]).shape != copy.shape]

    def keep_from(self, other: TensorCopies) -> None:
        """Take the copies that others have of the same tensors."""
        rooms, theirs = self._each, other._each
        if self._others != (other, self._generation + other._generation):
            named = {name: copy for room in theirs for name, copy in room.named()}
            for room in rooms:
                room.pair(named)
            self._others = (other, self._generation + other._generation)
        for room in rooms:
            room.keep_from_pairs()

    def restore(self) -> None:
        """Put all back."""
        for room in self._each:
            room.restore()

    def restore_where(self, flag: Tensor) -> None:
        """Put all back if a flag is set, 0-dim bool, which stays unread."""
        for room in self._each:
            room.restore_where(flag)

    def copies(self) -> dict[int, Tensor]:
        """The copies, by the ``id`` of the tensor."""
        return {id(self._live[name]): copy for name, copy in self.named()}

    def named(self) -> list[tuple[str, Tensor]]:
        """The copies, by name."""
        return [pair for room in self._each for pair in room.named()]


class _Room:
    """Tensors of one dtype on one device, and their copies side by side in one tensor."""

    def __init__(self, live: dict[str, Tensor], known: dict[str, Tensor]) -> None:
        self._names = list(live)
        self._live = [shard_of(tensor) for tensor in live.values()]
        self._shapes = [known[name].shape for name in live]
        self.kept, self._copies = self._space()
        self._others: list[Tensor] = []
        self._scratch: tuple[Tensor, list[Tensor]] | None = None

    def _space(self) -> tuple[Tensor, list[Tensor]]:
        first, sizes = self._live[0], [shape.numel() for shape in self._shapes]
        flat = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
        parts = flat.split(sizes)  # type: ignore[no-untyped-call]
        return flat, [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def named(self) -> Iterable[tuple[str, Tensor]]:
        return zip(self._names, self._copies, strict=True)

    def fill(self, known: dict[str, Tensor]) -> None:
        torch._foreach_copy_(self._copies, [known[name] for name in self._names])

    @torch.no_grad()
    def keep(self) -> None:
        torch._foreach_copy_(self._copies, self._live)

    def pair(self, copies: dict[str, Tensor]) -> None:
        """Find the copies of the same tensors among those of others."""
        self._others = [copies[name] for name in self._names]

    @torch.no_grad()
    def keep_from_pairs(self) -> None:
        torch._foreach_copy_(self._copies, self._others)

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_([live.data for live in self._live], self._copies)

    @torch.no_grad()
    def restore_where(self, flag: Tensor) -> None:
        """By selection, no arithmetic: what is not chosen may be NaN."""
        flat, chosen = self._scratch = self._scratch or self._space()
        torch._foreach_copy_(chosen, self._live)
        torch.where(flag.to(flat.device), self.kept, flat, out=flat)
        torch._foreach_copy_([live.data for live in self._live], chosen)


def _copy(tensor: Tensor | None, device: torch.device | None = None) -> Tensor | None:
    """A tensor's entries, of this rank's shard; None where there are none to copy."""
    if tensor is None or tensor.is_meta:
        return None
    try:
        copy = shard_of(tensor).detach().clone()
        return copy if device is None else copy.to(device)
    except (NotImplementedError, RuntimeError, TypeError):  # a subclass of another package may have no copies
        return None


def have_same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether all bits agree: NaN is equal to itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)))
