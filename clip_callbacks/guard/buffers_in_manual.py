"""Buffers in manual optimization, where several optimizers may have windows of their own.

The buffers of modules that an optimizer holds parameters of, and of those that nobody holds, go back to where its window began,
however often others have stepped since. A module that only others hold may have been part of a bad forward pass too, as a
discriminator is of the generator's: it goes back to where it was after the last backward pass of the others.
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
        written: Which buffers change.
    """
    first, *others = scope.contexts
    if not others:
        return {first.index: _WholeModuleInManual(first, written)}
    common, holders = _Common(written), _holders(scope.module, scope.contexts)
    return {context.index: _OneOfSeveral(context, holders, common) for context in scope.contexts}


class _InManual(Buffers, ABC):
    """Common to the resources of manual optimization, where forward passes may follow a step within one batch.

    Args:
        context: The optimizer.
        written: Which buffers change.
        window: The buffers as they were when the window began.
        batch: The buffers as they were when the batch began.
    """

    def __init__(self, context: OptimizerContext, written: BufferTracker, window: BufferCopies, batch: BufferCopies) -> None:
        super().__init__(written, window, batch)
        self._context = context
        self._hooks: list[RemovableHandle] = []
        self._is_bad = False
        self._searches = isinstance(context.optimizer, LBFGS)
        if self._searches:  # its closures go on after the point at which its step is judged
            self._hooks.append(context.optimizer.register_step_post_hook(self._after_search))

    @override
    def goes_on(self, contexts: Sequence[OptimizerContext]) -> bool:
        return any(context is self._context for context in contexts)

    @override
    def commit(self, step: StepContext) -> None:
        self._is_bad = False
        if not self._searches:
            self._settle()

    @override
    def abort(self, step: StepContext, *, is_called: bool) -> None:
        self._is_bad = True
        self._restore()

    @override
    def abort_on_device(self, skipped: Tensor) -> None:
        self.look_unless_old()
        self._window.restore_where(skipped)
        self._settle()

    @property
    @override
    def needs_host(self) -> bool:
        return self._written.has_changing

    @override
    def reason_against_deferral(self) -> str | None:
        if self._written.keeps_statistics:
            return "batch statistics are to be put back in manual optimization (restore_buffers)"
        return None

    def _after_search(self, *_: Any) -> None:
        if not self._is_bad:
            self._settle()

    @abstractmethod
    def _settle(self) -> None:
        """Take the buffers as they are now: a step is taken."""

    @abstractmethod
    def _restore(self) -> None:
        """Put the buffers back."""

    @override
    def detach(self) -> None:
        super().detach()
        while self._hooks:
            self._hooks.pop().remove()


class _WholeModuleInManual(_InManual):
    """All buffers, for an optimizer that is alone in manual optimization.

    Args:
        context: The optimizer.
        written: Which ones change.
    """

    def __init__(self, context: OptimizerContext, written: BufferTracker) -> None:
        super().__init__(context, written, BufferCopies(written), BufferCopies(written))

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        self._written.begin_window()
        self._batch.keep()
        if not in_window:
            self._window.keep()

    def _settle(self) -> None:
        self._written.find_changed()
        self._window.keep()

    def _restore(self) -> None:
        self._fetch()
        self.put_back(self._window)

    def _fetch(self) -> None:
        self._window.keep_bad_from(self._batch)  # the forward pass of a second step may have come before the first step

    @override
    def reset(self) -> None:
        self._window.keep()
        self._batch.keep()

    @override
    def before(self) -> dict[int, Tensor]:
        self._fetch()
        return super().before()


class _Common:
    """All buffers, as they were for all of several optimizers.

    Args:
        written: Which ones change.

    Attributes:
        at_batch: The buffers when the batch began.
        at_step: The buffers at the last step of any optimizer, or when the batch began.
        last: The buffers at the end of the last backward pass, at the last step, or when the batch began.
        members: What each optimizer makes of it.
    """

    def __init__(self, written: BufferTracker) -> None:
        self.written = written
        self.at_batch, self.at_step, self.last = BufferCopies(written), BufferCopies(written), BufferCopies(written)
        self.members: list[_OneOfSeveral] = []

    def begin_batch(self) -> None:
        """A batch begins."""
        self.written.begin_window()
        self.at_batch.keep()
        self.settle()

    def settle(self) -> None:
        """Nothing is pending now that is not pending for good: a step was decided, or a batch begins."""
        self.written.find_changed()
        self.at_step.keep()
        self.last.keep()

    def end_pass(self, reached: Collection[int]) -> None:
        """A backward pass is over."""
        self.written.find_changed()
        for member in self.members:
            member.note_whose_pass(reached)
        self.last.keep()


