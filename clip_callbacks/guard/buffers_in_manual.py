"""Buffers in manual optimization, where several optimizers may have windows of their own.

A skipped step of an optimizer restores two groups of buffers. Buffers of modules of which it holds parameters, and of modules
without any optimizer, get their values from the beginning of its window, however often other optimizers have stepped since. A
module that only other optimizers hold may have been part of the bad forward pass too, as a discriminator is of the generator's: its
buffers get their values from after the last backward pass of the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from clip_callbacks.guard.buffers import Buffers
from clip_callbacks.guard.resource import Resource, ResourceScope
from clip_callbacks.trainer.buffer_copies import BufferCopies
from clip_callbacks.trainer.buffer_tracker import BufferSlot, BufferTracker
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext


def buffers_in_manual_optimization(scope: ResourceScope, written: BufferTracker) -> dict[int, Resource]:
    """Make the resource of each optimizer.

    Args:
        scope: The Trainer, the module and its optimizers.
        written: Record of the buffers that forward passes change.
    """
    first, *others = scope.contexts
    if not others:
        return {first.index: _WholeModuleInManual(first, written)}
    common, holders = _SharedCopies(written), _holders(scope.module, scope.contexts)
    return {context.index: _OneOfSeveral(context, holders, common) for context in scope.contexts}


class _BuffersInManual(Buffers, ABC):
    """Common base in manual optimization, where forward passes may follow a step within one batch.

    Args:
        context: The optimizer.
        written: Record of the buffers that forward passes change.
        window: Copies of the buffers from the beginning of the window.
        batch: Copies of the buffers from the beginning of the batch.
    """

    def __init__(self, context: OptimizerContext, written: BufferTracker, window: BufferCopies, batch: BufferCopies) -> None:
        super().__init__(written, window, batch)
        self._context = context
        self._hooks: list[RemovableHandle] = []
        self._is_bad = False
        self._has_line_search = isinstance(context.optimizer, LBFGS)
        if self._has_line_search:  # it calls its closure again after the guard has decided on its step
            self._hooks.append(context.optimizer.register_step_post_hook(self._after_search))

    @override
    def goes_on(self, contexts: Sequence[OptimizerContext]) -> bool:
        return any(context is self._context for context in contexts)

    @override
    def commit(self, step: StepContext) -> None:
        self._is_bad = False
        # LBFGS commits each good point of its line search, and may still meet a bad one.
        if not self._has_line_search:
            self._accept()

    @override
    def abort(self, step: StepContext, *, is_called: bool) -> None:
        self._is_bad = True
        self._restore()

    @override
    def abort_on_device(self, skipped: Tensor) -> None:
        self.find_changes()
        self._window.restore_where(skipped)
        self._accept()

    @property
    @override
    def needs_host(self) -> bool:
        # Which of several copies a skip restores depends on whether they are finite (`_complete_copies`): only the host can ask.
        return self._written.has_changing

    @override
    def reason_against_deferral(self) -> str | None:
        # asked at fit start, before `needs_host` can know of any buffer that changes
        if self._written.keeps_statistics:
            return "batch statistics, which a skipped step restores in manual optimization"
        return None

    def _after_search(self, *_: Any) -> None:
        if not self._is_bad:
            self._accept()

    @abstractmethod
    def _accept(self) -> None:
        """Take the present buffers for those of the next window's beginning, because a step is taken."""

    @abstractmethod
    def _restore(self) -> None:
        """Restore the buffers, because a step is skipped."""

    @override
    def detach(self) -> None:
        super().detach()
        while self._hooks:
            self._hooks.pop().remove()


class _WholeModuleInManual(_BuffersInManual):
    """All buffers, for the only optimizer in manual optimization.

    Args:
        context: The optimizer.
        written: Record of the buffers that forward passes change.
    """

    def __init__(self, context: OptimizerContext, written: BufferTracker) -> None:
        super().__init__(context, written, BufferCopies(written), BufferCopies(written))

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        self._written.begin_window()
        self._batch.keep()
        if not in_window:
            self._window.keep()

    def _accept(self) -> None:
        self._written.find_changed()
        self._window.keep()

    def _restore(self) -> None:
        self._complete_copies()
        self.restore(self._window)

    def _complete_copies(self) -> None:
        self._window.keep_bad_from(self._batch)  # the forward passes of two steps may both come before the first step

    @override
    def reset(self) -> None:
        self._window.keep()
        self._batch.keep()

    @override
    def before(self) -> dict[int, Tensor]:
        self._complete_copies()
        return super().before()


class _SharedCopies:
    """Copies of all buffers that several optimizers share.

    Args:
        written: Record of the buffers that forward passes change.

    Attributes:
        at_batch: Copies from the beginning of the batch.
        at_step: Copies from the last step of any optimizer, or from the beginning of the batch if that is later.
        last: Copies from the end of the last backward pass, the last step, or the beginning of the batch, whichever is latest.
        members: Resource of each optimizer.
    """

    def __init__(self, written: BufferTracker) -> None:
        self.written = written
        self.at_batch, self.at_step, self.last = BufferCopies(written), BufferCopies(written), BufferCopies(written)
        self.members: list[_OneOfSeveral] = []

    def begin_batch(self) -> None:
        """Take the copies of a batch's beginning."""
        self.written.begin_window()
        self.at_batch.keep()
        self.accept()

    def accept(self) -> None:
        """Take the present buffers for accepted ones, because a step was decided or a batch begins."""
        # A buffer that has just changed for the first time joins the copies before they are taken.
        self.written.find_changed()
        self.at_step.keep()
        self.last.keep()

    def end_pass(self, reached: Collection[int]) -> None:
        """Note the end of a backward pass, and tell each optimizer whose pass it was."""
        self.written.find_changed()
        for member in self.members:
            member.note_whose_pass(reached)
        self.last.keep()


