"""Copies of tensors that forward passes write to, in memory that is reused, restored without raising version counters.

Trap: an in-place write raises the version of a tensor, and a backward pass raises if a tensor that its graph has saved has another
version. Batch normalization in training saves its statistics for the backward pass, although it does not read them there; a graph
that another optimizer is still to use must not raise because this optimizer's step was skipped. Hence writes go through ``.data``.
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

_PLAIN = {Tensor, torch.nn.Parameter, FakeTensor}  # FakeTensor stands for a plain tensor in dry runs

_INTEGERS = frozenset([torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])


def fits_among_others(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Return whether a tensor can be copied in one operation with others of its dtype: a plain tensor, or one of plain shards."""
    if tensor is None or is_lazy(tensor) or _is_wrapper(tensor):
        return False
    shard = shard_of(tensor)
    if shard.layout is not torch.strided or shard.is_inference() or overlaps(shard):
        return False
    if type(shard) in _PLAIN:
        return not shard.is_meta and (shard.dtype in _INTEGERS or shard.dtype in ARITHMETIC_DTYPES)
    return has_arithmetic(shard)


def _is_wrapper(tensor: Tensor) -> bool:
    """Return whether a tensor consists of others, like low-bit tensors. Sharded tensors do not count: their shard decides."""
    return not is_sharded(tensor) and is_traceable_wrapper_subclass(tensor)


class TensorState:
    """A tensor and a copy of its content at one time.

    Args:
        tensor: The tensor; None if there was none.
        content: The copy of its entries, of this rank's shard; None if it cannot be copied, or no memory is left for it.

    Attributes:
        counted: The tensors whose version counters rise with writes: the tensor and, if it is sharded, its shard.
    """

    def __init__(self, tensor: Tensor | None, content: Tensor | None) -> None:
        self.tensor = tensor
        self.content = content
        self.counted: tuple[Tensor, ...] = ()
        self._versions = 0
        if tensor is not None and not tensor.is_inference():
            self.counted = (tensor,) if tensor is shard_of(tensor) else (tensor, shard_of(tensor))

    @classmethod
    def of(cls, tensor: Tensor | None) -> TensorState:
        """Copy a tensor on its device."""
        return cls(tensor, _copy(tensor))

    @classmethod
    def on_host(cls, tensor: Tensor | None, *, copies: bool) -> TensorState:
        """Record the versions of a tensor.

        Args:
            tensor: The tensor.
            copies: If True, its content is copied to the memory of the host.
        """
        content = _copy(tensor, torch.device("cpu")) if copies else None
        state = cls(tensor, content)
        state.record_versions()
        return state

    @property
    def nbytes(self) -> int:
        """Size of the copy in bytes."""
        if self.content is None:
            return 0
        return self.content.numel() * self.content.element_size()

    def record_versions(self) -> None:
        """Record the versions of the tensor, to compare with later ones."""
        self._versions = sum(tensor._version for tensor in self.counted)

    @property
    def has_been_written(self) -> bool:
        """True if version counters have risen since they were recorded."""
        return sum(tensor._version for tensor in self.counted) != self._versions

    @property
    def is_unchanged(self) -> bool:
        """True if the content has the same bits as the copy, or cannot be compared. Reads all entries."""
        if self.content is None or self.tensor is None or self.content.layout is not torch.strided or self.content.is_quantized:
            return True
        return have_same_bits(self.content, shard_of(self.tensor).detach().to(self.content.device))

    def restored(self) -> Tensor | None:
        """Restore the content of the tensor; return it, or a new tensor where it cannot be written to, such as a sparse one."""
        # outside inference mode nothing else can have written to an inference tensor either
        if self.tensor is None or self.content is None or self.tensor.is_inference():
            return self.tensor
        shard = shard_of(self.tensor)
        if shard.layout is not torch.strided or shard.is_quantized:
            return self.content.clone()
        if shard.shape != self.content.shape:
            if shard is not self.tensor:
                return self.content.clone()
            self.tensor.resize_(self.content.shape)
        # entries that share memory, as after expand, are written once: torch refuses more
        once = tuple(slice(0, 1 if stride == 0 else None) for stride in shard.stride())
        shard.data[once].copy_(self.content[once])
        return self.tensor

    def write_where(self, flag: Tensor, target: Tensor | None) -> bool:
        """Write the copy to a tensor if a flag is set, without a host sync.

        Args:
            flag: The flag, 0-dim bool.
            target: The tensor to write to.

        Returns:
            False if the copy cannot be written to this tensor; nothing was done then.
        """
        if target is None or self.content is None:
            return target is None and self.tensor is None
        shard = shard_of(target)
        is_alike = (shard.shape, shard.dtype, shard.layout) == (self.content.shape, self.content.dtype, torch.strided)
        if not is_alike or overlaps(shard) or shard.is_quantized or shard.is_inference():
            return False
        shard.data.copy_(torch.where(flag.to(shard.device), self.content.to(shard.device), shard))
        return True


