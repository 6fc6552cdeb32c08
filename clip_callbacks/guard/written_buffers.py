"""Buffers that forward passes write to. In automatic optimization a skipped step restores all of them."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from clip_callbacks.guard.buffers import Buffers
from clip_callbacks.guard.buffers_in_manual import buffers_in_manual_optimization
from clip_callbacks.guard.resource import Resource, ResourceScope
from clip_callbacks.trainer.buffer_copies import BufferCopies
from clip_callbacks.trainer.buffer_tracker import BufferTracker
from clip_callbacks.trainer.step_context import StepContext


def written_buffers(scope: ResourceScope) -> dict[int, Resource]:
    """Make the resource of each optimizer."""
    if not scope.contexts:
        return {}
    before = {index: each for index in scope.before if (each := scope.resource_before(index, Buffers))}
    is_same = before.keys() == {context.index for context in scope.contexts}
    # Buffers belong to the module: a window that is open while an optimizer takes up parameters keeps its copies.
    if is_same and all(each.goes_on(scope.contexts) for each in before.values()):
        return dict(before)
    for each in before.values():
        each.detach()
    written = BufferTracker(scope.module)
    if not scope.module.automatic_optimization:
        return buffers_in_manual_optimization(scope, written)
    return {context.index: _WholeModule(written) for context in scope.contexts}


class _WholeModule(Buffers):
    """All buffers, for the one optimizer of automatic optimization.

    Args:
        written: Record of the buffers that forward passes change.
    """

    def __init__(self, written: BufferTracker) -> None:
        # Without accumulation a batch is a window, and one copy serves both; the second one is made when it is first needed.
        first = BufferCopies(written)
        super().__init__(written, window=first, batch=first)
        self._at_later_batch: BufferCopies | None = None

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        self._written.begin_window()
        if in_window:
            if self._at_later_batch is None:
                self._at_later_batch = BufferCopies(self._written)
            self._batch = self._at_later_batch
        else:
            self._batch = self._window
        self._batch.keep()

    @override
    def abort(self, step: StepContext, *, is_called: bool) -> None:
        self.restore(self._window)

    @override
    def abort_on_device(self, skipped: Tensor) -> None:
        # Found before the selection, so that the very first change can be undone too.
        self.find_changes()
        self._window.restore_where(skipped)

    @override
    def reset(self) -> None:
        self._window.keep()
