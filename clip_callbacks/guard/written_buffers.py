"""Buffers that forward passes write to, put back for a skipped step, and for a bad forward pass without a step.

In automatic optimization there is one optimizer, and all buffers go back to where its window began. In manual optimization several
optimizers may have windows of their own. The buffers of modules that an optimizer holds parameters of, and of those that nobody
holds, go back to where its window began, however often others have stepped since. A module that only others hold may have been part
of a bad forward pass too, as a discriminator is of the generator's: it goes back to where it was after the last backward pass of
the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from clip_callbacks.guard.resource import Resource, ResourceScope
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext
from clip_callbacks.trainer.written_buffers import BufferCopies, Slot, WrittenBuffers


def written_buffers(scope: ResourceScope) -> dict[int, Resource]:
    """Make the resource of each optimizer."""
    if not scope.restore_buffers or not scope.contexts:
        return {}
    first, *others = scope.contexts
    written = WrittenBuffers(scope.module)
    if scope.module.automatic_optimization:
        return {first.index: _WholeModule(written)}
    if not others:
        return {first.index: _WholeModuleInManual(first, written)}
    common, holders = _Common(written), _holders(scope.module, scope.contexts)
    return {context.index: _OneOfSeveral(context, holders, common) for context in scope.contexts}


class _Buffers(Resource, ABC):
    """Common to all of them.

    Args:
        written: Which buffers change.
    """

    def __init__(self, written: WrittenBuffers) -> None:
        self._written = written

    @property
    @abstractmethod
    def _window(self) -> BufferCopies:
        """The buffers as they were when the window began."""

    @property
    @abstractmethod
    def _batch(self) -> BufferCopies:
        """The buffers as they were when the batch began."""

    def _look_unless_old(self) -> None:
        """Find what has changed in a window that may be skipped: contents are read in the first windows only."""
        if self._written.is_young:
            self._written.look_closely()
        else:
            self._written.look()

    def _put_back(self, *copies: BufferCopies) -> None:
        """Put buffers back, and say of which that cannot be done right."""
        at_first = self._written.look_closely()
        lost = [name for each in copies for name in each.restore()]
        if at_first:
            rank_zero_warn(
                f"The buffers {', '.join(at_first)} are not finite and were written through `.data`, which no version counter "
                "shows: they are put back to what they were when the fit began. From now on they are put back as all others.",
                category=RuntimeWarning,
            )
        if lost:
            rank_zero_warn(
                f"The buffers {', '.join(lost)} have changed for the first time, in a step that is skipped, and cannot be put "
                "back: no copy was kept of what they were. From now on they are put back as all others.",
                category=RuntimeWarning,
            )

    @override
    def undo_pass(self, *, is_bad: bool) -> list[str]:
        self._written.look()
        bad = self._batch.gone_bad()
        if bad or is_bad:
            self._put_back(self._batch)
        return bad

    @override
    def undo_window(self, *, is_bad: bool) -> list[str]:
        self._written.look()
        bad = self._window.gone_bad()
        if bad or is_bad:
            self._put_back(self._window)
        return bad

    @override
    def before(self) -> dict[int, Tensor]:
        return self._window.copies()

    @override
    def named_before(self) -> list[tuple[str, Tensor]]:
        return self._window.named_that_changed()


class _WholeModule(_Buffers):
    """All buffers, for the one optimizer of automatic optimization.

    Args:
        written: Which ones change.
    """

    def __init__(self, written: WrittenBuffers) -> None:
        super().__init__(written)
        self._at_window = self._at_batch = BufferCopies(written)
        self._at_later_batch: BufferCopies | None = None

    @property
    @override
    def _window(self) -> BufferCopies:
        return self._at_window

    @property
    @override
    def _batch(self) -> BufferCopies:
        return self._at_batch

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        self._written.begin_window()
        if in_window:
            if self._at_later_batch is None:
                self._at_later_batch = BufferCopies(self._written)
            self._at_batch = self._at_later_batch
        else:
            self._at_batch = self._at_window
        self._at_batch.keep()

    @override
    def abort(self, step: StepContext, *, is_called: bool) -> None:
        self._put_back(self._at_window)

    @override
    def abort_on_device(self, skipped: Tensor) -> None:
        self._look_unless_old()
        self._at_window.restore_where(skipped)

    @override
    def reset(self) -> None:
        self._at_window.keep()


class _InManual(_Buffers):
    """Common to the resources of manual optimization, where forward passes may follow a step within one batch.

    Args:
        context: The optimizer.
        written: Which buffers change.
    """

    def __init__(self, context: OptimizerContext, written: WrittenBuffers) -> None:
        super().__init__(written)
        self._hooks: list[RemovableHandle] = []
        self._is_bad = False
        self._searches = isinstance(context.optimizer, LBFGS)
        if self._searches:  # its closures go on after the point at which its step is judged
            self._hooks.append(context.optimizer.register_step_post_hook(self._after_search))

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
        self._look_unless_old()
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
        while self._hooks:
            self._hooks.pop().remove()


class _WholeModuleInManual(_InManual):
    """All buffers, for an optimizer that is alone in manual optimization.

    Args:
        context: The optimizer.
        written: Which ones change.
    """

    def __init__(self, context: OptimizerContext, written: WrittenBuffers) -> None:
        super().__init__(context, written)
        self._at_window, self._at_batch = BufferCopies(written), BufferCopies(written)

    @property
    @override
    def _window(self) -> BufferCopies:
        return self._at_window

    @property
    @override
    def _batch(self) -> BufferCopies:
        return self._at_batch

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        self._written.begin_window()
        self._at_batch.keep()
        if not in_window:
            self._at_window.keep()

    def _settle(self) -> None:
        self._written.look()
        self._at_window.keep()

    def _restore(self) -> None:
        self._fetch()
        self._put_back(self._at_window)

    def _fetch(self) -> None:
        if not self._at_window.is_finite:  # the forward pass of a second step came before the first step
            self._at_window.keep_from(self._at_batch)

    @override
    def reset(self) -> None:
        self._at_window.keep()
        self._at_batch.keep()

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

    def __init__(self, written: WrittenBuffers) -> None:
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
        self.written.look()
        self.at_step.keep()
        self.last.keep()

    def end_pass(self, reached: Collection[int]) -> None:
        """A backward pass is over."""
        self.written.look()
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
        super().__init__(context, common.written)
        index = context.index

        def is_own(slot: Slot) -> bool:
            around = holders.get(slot.owner)
            return not around or index in around

        self._index = index
        self._own = BufferCopies(common.written, is_own)
        self._foreign = BufferCopies(common.written, lambda slot: not is_own(slot))
        self._common = common
        self._has_begun = False
        self._foreign_is_last = True
        common.members.append(self)

    @property
    @override
    def _window(self) -> BufferCopies:
        return self._own

    @property
    @override
    def _batch(self) -> BufferCopies:
        return self._common.at_batch

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
        self._own.keep_from(self._common.at_step)
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
        self._put_back(self._foreign, self._own)
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
            self._own.keep_from(common.at_step)
        if self._foreign_is_last:
            self._foreign.keep_from(common.last)
        for copies in (self._own, self._foreign):
            if not copies.is_finite:  # bad forward passes came before other optimizers' steps
                copies.keep_from(common.at_batch)

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
        self._own.keep()
        self._foreign_is_last = True

    @override
    def before(self) -> dict[int, Tensor]:
        self._fetch()
        return self._foreign.copies() | super().before()

    @override
    def named_before(self) -> list[tuple[str, Tensor]]:
        return self._foreign.named_that_changed() + super().named_before()

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
