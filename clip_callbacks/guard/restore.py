"""A skipped step never happened: what it has changed beside the gradients is put back."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from clip_callbacks.guard.averages import averages
from clip_callbacks.guard.line_search import line_searches
from clip_callbacks.guard.optimizer_bookkeeping import optimizer_bookkeeping
from clip_callbacks.guard.resource import MakeResources, Resource, ResourceScope
from clip_callbacks.guard.rewritten_parameters import rewritten_parameters
from clip_callbacks.guard.schedules import held_schedules
from clip_callbacks.guard.written_buffers import written_buffers
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext

RESOURCES: tuple[MakeResources, ...] = (
    written_buffers,
    rewritten_parameters,
    line_searches,
    optimizer_bookkeeping,
    held_schedules,
    averages,
)
"""Every kind of state that a skipped step puts back, in the order in which it is put back. A new one is a file, and a name here."""


class SkippedStepRestorer:
    """The transactions of all optimizers: each step is either taken, or leaves no trace.

    Args:
        scope: What the resources are made of.
        makers: The kinds of state; None is all of them.
    """

    def __init__(self, scope: ResourceScope, makers: Sequence[MakeResources] | None = None) -> None:
        kinds = [make(scope) for make in (RESOURCES if makers is None else makers)]
        self._resources: dict[int, list[Resource]] = {
            context.index: [kind[context.index] for kind in kinds if context.index in kind] for context in scope.contexts
        }
        self._each = [resource for resources in self._resources.values() for resource in resources]
        # on a healthy step only those are called that have something to do
        self._at_batch = _overriding(self._each, "begin_batch")
        self._after_pass = _overriding(self._each, "end_pass")
        self._after_batch = _overriding(self._each, "end_batch")
        self._at_window, self._at_step, self._at_commit = (
            {index: _overriding(resources, method) for index, resources in self._resources.items()}
            for method in ("begin_window", "begin_step", "commit")
        )

    def begin_batch(self, *, in_window: bool) -> None:
        """A batch comes; its forward pass has not begun.

        Args:
            in_window: Whether there was a backward pass since the last step.
        """
        for resource in self._at_batch:
            resource.begin_batch(in_window=in_window)

    def end_pass(self, reached: Collection[int], begun: Collection[int]) -> None:
        """A backward pass is over; with several optimizers only.

        Args:
            reached: The numbers of the optimizers whose gradients it has changed.
            begun: Those of them whose window it has begun.
        """
        for index in begun:
            for resource in self._at_window[index]:
                resource.begin_window()
        for resource in self._after_pass:
            resource.end_pass(reached)

    def begin_step(self, step: StepContext) -> None:
        """A step comes; nothing of it has had an effect."""
        for resource in self._at_step[step.optimizer.index]:
            resource.begin_step(step)

    def commit(self, step: StepContext) -> None:
        """The step is about to be taken."""
        for resource in self._at_commit[step.optimizer.index]:
            resource.commit(step)

    def abort(self, step: StepContext, *, is_called: bool) -> None:
        """The step is skipped: put back what its window has changed.

        Args:
            step: The step.
            is_called: Whether the optimizer is called all the same.
        """
        for resource in self._resources[step.optimizer.index]:
            resource.abort(step, is_called=is_called)

    def abandon(self, step: StepContext, *, is_called: bool) -> None:
        """There is no step, though Lightning counts one: arguments as for :meth:`abort`."""
        for resource in self._resources[step.optimizer.index]:
            resource.abandon(step, is_called=is_called)

    def abort_on_device(self, step: StepContext, skipped: Tensor) -> None:
        """Put back what the window of a step has changed if a flag is set, 0-dim bool, which stays unread."""
        for resource in self._resources[step.optimizer.index]:
            resource.abort_on_device(skipped)

    def end_batch(self) -> None:
        """The batch is over."""
        for resource in self._after_batch:
            resource.end_batch()

    def undo_pass(self, *, is_bad: bool) -> list[str]:
        """A batch is over in which nothing led to a step: put back what its forward pass has made bad.

        Args:
            is_bad: Whether its loss is not finite.

        Returns:
            The names of tensors that it has made bad.
        """
        return [name for resource in self._each for name in resource.undo_pass(is_bad=is_bad)]

    def undo_window(self, *, is_bad: bool) -> list[str]:
        """An epoch is over in mid-window, and nobody will step: arguments as for :meth:`undo_pass`."""
        return [name for resource in self._each for name in resource.undo_window(is_bad=is_bad)]

    def reset(self) -> None:
        """Take everything as it is now for what a skip goes back to: a rollback has put it there."""
        for resource in self._each:
            resource.reset()

    def before(self, context: OptimizerContext) -> dict[int, Tensor]:
        """Tensors as a skip of an optimizer's step would put them back, by the ``id`` of the live ones."""
        return {key: copy for resource in self._resources[context.index] for key, copy in resource.before().items()}

    def suspects(self, context: OptimizerContext, *, none_was_good: bool) -> list[tuple[str, Tensor]]:
        """Tensors as they were before the window of an optimizer, by name, that are to be finite.

        Args:
            context: The optimizer.
            none_was_good: Whether every step of it so far was bad.
        """
        return [pair for resource in self._resources[context.index] for pair in resource.suspects(none_was_good=none_was_good)]

    def needs_host(self, context: OptimizerContext) -> bool:
        """Whether the host must decide on the next step of an optimizer, for a reason that has come up in the fit."""
        return any(resource.needs_host for resource in self._resources[context.index])

    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        """Why the host must know at once whether a step is skipped, if it must."""
        reasons = (resource.reason_against_deferral() for resource in self._resources[context.index])
        return next((reason for reason in reasons if reason), None)

    def hand_over(self) -> dict[int, list[Resource]]:
        """Make way for the resources of the same optimizers, which hold other parameters now.

        Returns:
            The resources of each optimizer, by its number, for those that follow them.
        """
        for resource in self._each:
            resource.hand_over()
        return self._resources

    def detach(self) -> None:
        """Take all hooks off."""
        for resource in self._each:
            resource.detach()


def _overriding(resources: Sequence[Resource], method: str) -> list[Resource]:
    """The resources whose class has a method of its own."""
    return [resource for resource in resources if getattr(type(resource), method) is not getattr(Resource, method)]
