"""Running statistics of batch normalization, put back for a skipped step.

In automatic optimization there is one optimizer, and all layers go back to where its window began. In manual optimization several
optimizers may have windows of their own. The layers that an optimizer holds parameters of, and those that nobody holds, go back to
where its window began, however often others have stepped since. A layer that only others hold may have been part of a bad forward
pass too, as a discriminator is of the generator's: it goes back to the last moment at which nothing was pending, which is a step or
the batch's beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS
from torch.utils.hooks import RemovableHandle

from clip_callbacks.guard.resource import Resource, ResourceScope
from clip_callbacks.trainer.batch_norm import BatchStatistics, layers_with_statistics
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
    settled = _Settled(layers)
    return {
        context.index: _OneOfSeveral(context, layers, settled, scope.contexts, is_first=context is first)
        for context in scope.contexts
    }


class _WholeModule(Resource):
    """All layers, for the one optimizer of automatic optimization.

    Args:
        layers: All layers with statistics.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._statistics = BatchStatistics(layers)

    def begin_batch(self, *, in_window: bool) -> None:
        if not in_window:
            self._statistics.keep()

    def abort(self, step: StepContext, *, is_called: bool) -> None:
        self._statistics.restore()

    def abort_on_device(self, skipped: Tensor) -> None:
        self._statistics.restore_where(skipped)

    def reset(self) -> None:
        self._statistics.keep()

    def before(self) -> dict[int, Tensor]:
        return self._statistics.copies()


class _InManual(Resource):
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

    def commit(self, step: StepContext) -> None:
        self._is_bad = False
        if not self._searches:
            self._settle()

    def abort(self, step: StepContext, *, is_called: bool) -> None:
        self._is_bad = True
        self._restore()

    def _after_search(self, *_: Any) -> None:
        if not self._is_bad:
            self._settle()

    def _settle(self) -> None:
        """Take the statistics as they are now: a step is taken."""
        raise NotImplementedError

    def _restore(self) -> None:
        """Put the statistics back."""
        raise NotImplementedError

    def detach(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

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

    def begin_batch(self, *, in_window: bool) -> None:
        if not in_window:
            self._statistics.keep()

    def _settle(self) -> None:
        self._statistics.keep()

    def _restore(self) -> None:
        self._statistics.restore()

    def reset(self) -> None:
        self._statistics.keep()

    def before(self) -> dict[int, Tensor]:
        return self._statistics.copies()


class _Settled:
    """All layers as they were when nothing was pending: at the last step of any optimizer, or at the batch's beginning.

    Args:
        layers: All layers with statistics.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._at_batch = BatchStatistics(layers)
        self.at_step = BatchStatistics(layers)

    def begin_batch(self) -> None:
        """A batch begins."""
        self._at_batch.keep()
        self.at_step.keep()

    def last_good(self) -> BatchStatistics:
        """The last copy; that of the batch's beginning if another optimizer's bad pass was part of the last one already."""
        return self.at_step if self.at_step.is_finite else self._at_batch


class _OneOfSeveral(_InManual):
    """The layers, from the point of view of one of several optimizers.

    Args:
        context: The optimizer.
        layers: All layers with statistics.
        settled: What is common to all optimizers.
        contexts: All optimizers.
        is_first: Whether it is the one that takes care of what is common when a batch begins.
    """

    def __init__(
        self,
        context: OptimizerContext,
        layers: Sequence[nn.Module],
        settled: _Settled,
        contexts: Sequence[OptimizerContext],
        *,
        is_first: bool,
    ) -> None:
        super().__init__(context)
        held, held_by_others = _parameters([context]), _parameters([other for other in contexts if other is not context])
        foreign = [layer for layer in layers if not _has_any(layer, held) and _has_any(layer, held_by_others)]
        self._own = BatchStatistics([layer for layer in layers if layer not in foreign])
        self._foreign = BatchStatistics(foreign)
        self._settled = settled
        self._is_first = is_first
        self._has_begun = False

    def begin_batch(self, *, in_window: bool) -> None:
        if self._is_first:
            self._settled.begin_batch()

    def begin_window(self) -> None:
        self._own.keep_from(self._settled.at_step)
        self._has_begun = True

    def _settle(self) -> None:
        self._settled.at_step.keep()
        self._has_begun = False

    def _restore(self) -> None:
        self._fetch()
        self._foreign.restore()
        self._own.restore()
        self._settle()

    def _fetch(self) -> None:
        """Take from what is common whatever this window has no copy of."""
        settled = self._settled.last_good()
        self._foreign.keep_from(settled)
        if not self._has_begun:  # its backward passes were not seen: loss.backward() instead of manual_backward
            self._own.keep_from(settled)

    def reset(self) -> None:
        self._settled.begin_batch()
        self._own.keep()

    def before(self) -> dict[int, Tensor]:
        self._fetch()
        return self._foreign.copies() | self._own.copies()


def _parameters(contexts: Sequence[OptimizerContext]) -> set[Tensor]:
    return {tensor for context in contexts for tensor in context.table.tensors}


def _has_any(layer: nn.Module, parameters: set[Tensor]) -> bool:
    return any(parameter in parameters for parameter in layer.parameters(recurse=False))