class _OneOfSeveral(_BuffersInManual):
    """Buffers that a skipped step of one of several optimizers restores: those of its own modules and those of others.

    Args:
        context: The optimizer.
        holders: Indices of the optimizers that hold parameters of each module.
        common: Copies that all optimizers share.
    """

    def __init__(self, context: OptimizerContext, holders: dict[nn.Module, set[int]], common: _SharedCopies) -> None:
        index = context.index

        # `holders` is read at each call, because `goes_on` adds layers to it
        def is_own(slot: BufferSlot) -> bool:
            around = holders.get(slot.owner)
            return not around or index in around

        super().__init__(context, common.written, window=BufferCopies(common.written, is_own), batch=common.at_batch)
        self._index = index
        self._holders = holders
        self._foreign = BufferCopies(common.written, lambda slot: not is_own(slot))
        self._common = common
        self._has_begun = False
        self._foreign_is_last = True
        common.members.append(self)

    @override
    def goes_on(self, contexts: Sequence[OptimizerContext]) -> bool:
        """Return True unless a layer has gone from one optimizer to another; new layers are taken up."""
        now = _holders(self._common.written.module, contexts)
        # The copies of a layer that has changed hands are divided between the wrong windows.
        if not super().goes_on(contexts) or any(now.get(layer, held) != held for layer, held in self._holders.items()):
            return False
        self._holders.update(now)
        return True

    @property
    def _is_first(self) -> bool:
        """Whether this is the one resource that updates the shared copies."""
        return self._common.members[0] is self

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        if self._is_first:
            self._common.begin_batch()

    @override
    def begin_window(self) -> None:
        # This is called after the window's first backward pass, when its forward pass has already written to the buffers.
        self._window.keep_from(self._common.at_step)
        self._has_begun = self._foreign_is_last = True

    @override
    def end_pass(self, reached: Collection[int]) -> None:
        if self._is_first:
            self._common.end_pass(reached)

    def note_whose_pass(self, reached: Collection[int]) -> None:
        """Copy the buffers of others' modules from before this optimizer's pass, or note that another one's pass came last."""
        is_ours = self._index in reached
        if is_ours and self._foreign_is_last:
            # Only after a pass of others: at the second of several own passes, `last` holds what the first one wrote.
            self._foreign.keep_from(self._common.last)
        self._foreign_is_last = not is_ours

    def _accept(self) -> None:
        self._common.accept()
        self._has_begun, self._foreign_is_last = False, True

    def _restore(self) -> None:
        self._complete_copies()
        self.restore(self._foreign, self._window)
        for member in self._common.members:
            member.accept_foreign()
        self._accept()

    def accept_foreign(self) -> None:
        """Take the present buffers of others' modules, because the copies may come from the bad pass that was just restored."""
        self._foreign_is_last = True

    def _complete_copies(self) -> None:
        """Take from the shared copies those buffers of which this window has no good copy."""
        common = self._common
        if not self._has_begun:  # hooks see no pass of loss.backward(), only of manual_backward
            self._window.keep_from(common.at_step)
        if self._foreign_is_last:
            self._foreign.keep_from(common.last)
        for copies in (self._window, self._foreign):  # a bad forward pass may have come before the steps of others
            copies.keep_bad_from(common.at_batch)

    @override
    def restore_pass(self, *, is_bad: bool) -> list[str]:
        # The copies of the batch are shared, so that one resource restores them for all.
        if not self._is_first:
            return []
        bad = super().restore_pass(is_bad=is_bad)
        self._common.accept()
        return bad

    @override
    def reset(self) -> None:
        self._common.begin_batch()
        self._window.keep()
        self._foreign_is_last = True

    @override
    def before(self) -> dict[int, Tensor]:
        self._complete_copies()
        return self._foreign.copies() | super().before()

    @override
    def suspects(self, *, no_good_step: bool) -> list[tuple[str, Tensor]]:
        # `no_good_step` is about this optimizer's own steps: others may have had good ones with their buffers as they were.
        return self._foreign.suspects(include_initially_nonfinite=False) + super().suspects(no_good_step=no_good_step)

    @override
    def detach(self) -> None:
        super().detach()
        # breaks a cycle of references that would hold the module and the copies until the garbage collector runs
        self._common.members.clear()


def _holders(module: nn.Module, contexts: Sequence[OptimizerContext]) -> dict[nn.Module, set[int]]:
    """Return the indices of the optimizers that hold parameters of each layer with buffers.

    A layer without parameters counts as a part of the smallest module around it that has some.
    """
    shared: dict[Tensor, set[int]] = {}
    for context in contexts:
        for tensor in context.table.tensors:
            shared.setdefault(tensor, set()).add(context.index)
    modules = dict(module.named_modules())
    holders: dict[nn.Module, set[int]] = {}
    for name, layer in modules.items():
        if not list(layer.buffers(recurse=False)):
            continue
        # From the layer outwards, because BatchNorm(affine=False) and quantizers with EMA codebooks have buffers and no parameters.
        around = [name, *(name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)), ""]
        each = (set().union(*(shared.get(tensor, set()) for tensor in modules[place].parameters())) for place in around)
        holders[layer] = next((found for found in each if found), set())
    return holders