class TensorCopies:
    """Copies of tensors by name, in one flat tensor for each dtype and device, so that few operations copy all of them."""

    def __init__(self) -> None:
        self._live: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._groups: list[_FlatCopies] = []
        self._matched_with: tuple[TensorCopies, int] | None = None
        self._generation = 0
        self._is_complete = True

    def add(self, name: str, live: Tensor, content: Tensor | None) -> None:
        """Add a tensor.

        Args:
            name: The name of the tensor.
            live: The tensor.
            content: The entries at the time of the other copies; None for the present ones.
        """
        self._live[name] = live
        if content is None:
            content = shard_of(live).detach()
        self._pending[name] = content
        self._is_complete = False

    def remove(self, name: str) -> Tensor | None:
        """Remove a tensor; return its copy, or None if it was not there."""
        if name not in self._live:
            return None
        copy = dict(self.named())[name].clone()
        del self._live[name]
        self._is_complete = False
        return copy

    @torch.no_grad()
    def _complete(self) -> None:
        """Allocate memory for added tensors, and free that of removed ones."""
        known = {name: copy for group in self._groups for name, copy in group.named()} | self._pending
        kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        for name, live in self._live.items():
            kinds.setdefault((live.dtype, live.device), []).append(name)
        groups = [_FlatCopies({name: self._live[name] for name in names}, known) for names in kinds.values()]
        for group in groups:
            group.fill(known)
        self._groups, self._pending, self._is_complete = groups, {}, True
        self._generation += 1

    @property
    def _complete_groups(self) -> list[_FlatCopies]:
        if not self._is_complete:
            self._complete()
        return self._groups

    def keep(self) -> None:
        """Copy all tensors as they are now."""
        for group in self._complete_groups:
            group.keep()

    @property
    def resized(self) -> list[str]:
        """Names of tensors with another shape than their copies: ``resize_`` has changed the tensor itself."""
        return [name for name, copy in self.named() if shard_of(self._live[name]).shape != copy.shape]

    def keep_from(self, other: TensorCopies) -> None:
        """Copy from other copies of the same tensors."""
        groups, theirs = self._complete_groups, other._complete_groups
        if self._matched_with != (other, self._generation + other._generation):
            named = {name: copy for group in theirs for name, copy in group.named()}
            for group in groups:
                group.match(named)
            self._matched_with = (other, self._generation + other._generation)
        for group in groups:
            group.keep_from_matched()

    def restore(self) -> None:
        """Restore all tensors."""
        for group in self._complete_groups:
            group.restore()

    def restore_where(self, flag: Tensor) -> None:
        """Restore all tensors if a flag, 0-dim bool, is set, without a host sync."""
        for group in self._complete_groups:
            group.restore_where(flag)

    def copies(self) -> dict[int, Tensor]:
        """Return the copies by the ``id`` of their tensor."""
        return {id(self._live[name]): copy for name, copy in self.named()}

    def named(self) -> list[tuple[str, Tensor]]:
        """Return the names and the copies."""
        return [pair for group in self._complete_groups for pair in group.named()]


class _FlatCopies:
    """Tensors of one dtype on one device, and their copies as views of one flat tensor."""

    def __init__(self, live: dict[str, Tensor], known: dict[str, Tensor]) -> None:
        self._names = list(live)
        self._live = [shard_of(tensor) for tensor in live.values()]
        self._shapes = [known[name].shape for name in live]
        self.kept, self._copies = self._allocate()
        self._sources: list[Tensor] = []
        self._scratch: tuple[Tensor, list[Tensor]] | None = None

    def _allocate(self) -> tuple[Tensor, list[Tensor]]:
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

    def match(self, copies: dict[str, Tensor]) -> None:
        """Find the other copies of the same tensors."""
        self._sources = [copies[name] for name in self._names]

    @torch.no_grad()
    def keep_from_matched(self) -> None:
        torch._foreach_copy_(self._copies, self._sources)

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_([live.data for live in self._live], self._copies)

    @torch.no_grad()
    def restore_where(self, flag: Tensor) -> None:
        # by selection, not arithmetic: entries that are not chosen may be NaN
        flat, chosen = self._scratch = self._scratch or self._allocate()
        torch._foreach_copy_(chosen, self._live)
        torch.where(flag.to(flat.device), self.kept, flat, out=flat)
        torch._foreach_copy_([live.data for live in self._live], chosen)


def _copy(tensor: Tensor | None, device: torch.device | None = None) -> Tensor | None:
    """Return a copy of a tensor's entries, of this rank's shard; None if it cannot be copied."""
    if tensor is None or tensor.is_meta:
        return None
    try:
        copy = shard_of(tensor).detach().clone()
        if device is not None:
            copy = copy.to(device)
    except (NotImplementedError, RuntimeError, TypeError):  # subclasses of other packages need not implement clone
        return None
    return copy


def have_same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same bits, so that NaN equals itself and 0.0 differs from -0.0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)))
