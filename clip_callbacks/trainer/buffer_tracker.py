"""The buffers of a module: which of them forward passes write to, found out as they do.

Three signs tell that a buffer has changed: another tensor stands in its place, its version counter has risen, or its content is
another one, for batch normalization and whatever writes through ``.data`` go around the counter. The first two are looked at for
each window and cost no pass over the entries. Contents are compared in the first windows, and on bad steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter, is_
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from clip_callbacks.core.nonfinite import has_arithmetic
from clip_callbacks.core.reduction import shard_of
from clip_callbacks.trainer.tensor_copies import Kept, TensorCopies, fits_among_others

FIRST_COPIES = 2**28
"""Bytes of host memory for copies of buffers that have never changed, so that the first change ever can be undone too."""

COMPARED_WINDOWS = 2
"""After how many of the first windows contents are compared: who writes around version counters mostly does so from the start."""

TAKEN_UP_EVERY = 64
"""In one of so many later windows the module is searched for buffers that were not there before."""

_version = attrgetter("_version")


class Slot(NamedTuple):
    """The place of a buffer.

    Args:
        name: Its name in the module.
        owner: The module that owns it.
        key: Its name there.
    """

    name: str
    owner: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor | None:
        """What stands there now."""
        return self.owner._buffers.get(self.key)

    def put(self, tensor: Tensor | None) -> None:
        """Put a tensor there."""
        self.owner._buffers[self.key] = tensor

    @property
    def is_persistent(self) -> bool:
        """Whether checkpoints hold it."""
        return self.key not in self.owner._non_persistent_buffers_set


class Replaced(NamedTuple):
    """What stood in a buffer's place before another tensor was put there."""

    tensor: Tensor | None


