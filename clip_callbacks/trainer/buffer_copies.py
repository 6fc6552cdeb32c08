"""Copies of the buffers that change, as they were at one time: before a window, a batch or a step.

Trap: a buffer may be written in place, resized in its place, or assigned another tensor; other modules may hold the same tensor.
Most are copied together, in few operations; those that are assigned or resized are copied one by one, with their tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clip_callbacks.core.reduction import shard_of
from clip_callbacks.trainer.buffer_tracker import BufferSlot, BufferTracker, Replaced, has_float_entries, is_finite
from clip_callbacks.trainer.tensor_copies import TensorCopies, TensorState, fits_among_others


class BufferCopies:
    """Copies of the buffers of a module that change.

    Args:
        tracker: The tracker that finds the buffers that change.
        wanted: Predicate that selects the buffers to copy; None for all.
    """

    def __init__(self, tracker: BufferTracker, wanted: Callable[[BufferSlot], bool] | None = None) -> None:
        self._tracker = tracker
        self._wanted = wanted
        self._slots: dict[str, BufferSlot] = {}
        self._in_place = TensorCopies()
        self._separate: dict[str, TensorState] = {}
        self._unknown: set[str] = set()  # buffers whose content before this window is not known
        self._new: set[str] = set()  # buffers added since the last copy
        tracker.register(self)
        for slot in tracker.changing():
            self.add(slot, None, None)
        self._unknown.clear()

    def add(self, slot: BufferSlot, initial: TensorState | None, replaced: Replaced | None) -> None:
        """Add a buffer that was found to change.

        Args:
            slot: The buffer.
            initial: The state of the buffer until then; None if it is not known.
            replaced: The tensor before, if another one was assigned.
        """
        if self._wanted is not None and not self._wanted(slot):
            return
        name, live = slot.name, slot.tensor
        is_new, self._slots[name] = name not in self._slots, slot
        if replaced is not None or not fits_among_others(live):
            self._separate_one(name, initial, replaced)
        elif is_new:
            self._in_place.add(name, live, initial.content if initial else None)
        if is_new:
            self._new.add(name)
        if is_new and replaced is None and (initial is None or initial.content is None):
            self._unknown.add(name)

    def _separate_one(self, name: str, initial: TensorState | None, replaced: Replaced | None) -> None:
        """Copy a buffer together with its tensor from now on, because another tensor may be assigned."""
        copy = self._in_place.remove(name)
        if name in self._separate:
            return
        if initial is not None:
            self._separate[name] = initial
            return
        tensor = self._slots[name].tensor
        if replaced:
            tensor = replaced.tensor
        self._separate[name] = TensorState(tensor, copy)

    def remove(self, name: str) -> None:
        """Remove a buffer whose module is gone."""
        self._slots.pop(name, None)
        self._in_place.remove(name)
        self._separate.pop(name, None)

    def keep(self) -> None:
        """Copy the buffers as they are now."""
        if not self._slots:
            return
        try:
            self._in_place.keep()
        except RuntimeError:  # a buffer was resized; to compare shapes in each window would cost more than this
            self._separate_resized()
            self._in_place.keep()
        if self._separate:
            self._separate = {name: TensorState.of(self._slots[name].tensor) for name in self._separate}
        if self._new:
            self._new.clear()
            self._unknown.clear()

    def _separate_resized(self) -> None:
        """Separate buffers that were resized in their place, as observers of channels do in their first forward pass."""
        for name in self._in_place.resized:
            self._separate_one(name, None, Replaced(self._slots[name].tensor))

    def keep_bad_from(self, other: BufferCopies) -> None:
        """Replace copies of modules with a non-finite copy by those of another time; called on bad steps only."""
        copies = dict(self.named())
        owners = {id(self._slots[name].owner) for name, copy in copies.items() if not is_finite(copy)}
        if not owners:
            return
        theirs = dict(other.named())
        for name, slot in self._slots.items():
            if id(slot.owner) in owners and name in self._separate:
                self._separate[name] = other._separate[name]
            elif id(slot.owner) in owners and name in theirs:
                copies[name].copy_(theirs[name])

    def keep_from(self, other: BufferCopies) -> None:
        """Copy from other copies of the same buffers."""
        self._in_place.keep_from(other._in_place)
        self._separate = {name: other._separate[name] for name in self._separate}
        self._unknown &= other._unknown
        self._new &= other._new

    @torch.no_grad()
    def restore(self) -> list[str]:
        """Restore the buffers.

        Returns:
            The names of buffers that could not be restored: they have changed for the first time, and were too large to be copied
            before.
        """
        lost, self._unknown = sorted(self._unknown), set()
        self._separate_resized()
        self._in_place.restore()
        for name, state in self._separate.items():
            if name not in lost:
                self._restore_one(self._slots[name], state)
        return lost

    def _restore_one(self, slot: BufferSlot, state: TensorState) -> None:
        live = slot.tensor
        has_other_shape = live is not None and state.content is not None and shard_of(live).shape != state.content.shape
        # a buffer outside checkpoints with another shape is a cache that has grown; an attribute elsewhere may hold its length
        if slot.is_persistent or not has_other_shape:
            slot.put(state.restored())

    @torch.no_grad()
    def restore_where(self, flag: Tensor) -> None:
        """Restore the buffers if a flag, 0-dim bool, is set; without a host sync if shapes have not changed."""
        self._unknown = set()
        self._separate_resized()
        self._in_place.restore_where(flag)
        for name, state in self._separate.items():
            if not state.write_where(flag, self._slots[name].tensor) and bool(flag):
                self._restore_one(self._slots[name], state)

    def copies(self) -> dict[int, Tensor]:
        """Return the copies by the ``id`` of the buffer's tensor."""
        separate = [(self._slots[name].tensor, state.content) for name, state in self._separate.items()]
        return self._in_place.copies() | {id(live): content for live, content in separate if content is not None}

    def named(self) -> list[tuple[str, Tensor]]:
        """Return the names and the copies; called on bad steps only."""
        separate = [(name, state.content) for name, state in self._separate.items() if state.content is not None]
        return self._in_place.named() + separate

    def suspects(self, *, include_initially_nonfinite: bool) -> list[tuple[str, Tensor]]:
        """Return the names and copies of buffers that should be finite; called on bad steps only.

        A buffer that has never changed is as the user made it, and one that was non-finite when the fit began may be so by design.

        Args:
            include_initially_nonfinite: If True, the latter are suspects if they hold NaN: no step has been good with them.
        """
        self._tracker.find_changed()
        kept = self.named()
        found = [(name, copy) for name, copy in kept if name not in self._new and not self._tracker.is_initially_nonfinite(name)]
        if include_initially_nonfinite:
            initially = [(name, copy) for name, copy in kept if self._tracker.is_initially_nonfinite(name)]
            found += [(name, copy) for name, copy in initially if bool(copy.isnan().any())]
            found += self._tracker.constants_with_nan()
        return found

    def newly_nonfinite(self) -> list[str]:
        """Return the names of buffers that are non-finite now and were finite in the copy. Reads all of them."""
        return [name for name, copy in self.named() if _has_become_nonfinite(copy, self._slots[name].tensor)]


def _has_become_nonfinite(before: Tensor, now: Tensor | None) -> bool:
    if now is None or not has_float_entries(now):
        return False
    shard = shard_of(now).detach()
    bad = torch.isfinite(shard).logical_not()
    if before.shape == shard.shape:
        bad = bad.logical_and(torch.isfinite(before.to(shard.device)))
    return bool(bad.any())
