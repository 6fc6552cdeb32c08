"""State that a window changes besides the gradients and that a skipped step restores: one protocol for all kinds of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.scheduler_hold import SchedulerHold
from clip_callbacks.trainer.step_context import StepContext

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Kind = TypeVar("Kind", bound="Resource")


class Resource:
    """One kind of state, as far as the window of one optimizer may change it. A subclass overrides the methods that it needs.

    The methods are called in this order: ``begin_batch`` before each batch; with several optimizers ``begin_window`` after the
    first backward pass of a window, and ``end_pass`` after each; then ``begin_step``; then either ``commit`` or ``abort``, or
    ``abort_on_device`` if the host does not know which; then ``end_batch``. ``restore_pass`` and ``restore_window`` are called
    after forward passes that led to no step. A healthy step calls only the methods that a resource overrides.
    """

    idle_until_skip: frozenset[str] = frozenset()
    """Names of overridden methods that have nothing to do before the first skipped step of a fit; they are called from then on."""

    def begin_batch(self, *, in_window: bool) -> None:
        """Prepare for a batch, before its forward pass.

        Args:
            in_window: If True, a window is open: there was a backward pass since the last step of any optimizer.
        """

    def begin_window(self) -> None:
        """Note that a window of this optimizer, one of several, has begun: its first backward pass is over."""

    def end_pass(self, reached: Collection[int]) -> None:
        """Note the end of a backward pass, of whichever optimizer.

        Args:
            reached: Indices of the optimizers whose gradients the pass has changed.
        """

    def begin_step(self, step: StepContext) -> None:
        """Prepare for a step, before it has any effect."""

    def commit(self, step: StepContext) -> None:
        """Accept the state as it is, because the step is about to be taken."""

    def abort(self, step: StepContext, *, is_called: bool) -> None:
        """Restore the state of the window's beginning, because the step is skipped.

        Args:
            step: The step.
            is_called: If True, the optimizer is called nevertheless, without gradients. A GradScaler that found an overflow does
                not call it.
        """

    def abandon(self, step: StepContext, *, is_called: bool) -> None:
        """End a window without a step, because every ``training_step`` in it returned None.

        Writes of the forward passes stay, unless they are non-finite (:meth:`restore_pass`), and schedules advance as Lightning has
        them.

        Args:
            step: The step that is not taken.
            is_called: If True, the optimizer is called nevertheless, without gradients.
        """
        self.commit(step)

    def abort_on_device(self, skipped: Tensor) -> None:
        """Restore the state if a flag is set, without reading the flag.

        Args:
            skipped: 0-dim bool on the device.
        """

    def end_batch(self) -> None:
        """Finish a batch, after Lightning's step-interval schedules and before its plateau schedules."""

    def restore_pass(self, *, is_bad: bool) -> list[str]:
        """Restore what the forward pass of a batch without a step has made non-finite.

        Args:
            is_bad: If True, the loss is not finite either, and everything that the pass has changed is restored.

        Returns:
            The names of tensors that the pass has made non-finite.
        """
        return []

    def restore_window(self, *, is_bad: bool) -> list[str]:
        """Restore what a window without a step has made non-finite, after the last batch of an epoch or a foreign ``zero_grad``.

        Args:
            is_bad: If True, a loss of the window is not finite either, and everything that it has changed is restored.

        Returns:
            The names of tensors that the window has made non-finite.
        """
        return []

    def reset(self) -> None:
        """Take the present state for that of the window's beginning, after a rollback has restored it."""

    def hand_over(self) -> None:
        """Make way for the resources of optimizers that hold other parameters now. A resource that they can keep using stays."""
        self.detach()

    def detach(self) -> None:
        """Remove all hooks."""

    def before(self) -> dict[int, Tensor]:
        """Return tensors as a skip would restore them, by the ``id`` of the live ones."""
        return {}

    def suspects(self, *, no_good_step: bool) -> list[tuple[str, Tensor]]:
        """Return tensors that should be finite, by name, as they were before the window; the report names those that are not.

        Args:
            no_good_step: If True, every step of the optimizer so far was bad.
        """
        return []

    @property
    def needs_host(self) -> bool:
        """Whether the host must decide on the next step, for a reason that has come up during the fit."""
        return False

    def reason_against_deferral(self) -> str | None:
        """Return why the host must know at once whether a step is skipped; None if it need not."""
        return None


@dataclass(frozen=True)
class ResourceScope:
    """Everything that resources are made from.

    Args:
        trainer: The Trainer.
        module: The module in training.
        contexts: One context for each optimizer.
        schedules: Hold on the learning-rate schedules.
        skipped_steps: Function that returns the number of steps that were skipped in the run, by a GradScaler too.
        before: Previous resources of each optimizer, by its index, if it has taken up other parameters during the fit.
        rewritten: Set with the ``id`` of each parameter that a forward pass rewrites and a skip restores; grows as they are found.
    """

    trainer: Trainer
    module: LightningModule
    contexts: Sequence[OptimizerContext]
    schedules: SchedulerHold
    skipped_steps: Callable[[], int]
    before: Mapping[int, Sequence[Resource]] = field(default_factory=dict)
    rewritten: set[int] = field(default_factory=set)

    def resource_before(self, index: int, kind: type[Kind]) -> Kind | None:
        """Return the previous resource of a kind of one optimizer, if it had one."""
        return next((resource for resource in self.before.get(index, ()) if isinstance(resource, kind)), None)


def overriding(parts: Iterable[Any], base: type[Any], method: str) -> tuple[Callable[..., Any], ...]:
    """Return a method of all parts whose class overrides it, so that a part that does nothing at some point is not called there.

    Args:
        parts: The parts, of one kind.
        base: The class in which the method does nothing.
        method: The name of the method.
    """
    return tuple(getattr(part, method) for part in parts if getattr(type(part), method) is not getattr(base, method))


MakeResources = Callable[[ResourceScope], dict[int, Resource]]
"""Makes the resources of one kind, by the index of the optimizer; none where that kind has nothing to restore."""