class WrittenBuffers:
    """The buffers of a module, those that change apart from those that never have.

    Averages of the weights (``AveragedModel``) inside the module are left out: their buffers belong to the average.

    Args:
        module: The module in training.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._slots: dict[str, Slot] = {}
        self._live: list[Tensor | None] = []
        self._changing: set[str] = set()
        self._first: dict[str, Kept] = {}
        self._odd: set[str] = set()
        self._watched: list[Tensor] = []
        self._versions = 0
        self._views: list[BufferCopies] = []
        self._windows = 0
        self._lazy: dict[nn.Module, RemovableHandle] = {}

    @property
    def keeps_statistics(self) -> bool:
        """Whether there is batch normalization, which changes from the first forward pass on."""
        return any(isinstance(each, _NormBase) and each.running_mean is not None for each in self.module.modules())

    @property
    def has_changing(self) -> bool:
        """Whether any is known to change."""
        return bool(self._changing)

    @property
    def is_young(self) -> bool:
        """Whether contents were compared when the window began, so that what differs now has changed in it."""
        return self._windows <= COMPARED_WINDOWS + 1

    def is_odd(self, name: str) -> bool:
        """Whether a buffer was not finite when the fit began, as a mask of -inf, or a memory bank that is yet to be filled."""
        return name in self._odd

    def odd_constants(self) -> list[tuple[str, Tensor]]:
        """Those that have never changed and hold NaN, by name."""
        each = [(name, first.content) for name, first in self._first.items() if name in self._odd]
        return [(name, content) for name, content in each if content is not None and bool(content.isnan().any())]

    def changing(self) -> Iterator[Slot]:
        """Those that are known to change."""
        return (self._slots[name] for name in self._changing)

    def register(self, view: BufferCopies) -> None:
        """Tell a view of each buffer that is found to change from now on."""
        self._views.append(view)

    def begin_window(self) -> None:
        """A window begins, in which buffers may change."""
        self._windows += 1
        if self._windows > 1:
            self.look()
        if self.is_young:
            self._compare()
        if self.is_young or self._windows % TAKEN_UP_EVERY == 0:
            self._take_up_new()
            self._await_lazy()

    def look(self) -> None:
        """Find those that have changed for the first time, by the tensors in their places and by version counters."""
        if not self._slots:
            return
        slots = self._slots.values()
        live = [slot.owner._buffers.get(slot.key) for slot in slots]
        are_replaced = not all(map(is_, live, self._live))
        are_written = sum(map(_version, self._watched)) != self._versions
        if are_replaced:
            for slot, now, then in zip(slots, live, self._live, strict=True):
                if now is not then:
                    self._mark(slot, Replaced(then))
            self._live = live
        if are_written:
            for slot in [self._slots[name] for name, first in self._first.items() if first.has_been_written]:
                self._mark(slot)
        if are_replaced or are_written:
            self._watch()

    def look_closely(self) -> list[str]:
        """Find all that have changed, on a bad step: contents are compared too.

        Returns:
            The names of those that are not finite, and have changed around their version counters at some time since the first
            windows: the last that is known of them is what they were when the fit began.
        """
        self.look()
        if self.is_young:
            self._compare()
            return []
        late = [self._slots[name] for name, first in self._first.items() if not first.is_still_there]
        bad = [slot for slot in late if not is_finite(slot.tensor)]
        for slot in late:
            self._mark(slot, is_known=slot in bad)
        if late:
            self._watch()
        return [slot.name for slot in bad]

    def begin_anew(self) -> list[str]:
        """Have batch statistics begin anew that are not finite and were made since the window began; on bad steps only.

        Returns:
            The names of all buffers that were: of these nothing is known of before.
        """
        known = {(id(slot.owner), slot.key) for slot in self._slots.values()}
        made = [slot for slot in _slots(self.module) if (id(slot.owner), slot.key) not in known and not _is_lazy(slot.tensor)]
        bad = [slot for slot in made if not is_finite(slot.tensor)]
        for owner in {id(slot.owner): slot.owner for slot in bad}.values():
            if isinstance(owner, _NormBase):
                owner.reset_running_stats()
        return [slot.name for slot in bad]

    def _compare(self) -> None:
        changed = [self._slots[name] for name, first in self._first.items() if not first.is_still_there]
        for slot in changed:
            self._mark(slot)
        if changed:
            self._watch()

    def _mark(self, slot: Slot, replaced: Replaced | None = None, *, is_known: bool = True) -> None:
        """A buffer turns out to change; until now it was what it was at first, if that is known."""
        first = self._first.pop(slot.name, None)
        self._changing.add(slot.name)
        for view in self._views:
            view.adopt(slot, first if is_known else None, replaced)

    def _await_lazy(self) -> None:
        """Have the buffers of lazy modules taken up as they are made, right before the first forward pass writes to them."""
        for slot in _slots(self.module):
            if _is_lazy(slot.tensor) and slot.owner not in self._lazy:
                self._lazy[slot.owner] = slot.owner.register_forward_pre_hook(self._take_up_made)

    def _take_up_made(self, owner: nn.Module, inputs: object) -> None:
        """Take up the buffers of a lazy module, which has just made them in a hook before this one."""
        self._lazy.pop(owner).remove()
        own = [slot for slot in _slots(self.module) if slot.owner is owner and not _is_lazy(slot.tensor)]
        self._take_up([slot for slot in own if slot.name not in self._slots])

    def _take_up_new(self) -> None:
        """Take up buffers that were not there before; small ones first are copied, since the first change ever may be a bad one."""
        now = {slot.name: slot for slot in _slots(self.module) if not _is_lazy(slot.tensor)}
        for name in [name for name, slot in self._slots.items() if name not in now or now[name].owner is not slot.owner]:
            self._forget(name)
        self._live = [slot.tensor for slot in self._slots.values()]
        self._take_up([slot for name, slot in now.items() if name not in self._slots])
        self._watch()

    def _take_up(self, new: list[Slot]) -> None:
        """Take up buffers as they are now; of others nothing is forgotten that the window under way has done to them."""
        self._slots |= {slot.name: slot for slot in new}
        self._live += [slot.tensor for slot in new]
        room = FIRST_COPIES - sum(first.nbytes for first in self._first.values())
        for slot in sorted(new, key=lambda slot: _nbytes(slot.tensor)):
            if isinstance(slot.owner, _NormBase):  # writes around the version counter, maybe long after the fit has begun
                self._first[slot.name] = Kept.of(slot.tensor)
                self._mark(slot)
            else:
                room -= _nbytes(slot.tensor)
                first = self._first[slot.name] = Kept.on_host(slot.tensor, has_room=room >= 0)
                self._watched += first.counted
                self._versions += sum(map(_version, first.counted))
                if not is_finite(first.content):
                    self._odd.add(slot.name)

    def _forget(self, name: str) -> None:
        """Let go of a buffer whose module is no longer there."""
        del self._slots[name]
        self._first.pop(name, None)
        self._changing.discard(name)
        for view in self._views:
            view.forget(name)

    def detach(self) -> None:
        """Take all hooks off."""
        for handle in self._lazy.values():
            handle.remove()
        self._lazy.clear()

    def _watch(self) -> None:
        """Remember version counters of those that have never changed."""
        self._watched = [tensor for first in self._first.values() for tensor in first.counted]
        self._versions = sum(map(_version, self._watched))
        for first in self._first.values():
            first.note_versions()


class BufferCopies:
    """The buffers of a module that change, as they were at one time.

    Args:
        buffers: Which ones change.
        wanted: Which of them to keep; None: all.
    """

    def __init__(self, buffers: WrittenBuffers, wanted: Callable[[Slot], bool] | None = None) -> None:
        self._buffers = buffers
        self._wanted = wanted
        self._slots: dict[str, Slot] = {}
        self._in_place = TensorCopies()
        self._loose: dict[str, Kept] = {}
        self._unknown: set[str] = set()
        self._fresh: set[str] = set()
        buffers.register(self)
        for slot in buffers.changing():
            self.adopt(slot, None, None)
        self._unknown.clear()

    def adopt(self, slot: Slot, first: Kept | None, replaced: Replaced | None) -> None:
        """Take up a buffer that has turned out to change.

        Args:
            slot: Its place.
            first: What it was until then, if that is known.
            replaced: What stood there, if another tensor does now.
        """
        if self._wanted is not None and not self._wanted(slot):
            return
        name, live = slot.name, slot.tensor
        is_new, self._slots[name] = name not in self._slots, slot
        if replaced is not None or not fits_among_others(live):
            self._loosen(name, first, replaced)
        elif is_new:
            self._in_place.add(name, live, first.content if first else None)
        if is_new:
            self._fresh.add(name)
        if is_new and replaced is None and (first is None or first.content is None):
            self._unknown.add(name)

    def _loosen(self, name: str, first: Kept | None, replaced: Replaced | None) -> None:
        """Keep the tensor in a buffer's place too, since another one may be put there."""
        copy = self._in_place.remove(name)
        if name in self._loose:
            return
        if first is not None:
            self._loose[name] = first
        else:
            tensor = replaced.tensor if replaced else self._slots[name].tensor
            self._loose[name] = Kept(tensor, copy)

    def forget(self, name: str) -> None:
        """Let go of a buffer whose module is no longer there."""
        self._slots.pop(name, None)
        self._in_place.remove(name)
        self._loose.pop(name, None)

    def keep(self) -> None:
        """Copy them as they are."""
        if not self._slots:
            return
        try:
            self._in_place.keep()
        except RuntimeError:
            self._loosen_resized()
            self._in_place.keep()
        if self._loose:
            self._loose = {name: Kept.of(self._slots[name].tensor) for name in self._loose}
        if self._fresh:
            self._fresh.clear()
            self._unknown.clear()

    def _loosen_resized(self) -> None:
        """Keep by themselves those that were resized in their place, as observers of channels do in their first pass."""
        for name in self._in_place.resized:
            self._loosen(name, None, Replaced(self._slots[name].tensor))

    def keep_bad_from(self, other: BufferCopies) -> None:
        """Take the copies that others have of the buffers of those modules of which a copy is not finite; on bad steps only."""
        copies = dict(self.named())
        owners = {id(self._slots[name].owner) for name, copy in copies.items() if not is_finite(copy)}
        if not owners:
            return
        theirs = dict(other.named())
        for name, slot in self._slots.items():
            if id(slot.owner) in owners and name in self._loose:
                self._loose[name] = other._loose[name]
            elif id(slot.owner) in owners and name in theirs:
                copies[name].copy_(theirs[name])

    def keep_from(self, other: BufferCopies) -> None:
        """Take the copies that others have of the same buffers."""
        self._in_place.keep_from(other._in_place)
        self._loose = {name: other._loose[name] for name in self._loose}
        self._unknown &= other._unknown
        self._fresh &= other._fresh

    @torch.no_grad()
    def restore(self) -> list[str]:
        """Put the buffers back to the copies.

        Returns:
            The names of those that have changed for the first time, too large for a copy of what they were.
        """
        lost, self._unknown = sorted(self._unknown), set()
        self._loosen_resized()
        self._in_place.restore()
        for name, kept in self._loose.items():
            if name not in lost:
                self._put_back(self._slots[name], kept)
        return lost

    def _put_back(self, slot: Slot, kept: Kept) -> None:
        live = slot.tensor
        has_other_shape = live is not None and kept.content is not None and shard_of(live).shape != kept.content.shape
        if slot.is_persistent or not has_other_shape:  # else a cache has grown; an attribute elsewhere may say how long it is
            slot.put(kept.restored())

    @torch.no_grad()
    def restore_where(self, flag: Tensor) -> None:
        """Put the buffers back to the copies if a flag is set, 0-dim bool, which stays unread if shapes are as they were."""
        self._unknown = set()
        self._loosen_resized()
        self._in_place.restore_where(flag)
        for name, kept in self._loose.items():
            if not kept.write_where(flag, self._slots[name].tensor) and bool(flag):
                self._put_back(self._slots[name], kept)

    def copies(self) -> dict[int, Tensor]:
        """The copies, by the ``id`` of the buffer."""
        loose = [(self._slots[name].tensor, kept.content) for name, kept in self._loose.items()]
        return self._in_place.copies() | {id(live): content for live, content in loose if content is not None}

    def named(self) -> list[tuple[str, Tensor]]:
        """The copies, by name; asked on bad steps only."""
        loose = [(name, kept.content) for name, kept in self._loose.items() if kept.content is not None]
        return self._in_place.named() + loose

    def suspects(self, *, odd_ones_too: bool) -> list[tuple[str, Tensor]]:
        """Those that should have been finite, by name; asked on bad steps only.

        What has never changed is as it was meant, and what was not finite when the fit began may be so by design.

        Args:
            odd_ones_too: Whether the latter are suspect too, as far as they hold NaN: no step has been good with them.
        """
        self._buffers.look()
        kept = self.named()
        found = [(name, copy) for name, copy in kept if name not in self._fresh and not self._buffers.is_odd(name)]
        if odd_ones_too:
            found += [(name, copy) for name, copy in kept if self._buffers.is_odd(name) and bool(copy.isnan().any())]
            found += self._buffers.odd_constants()
        return found

    def gone_bad(self) -> list[str]:
        """The names of those that are not finite now, and were; reads all of them."""
        return [name for name, copy in self.named() if _has_gone_bad(copy, self._slots[name].tensor)]


