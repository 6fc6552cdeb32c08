"""Detection of the buffers that forward passes write to.

Trap: a skipped step must restore buffers, but copying all of them in each window would cost a pass over every mask and table of the
model, and no attribute tells which buffers change. Three signs do: another tensor is in the buffer's place, its version counter has
risen, or its content differs, because batch normalization and writes through ``.data`` go around the counter. The first two are
checked in each window and read no entry. Contents are compared in the first windows and on bad steps only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter, is_
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from clip_callbacks.core.nonfinite import has_arithmetic
from clip_callbacks.core.reduction import shard_of
from clip_callbacks.trainer.tensor_copies import TensorState

INITIAL_COPY_BYTES = 2**28
"""Bytes of host memory for copies of buffers that have never changed, with which their first change can be undone, too."""

COMPARED_WINDOWS = 2
"""Number of first windows after which contents are compared: code that goes around the counters mostly does so from the start."""

SEARCH_EVERY_N_WINDOWS = 64
"""Interval, in windows, at which the module is searched for new buffers after the first windows."""

_version = attrgetter("_version")


class BufferSlot(NamedTuple):
    """The place of a buffer in a module.

    Args:
        name: The qualified name of the buffer.
        owner: The submodule that owns it.
        key: The name of the buffer in its owner.
    """

    name: str
    owner: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor | None:
        """The present tensor."""
        return self.owner._buffers.get(self.key)

    def put(self, tensor: Tensor | None) -> None:
        """Assign another tensor."""
        self.owner._buffers[self.key] = tensor

    @property
    def is_persistent(self) -> bool:
        """True if checkpoints hold the buffer."""
        return self.key not in self.owner._non_persistent_buffers_set


class Replaced(NamedTuple):
    """The tensor of a buffer before another one was assigned.

    Args:
        tensor: The tensor; None if there was none.
    """

    tensor: Tensor | None


class BufferObserver(Protocol):
    """An object that is notified of each buffer that was found to change."""

    def add(self, slot: BufferSlot, initial: TensorState | None, replaced: Replaced | None) -> None:
        """Add a buffer that was found to change.

        Args:
            slot: The buffer.
            initial: The state of the buffer until then; None if it is not known.
            replaced: The tensor before, if another one was assigned.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a buffer that is no longer in the module."""
        ...


class BufferTracker:
    """The buffers of a module, divided into those that change and those that never have.

    Buffers of averages of the weights (``AveragedModel``) inside the module are left out: they belong to the average.

    Args:
        module: The module in training.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._slots: dict[str, BufferSlot] = {}
        self._live: list[Tensor | None] = []
        self._changing: set[str] = set()
        self._initial: dict[str, TensorState] = {}
        self._initially_nonfinite: set[str] = set()
        self._watched: list[Tensor] = []
        self._versions = 0
        self._observers: list[BufferObserver] = []
        self._windows = 0
        self._lazy: dict[nn.Module, RemovableHandle] = {}

    @property
    def keeps_statistics(self) -> bool:
        """True if there is batch normalization, which changes from the first forward pass on."""
        return any(isinstance(each, _NormBase) and each.running_mean is not None for each in self.module.modules())

    @property
    def has_changing(self) -> bool:
        """True if any buffer is known to change."""
        return bool(self._changing)

    @property
    def compares_every_window(self) -> bool:
        """True if contents were compared when the window began, so that a difference now is a change of this window."""
        return self._windows <= COMPARED_WINDOWS + 1

    def is_initially_nonfinite(self, name: str) -> bool:
        """Return whether a buffer was non-finite when the fit began, such as a mask of -inf or an empty memory bank."""
        return name in self._initially_nonfinite

    def constants_with_nan(self) -> list[tuple[str, Tensor]]:
        """Return the names and contents of buffers that have never changed and hold NaN."""
        each = [(name, state.content) for name, state in self._initial.items() if name in self._initially_nonfinite]
        return [(name, content) for name, content in each if content is not None and bool(content.isnan().any())]

    def changing(self) -> Iterator[BufferSlot]:
        """Return the buffers that are known to change."""
        return (self._slots[name] for name in self._changing)

    def register(self, observer: BufferObserver) -> None:
        """Report each buffer that is found to change from now on to an observer."""
        self._observers.append(observer)

    def begin_window(self) -> None:
        """Find changed buffers at the beginning of an accumulation window."""
        self._windows = windows = self._windows + 1
        if windows > 1 and self._slots:
            self.find_changed()
        compares = windows <= COMPARED_WINDOWS + 1
        if compares:
            self._compare()
        if compares or windows % SEARCH_EVERY_N_WINDOWS == 0:
            self._search_new()
            self._await_lazy()

    def find_changed(self) -> None:
        """Find buffers that have changed for the first time, by identity and version counters. No entry is read."""
        if not self._slots:
            return
        slots = self._slots.values()
        live = [slot.owner._buffers.get(slot.key) for slot in slots]
        are_replaced = not all(map(is_, live, self._live))
        are_written = sum(map(_version, self._watched)) != self._versions  # counters only rise: one sum compares all
        if are_replaced:
            for slot, now, then in zip(slots, live, self._live, strict=True):
                if now is not then:
                    self._mark(slot, Replaced(then))
            self._live = live
        if are_written:
            for slot in [self._slots[name] for name, state in self._initial.items() if state.has_been_written]:
                self._mark(slot)
        if are_replaced or are_written:
            self._watch()

    def compare_contents(self) -> list[str]:
        """Find all buffers that have changed, on a bad step: contents are compared, too.

        Returns:
            The names of buffers that are non-finite and have changed around their version counters, at an unknown time since the
            first windows. The last known content of these is the one at the beginning of the fit.
        """
        self.find_changed()
        if self.compares_every_window:
            self._compare()
            return []
        late = [self._slots[name] for name, state in self._initial.items() if not state.is_unchanged]
        bad = [slot for slot in late if not is_finite(slot.tensor)]
        for slot in late:
            self._mark(slot, is_known=slot in bad)
        if late:
            self._watch()
        return [slot.name for slot in bad]

    def reset_new_statistics(self) -> list[str]:
        """Reset batch statistics that are non-finite and were created in this window; called on bad steps only.

        Returns:
            The names of all non-finite buffers that were created in this window. No earlier content of these is known.
        """
        known = {(id(slot.owner), slot.key) for slot in self._slots.values()}
        new = [slot for slot in _slots(self.module) if (id(slot.owner), slot.key) not in known and not _is_lazy(slot.tensor)]
        bad = [slot for slot in new if not is_finite(slot.tensor)]
        for owner in {id(slot.owner): slot.owner for slot in bad}.values():
            if isinstance(owner, _NormBase):
                owner.reset_running_stats()
        return [slot.name for slot in bad]

    def _compare(self) -> None:
        changed = [self._slots[name] for name, state in self._initial.items() if not state.is_unchanged]
        for slot in changed:
            self._mark(slot)
        if changed:
            self._watch()

    def _mark(self, slot: BufferSlot, replaced: Replaced | None = None, *, is_known: bool = True) -> None:
        """Record that a buffer changes.

        Args:
            slot: The buffer.
            replaced: The tensor before, if another one was assigned.
            is_known: If True, the initial state is the buffer's state before this window.
        """
        initial = self._initial.pop(slot.name, None)
        if not is_known:
            initial = None
        self._changing.add(slot.name)
        for observer in self._observers:
            observer.add(slot, initial, replaced)

    def _await_lazy(self) -> None:
        """Add the buffers of lazy modules as soon as they are created, right before the first forward pass writes to them."""
        for slot in _slots(self.module):
            if _is_lazy(slot.tensor) and slot.owner not in self._lazy:
                # LazyModuleMixin creates them in a forward pre-hook of its own, which was registered before this one
                self._lazy[slot.owner] = slot.owner.register_forward_pre_hook(self._add_created)

    def _add_created(self, owner: nn.Module, inputs: object) -> None:
        self._lazy.pop(owner).remove()
        own = [slot for slot in _slots(self.module) if slot.owner is owner and not _is_lazy(slot.tensor)]
        self._add([slot for slot in own if slot.name not in self._slots])

    def _search_new(self) -> None:
        """Search the module for buffers that were not there before, and remove those that are gone."""
        now = {slot.name: slot for slot in _slots(self.module) if not _is_lazy(slot.tensor)}
        for name in [name for name, slot in self._slots.items() if name not in now or now[name].owner is not slot.owner]:
            self._remove(name)
        self._live = [slot.tensor for slot in self._slots.values()]
        self._add([slot for name, slot in now.items() if name not in self._slots])
        self._watch()

    def _add(self, new: list[BufferSlot]) -> None:
        """Add buffers in their present state, the smallest ones first as long as there is memory for copies.

        They are copied because the first change ever may come from a bad step. The states of other buffers stay: the window under
        way may have changed these.
        """
        self._slots |= {slot.name: slot for slot in new}
        self._live += [slot.tensor for slot in new]
        bytes_left = INITIAL_COPY_BYTES - sum(state.nbytes for state in self._initial.values())
        for slot in sorted(new, key=lambda slot: _nbytes(slot.tensor)):
            # statistics go around the version counter, and may begin to do so long after the fit has begun
            if isinstance(slot.owner, _NormBase):
                self._initial[slot.name] = TensorState.of(slot.tensor)
                self._mark(slot)
            else:
                bytes_left -= _nbytes(slot.tensor)
                initial = self._initial[slot.name] = TensorState.on_host(slot.tensor, copies=bytes_left >= 0)
                self._watched += initial.counted
                self._versions += sum(map(_version, initial.counted))
                if not is_finite(initial.content):
                    self._initially_nonfinite.add(slot.name)

    def _remove(self, name: str) -> None:
        """Remove a buffer whose module is gone."""
        del self._slots[name]
        self._initial.pop(name, None)
        self._changing.discard(name)
        for observer in self._observers:
            observer.remove(name)

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._lazy.values():
            handle.remove()
        self._lazy.clear()

    def _watch(self) -> None:
        """Record the version counters of buffers that have never changed."""
        self._watched = [tensor for state in self._initial.values() for tensor in state.counted]
        self._versions = sum(map(_version, self._watched))
        for state in self._initial.values():
            state.record_versions()


def _slots(module: nn.Module) -> Iterable[BufferSlot]:
    averages = tuple(f"{name}." for name, child in module.named_modules() if isinstance(child, AveragedModel))
    for place, owner in module.named_modules():
        prefix = f"{place}." if place else ""
        if owner._buffers and not prefix.startswith(averages):
            for key in owner._buffers:
                yield BufferSlot(prefix + key, owner, key)


def _is_lazy(tensor: Tensor | None) -> bool:
    return tensor is not None and is_lazy(tensor)


def _nbytes(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    shard = shard_of(tensor)
    return shard.numel() * shard.element_size()


def is_finite(tensor: Tensor | None) -> bool:
    """Return whether a buffer has no NaN and no infinite entries. True if its dtype has none, or torch cannot be asked."""
    if tensor is None or not has_float_entries(tensor):
        return True
    return bool(torch.isfinite(shard_of(tensor)).all())


def has_float_entries(tensor: Tensor) -> bool:
    """Return whether entries may be NaN, and torch can be asked whether they are."""
    return tensor.layout is torch.strided and has_arithmetic(shard_of(tensor))
