"""Restoring after a skipped step: whatever its window has changed besides the gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from torch import Tensor

from clip_callbacks.guard.averages import averages
from clip_callbacks.guard.line_search import line_searches
from clip_callbacks.guard.optimizer_bookkeeping import optimizer_bookkeeping
from clip_callbacks.guard.resource import MakeResources, Resource, ResourceScope, overriding
from clip_callbacks.guard.rewritten_parameters import rewritten_parameters
from clip_callbacks.guard.schedules import held_schedules
from clip_callbacks.guard.written_buffers import written_buffers
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext

RESOURCES: tuple[MakeResources, ...] = (
    written_buffers,
    # before the bookkeeping, whose fingerprints of parameters must be those of the restored ones
    rewritten_parameters,
    line_searches,
    optimizer_bookkeeping,
    held_schedules,
    # last, because it compares averages from after all restoring, and leaves out what `rewritten_parameters` has found
    averages,
)
"""Every kind of state that a skipped step restores, in the order of restoring. A new kind is a file and a name here."""


class SkippedStepRestorer:
    """Transactions of all optimizers: each step is either taken, or leaves no trace.

    Args:
        scope: The Trainer, the module and the optimizers to make resources for.
        makers: Makers of the kinds of state; None takes all.

    Attributes:
        at_batch: Methods that prepare for a batch, before its forward pass. Their argument ``in_window`` is True if there was a
            backward pass since the last step.
        at_step: Methods that prepare for a step of each optimizer, before it has any effect.
        at_commit: Methods that accept what the window of each optimizer has changed, because the step is about to be taken.
        after_batch: Methods that finish a batch.
    """

    def __init__(self, scope: ResourceScope, makers: Sequence[MakeResources] | None = None) -> None:
        kinds = [make(scope) for make in (RESOURCES if makers is None else makers)]
        self._resources: dict[int, list[Resource]] = {
            context.index: [kind[context.index] for kind in kinds if context.index in kind] for context in scope.contexts
        }
        self._each = [resource for resources in self._resources.values() for resource in resources]
        self._has_skipped = bool(scope.before)  # resources that were made anew in mid-fit: there may have been a skip
        self._bind()

    def _bind(self) -> None:
        """Collect the methods that have something to do, at each point of a step."""

        def bound(resources: Iterable[Resource], method: str) -> tuple[Callable[..., None], ...]:
            awake = [resource for resource in resources if self._has_skipped or method not in resource.idle_until_skip]
            return overriding(awake, Resource, method)

        def bound_of_each(method: str) -> dict[int, tuple[Callable[..., None], ...]]:
            return {index: bound(resources, method) for index, resources in self._resources.items()}

        self.at_batch, self._after_pass, self.after_batch = (
            bound(self._each, method) for method in ("begin_batch", "end_pass", "end_batch")
        )
        self._at_window, self.at_step, self.at_commit = map(bound_of_each, ("begin_window", "begin_step", "commit"))

    def _note_skip(self) -> None:
        """From the first skip on, call the methods that were idle until then."""
        if not self._has_skipped:
            self._has_skipped = True
            self._bind()

    def end_pass(self, reached: Collection[int], begun: Collection[int]) -> None:
        """Note the end of a backward pass; called with several optimizers only.

        Args:
            reached: Indices of the optimizers whose gradients the pass has changed.
            begun: Indices of those among them whose window the pass has begun.
        """
        for index in begun:
            for begin_window in self._at_window[index]:
                begin_window()
        for end_pass in self._after_pass:
            end_pass(reached)

    def abort(self, step: StepContext, *, is_called: bool) -> None:
        """Restore what the window has changed, because the step is skipped.

        Args:
            step: The step.
            is_called: If True, the optimizer is called nevertheless, without gradients.
        """
        self._note_skip()
        for resource in self._resources[step.optimizer.index]:
            resource.abort(step, is_called=is_called)

    def abandon(self, step: StepContext, *, is_called: bool) -> None:
        """End a window without a step, though Lightning counts one.

        Args:
            step: The step that is not taken.
            is_called: If True, the optimizer is called nevertheless, without gradients.
        """
        self._note_skip()
        for resource in self._resources[step.optimizer.index]:
            resource.abandon(step, is_called=is_called)

    def abort_on_device(self, step: StepContext, skipped: Tensor) -> None:
        """Restore what the window of a step has changed if a flag is set, without reading the flag.

        Args:
            step: The step.
            skipped: 0-dim bool on the device.
        """
        for resource in self._resources[step.optimizer.index]:
            resource.abort_on_device(skipped)

    def restore_pass(self, *, is_bad: bool) -> list[str]:
        """Restore what the forward pass of a batch without a step has made non-finite.

        Args:
            is_bad: If True, the loss is not finite either, and everything that the pass has changed is restored.

        Returns:
            The names of tensors that the pass has made non-finite.
        """
        return [name for resource in self._each for name in resource.restore_pass(is_bad=is_bad)]

    def restore_window(self, *, is_bad: bool) -> list[str]:
        """Restore what a window without a step has made non-finite.

        Args:
            is_bad: If True, a loss of the window is not finite either, and everything that it has changed is restored.

        Returns:
            The names of tensors that the window has made non-finite.
        """
        return [name for resource in self._each for name in resource.restore_window(is_bad=is_bad)]

    def reset(self) -> None:
        """Take the present state for the one that a skip restores, after a rollback."""
        for resource in self._each:
            resource.reset()

    def before(self, context: OptimizerContext) -> dict[int, Tensor]:
        """Return tensors as a skip of an optimizer's step would restore them, by the ``id`` of the live ones."""
        return {key: copy for resource in self._resources[context.index] for key, copy in resource.before().items()}

    def suspects(self, context: OptimizerContext, *, no_good_step: bool) -> list[tuple[str, Tensor]]:
        """Return tensors that should be finite, by name, as they were before the window of an optimizer.

        Args:
            context: The optimizer.
            no_good_step: If True, every step of it so far was bad.
        """
        return [pair for resource in self._resources[context.index] for pair in resource.suspects(no_good_step=no_good_step)]

    def needs_host(self, context: OptimizerContext) -> bool:
        """Return whether the host must decide on the optimizer's next step, for a reason that has come up during the fit."""
        return any(resource.needs_host for resource in self._resources[context.index])

    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        """Return why the host must know at once whether a step is skipped; None if it need not."""
        reasons = (resource.reason_against_deferral() for resource in self._resources[context.index])
        return next((reason for reason in reasons if reason), None)

    def hand_over(self) -> dict[int, list[Resource]]:
        """Make way for the resources of the same optimizers, which hold other parameters now.

        Returns:
            The resources of each optimizer, by its index, for those that follow them.
        """
        for resource in self._each:
            resource.hand_over()
        return self._resources

    def detach(self) -> None:
        """Remove all hooks."""
        for resource in self._each:
            resource.detach()