class _OneOfSeveral(_InManual):
    """The buffers, from the point of view of one of several optimizers.

    Args:
        context: The optimizer.
        holders: Which optimizers hold parameters of each module.
        common: What all optimizers share.
    """

    def __init__(self, context: OptimizerContext, holders: dict[nn.Module, set[int]], common: _Common) -> None:
        index = context.index

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
        """Where no layer has gone from one optimizer to another; those that are new are met."""
        now = _holders(self._common.written.module, contexts)
        if not super().goes_on(contexts) or any(now.get(layer, held) != held for layer, held in self._holders.items()):
            return False
        self._holders.update(now)
        return True

    @property
    def _is_first(self) -> bool:
        """Whether it is the one that tells what is common of batches and passes."""
        return self._common.members[0] is self

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        if self._is_first:
            self._common.begin_batch()

    @override
    def begin_window(self) -> None:
        self._window.keep_from(self._common.at_step)
        self._has_begun = self._foreign_is_last = True

    @override
    def end_pass(self, reached: Collection[int]) -> None:
        if self._is_first:
            self._common.end_pass(reached)

    def note_whose_pass(self, reached: Collection[int]) -> None:
        """Remember the modules of others as they were before this optimizer's pass, or as they are after another one's."""
        is_ours = self._index in reached
        if is_ours and self._foreign_is_last:
            self._foreign.keep_from(self._common.last)
        self._foreign_is_last = not is_ours

    def _settle(self) -> None:
        self._common.settle()
        self._has_begun, self._foreign_is_last = False, True

    def _restore(self) -> None:
        self._fetch()
        self.put_back(self._foreign, self._window)
        for member in self._common.members:
            member.forget_others()
        self._settle()

    def forget_others(self) -> None:
        """Take the modules that others hold as they are now: what was seen of them may have been bad."""
        self._foreign_is_last = True

    def _fetch(self) -> None:
        """Take from what is common whatever this window has no good copy of."""
        common = self._common
        if not self._has_begun:  # its backward passes were not seen: loss.backward() instead of manual_backward
            self._window.keep_from(common.at_step)
        if self._foreign_is_last:
            self._foreign.keep_from(common.last)
        for copies in (self._window, self._foreign):  # bad forward passes came before other optimizers' steps
            copies.keep_bad_from(common.at_batch)

    @override
    def undo_pass(self, *, is_bad: bool) -> list[str]:
        if not self._is_first:
            return []
        bad = super().undo_pass(is_bad=is_bad)
        self._common.settle()
        return bad

    @override
    def reset(self) -> None:
        self._common.begin_batch()
        self._window.keep()
        self._foreign_is_last = True

    @override
    def before(self) -> dict[int, Tensor]:
        self._fetch()
        return self._foreign.copies() | super().before()

    @override
    def suspects(self, *, none_was_good: bool) -> list[tuple[str, Tensor]]:
        return self._foreign.suspects(include_initially_nonfinite=False) + super().suspects(none_was_good=none_was_good)

    @override
    def detach(self) -> None:
        super().detach()
        self._common.members.clear()


def _holders(module: nn.Module, contexts: Sequence[OptimizerContext]) -> dict[nn.Module, set[int]]:
    """Which optimizers hold parameters of each layer; of a layer without any, of the smallest module around it that has some."""
    shared: dict[Tensor, set[int]] = {}
    for context in contexts:
        for tensor in context.table.tensors:
            shared.setdefault(tensor, set()).add(context.index)
    modules = dict(module.named_modules())
    holders: dict[nn.Module, set[int]] = {}
    for name, layer in modules.items():
        if not list(layer.buffers(recurse=False)):
            continue
        around = [name, *(name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)), ""]
        each = (set().union(*(shared.get(tensor, set()) for tensor in modules[place].parameters())) for place in around)
        holders[layer] = next((found for found in each if found), set())
    return holders
