"""Running statistics of batch normalization, put back for a skipped step.

In automatic optimization there is one optimizer, and all layers go back to where its window began. In manual optimization several
optimizers may have windows of their own. The layers that an optimizer holds parameters of, and those that nobody holds, go back to
where its window began, however often others have stepped since. A layer that only others hold may have been part of a bad forward
pass too, as a discriminator is of the generator's: it goes back to where it was after the last backward pass of the others. Whose a
backward pass is tell the gradients that it has changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from clip_callbacks.guard.resource import Resource, ResourceScope
from clip_callbacks.trainer.batch_norm import BatchStatistics, layers_with_statistics
from clip_callbacks.trainer.gradient_fingerprints import Fingerprints, fingerprints
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext


def batch_statistics(scope: ResourceScope) -> dict[int, Resource]:
    """Make the resource of each optimizer; none without layers that keep statistics."""
    layers = layers_with_statistics(scope.module) if scope.restore_buffers else []
    if not layers or not scope.contexts:
        return {}
    first, *others = scope.contexts
    if scope.module.automatic_optimization:
        return {first.index: _WholeModule(layers)}
    if not others:
        return {first.index: _WholeModuleInManual(first, layers)}
    common, holders = _Common(layers), _holders(scope.module, scope.contexts)
    return {
        context.index: _OneOfSeveral(
            context,
            [layer for layer in layers if not holders[layer] or context.index in holders[layer]],
            [layer for layer in layers if holders[layer] and context.index not in holders[layer]],
            common,
        )
        for context in scope.contexts
    }


class _WholeModule(Resource):
    """All layers, for the one optimizer of automatic optimization.

    Args:
        layers: All layers with statistics.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._statistics = BatchStatistics(layers)

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        if not in_window:
            self._statistics.keep()

    @override
    def abort(self, step: StepContext, *, is_called: bool) -> None:
        self._statistics.restore()

    @override
    def abort_on_device(self, skipped: Tensor) -> None:
        self._statistics.restore_where(skipped)

    @override
    def reset(self) -> None:
        self._statistics.keep()

    @override
    def before(self) -> dict[int, Tensor]:
        return self._statistics.copies()


class _InManual(Resource, ABC):
    """Common to the resources of manual optimization, where forward passes may follow a step within one batch.

    Args:
        context: The optimizer.
    """

    def __init__(self, context: OptimizerContext) -> None:
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

    def _after_search(self, *_: Any) -> None:
        if not self._is_bad:
            self._settle()

    @abstractmethod
    def _settle(self) -> None:
        """Take the statistics as they are now: a step is taken."""

    @abstractmethod
    def _restore(self) -> None:
        """Put the statistics back."""

    @override
    def detach(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @override
    def reason_against_deferral(self) -> str | None:
        return "batch statistics are to be put back in manual optimization (restore_buffers)"


class _WholeModuleInManual(_InManual):
    """All layers, for an optimizer that is alone in manual optimization.

    Args:
        context: The optimizer.
        layers: All layers with statistics.
    """

    def __init__(self, context: OptimizerContext, layers: Sequence[nn.Module]) -> None:
        super().__init__(context)
        self._statistics = BatchStatistics(layers)
        self._at_batch = BatchStatistics(layers)

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        self._at_batch.keep()
        if not in_window:
            self._statistics.keep()

    def _settle(self) -> None:
        self._statistics.keep()

    def _restore(self) -> None:
        self._fetch()
        self._statistics.restore()

    def _fetch(self) -> None:
        if not self._statistics.is_finite:  # the forward pass of a second step came before the first step
            self._statistics.keep_from(self._at_batch)

    @override
    def reset(self) -> None:
        self._statistics.keep()
        self._at_batch.keep()

    @override
    def before(self) -> dict[int, Tensor]:
        self._fetch()
        return self._statistics.copies()


class _Common:
    """All layers, as they were for all of several optimizers.

    Args:
        layers: All layers with statistics.

    Attributes:
        at_batch: The statistics when the batch began.
        at_step: The statistics at the last step of any optimizer, or when the batch began.
        last: The statistics at the end of the last backward pass, at the last step, or when the batch began.
        members: What each optimizer makes of it.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.at_batch = BatchStatistics(layers)
        self.at_step = BatchStatistics(layers)
        self.last = BatchStatistics(layers)
        self.members: list[_OneOfSeveral] = []

    def begin_batch(self) -> None:
        """A batch begins."""
        self.at_batch.keep()
        self.settle()

    def settle(self) -> None:
        """Nothing is pending now that is not pending for good: a step was decided, or a batch begins."""
        self.at_step.keep()
        self.last.keep()

    def end_pass(self) -> None:
        """A backward pass is over."""
        for member in self.members:
            member.note_whose_pass()
        self.last.keep()


class _OneOfSeveral(_InManual):
    """The layers, from the point of view of one of several optimizers.

    Args:
        context: The optimizer.
        own: The layers that it holds, and those that nobody holds.
        foreign: The layers that only others hold.
        common: What all optimizers share.
    """

    def __init__(self, context: OptimizerContext, own: Sequence[nn.Module], foreign: Sequence[nn.Module], common: _Common) -> None:
        super().__init__(context)
        self._context = context
        self._own = BatchStatistics(own)
        self._foreign = BatchStatistics(foreign)
        self._common = common
        self._has_begun = False
        self._foreign_is_last = True
        self._gradients_before: Fingerprints = {}
        common.members.append(self)

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
    def begin_pass(self) -> None:
        self._gradients_before = fingerprints(self._context.table)

    @override
    def end_pass(self) -> None:
        if self._is_first:
            self._common.end_pass()

    def note_whose_pass(self) -> None:
        """Remember the layers of others as they were before this optimizer's pass, or as they are after another one's."""
        is_ours = fingerprints(self._context.table) != self._gradients_before
        if is_ours and self._foreign_is_last:
            self._foreign.keep_from(self._common.last)
        self._foreign_is_last = not is_ours

    def _settle(self) -> None:
        self._common.settle()
        self._has_begun, self._foreign_is_last = False, True

    def _restore(self) -> None:
        self._fetch()
        self._foreign.restore()
        self._own.restore()
        for member in self._common.members:
            member.forget_others()
        self._settle()

    def forget_others(self) -> None:
        """Take the layers that others hold as they are now: what was seen of them may have been bad."""
        self._foreign_is_last = True

    def _fetch(self) -> None:
        """Take from what is common whatever this window has no good copy of."""
        common = self._common
        if not self._has_begun:  # its backward passes were not seen: loss.backward() instead of manual_backward
            self._own.keep_from(common.at_step)
        if self._foreign_is_last:
            self._foreign.keep_from(common.last)
        for statistics in (self._own, self._foreign):
            if not statistics.is_finite:  # bad forward passes came before other optimizers' steps
                statistics.keep_from(common.at_batch)

    @override
    def reset(self) -> None:
        self._common.begin_batch()
        self._own.keep()
        self._foreign_is_last = True

    @override
    def before(self) -> dict[int, Tensor]:
        self._fetch()
        return self._foreign.copies() | self._own.copies()

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
