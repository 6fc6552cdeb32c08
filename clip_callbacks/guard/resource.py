"""What a batch changes beside the gradients, and a skipped step must put back: one protocol for all of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.scheduler_hold import SchedulerHold
from clip_callbacks.trainer.step_context import StepContext

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Kind = TypeVar("Kind", bound="Resource")


class Resource:
    """A kind of state, as far as one optimizer's window may change it. What a kind has no use for, it leaves out.

    The calls in order: ``begin_batch`` for each batch; with several optimizers ``begin_window`` after the first backward pass of a
    window, and ``end_pass`` after each; then ``begin_step``, then either ``commit`` or ``abort``; or, where the host does not know
    which, ``abort_on_device``; then ``end_batch``. ``undo_pass`` and ``undo_window`` come where there was no step.
    """

    def begin_batch(self, *, in_window: bool) -> None:
        """A batch comes; its forward pass has not begun.

        Args:
            in_window: Whether there was a backward pass since the last step of any optimizer, so that a window goes on.
        """

    def begin_window(self) -> None:
        """A window of this optimizer has begun, as one of several: its first backward pass is over."""

    def end_pass(self, reached: Collection[int]) -> None:
        """A backward pass is over, whosever it was.

        Args:
            reached: The numbers of the optimizers whose gradients it has changed.
        """

    def begin_step(self, step: StepContext) -> None:
        """A step comes; nothing of it has had an effect."""

    def commit(self, step: StepContext) -> None:
        """The step is about to be taken: the state stays as it is."""

    def abort(self, step: StepContext, *, is_called: bool) -> None:
        """The step is skipped: put the state back to where the window began.

        Args:
            step: The step.
            is_called: Whether the optimizer is called all the same; a GradScaler that found an overflow does not call it.
        """

    def abandon(self, step: StepContext, *, is_called: bool) -> None:
        """There is no step: every ``training_step`` of its window returned None. Arguments as for :meth:`abort`.

        What forward passes have written stays, unless it is bad (:meth:`undo_pass`), and schedules advance as Lightning has them.
        """
        self.commit(step)

    def abort_on_device(self, skipped: Tensor) -> None:
        """Put the state back if a flag is set, 0-dim bool, without reading it."""

    def end_batch(self) -> None:
        """The batch is over, but for Lightning's schedules."""

    def undo_pass(self, *, is_bad: bool) -> list[str]:
        """A batch is over in which nothing led to a step: put back what its forward pass has made bad.

        Args:
            is_bad: Whether its loss is not finite, so that all it has changed is to be put back.

        Returns:
            The names of tensors that it has made bad.
        """
        return []

    def undo_window(self, *, is_bad: bool) -> list[str]:
        """An epoch is over in mid-window, and nobody will step: arguments as for :meth:`undo_pass`."""
        return []

    def reset(self) -> None:
        """Take the state as it is now for that of the window's beginning: a rollback has put it there."""

    def hand_over(self) -> None:
        """Make way for the resources of optimizers that hold other parameters now: as for :meth:`detach`, unless this may go on."""
        self.detach()

    def detach(self) -> None:
        """Take all hooks off."""

    def before(self) -> dict[int, Tensor]:
        """Tensors as a skip would put them back, by the ``id`` of the live ones."""
        return {}

    def suspects(self, *, none_was_good: bool) -> list[tuple[str, Tensor]]:
        """Tensors as they were before the window, by name, that are to be finite: the report names those that are not.

        Args:
            none_was_good: Whether every step of the optimizer so far was bad.
        """
        return []

    @property
    def needs_host(self) -> bool:
        """Whether the host must decide on the next step, for a reason that has come up in the fit."""
        return False

    def reason_against_deferral(self) -> str | None:
        """Why the host must know at once whether a step is skipped, if it must."""
        return None


@dataclass(frozen=True)
class ResourceScope:
    """What resources are made of.

    Args:
        trainer: The Trainer.
        module: The module in training.
        contexts: Its optimizers.
        schedules: What holds schedules.
        skipped_steps: How many optimizer steps of the run were skipped so far, by the GradScaler too.
        before: The resources of each optimizer until now, by its number, where it has taken up other parameters in mid-fit.
        put_back: The ``id`` of each parameter that a forward pass rewrites, and a skip puts back; grows as they are found.
    """

    trainer: Trainer
    module: LightningModule
    contexts: Sequence[OptimizerContext]
    schedules: SchedulerHold
    skipped_steps: Callable[[], int]
    before: Mapping[int, Sequence[Resource]] = field(default_factory=dict)
    put_back: set[int] = field(default_factory=set)

    def resource_before(self, index: int, kind: type[Kind]) -> Kind | None:
        """The resource of a kind that an optimizer had until now, if it had one."""
        return next((resource for resource in self.before.get(index, ()) if isinstance(resource, kind)), None)


MakeResources = Callable[[ResourceScope], dict[int, Resource]]
"""Makes the resources of one kind, by the number of the optimizer; none where the kind has nothing to put back."""