def _slots(module: nn.Module) -> Iterable[Slot]:
    averages = tuple(f"{name}." for name, child in module.named_modules() if isinstance(child, AveragedModel))
    for place, owner in module.named_modules():
        prefix = f"{place}." if place else ""
        if owner._buffers and not prefix.startswith(averages):
            for key in owner._buffers:
                yield Slot(prefix + key, owner, key)


def _is_lazy(tensor: Tensor | None) -> bool:
    return tensor is not None and is_lazy(tensor)


def _nbytes(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    shard = shard_of(tensor)
    return shard.numel() * shard.element_size()


def is_finite(tensor: Tensor | None) -> bool:
    """Whether entries are finite numbers, or none that can be otherwise."""
    if tensor is None or not _is_number(tensor):
        return True
    return bool(torch.isfinite(shard_of(tensor)).all())


def _has_gone_bad(before: Tensor, now: Tensor | None) -> bool:
    if now is None or not _is_number(now):
        return False
    shard = shard_of(now).detach()
    bad = torch.isfinite(shard).logical_not()
    if before.shape == shard.shape:
        bad = bad.logical_and(torch.isfinite(before.to(shard.device)))
    return bool(bad.any())


def _is_number(tensor: Tensor) -> bool:
    """Whether entries may be NaN, and torch can be asked."""
    return tensor.layout is torch.strided and has_arithmetic(shard_of(tensor))
