"""Step-interval learning-rate schedules, which stand still for a skipped step of automatic optimization."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from clip_callbacks.guard.resource import Resource, ResourceScope
from clip_callbacks.trainer.scheduler_hold import SchedulerHold
from clip_callbacks.trainer.step_context import StepContext

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def held_schedules(scope: ResourceScope) -> dict[int, Resource]:
    """Make the resource of the one optimizer of automatic optimization; in manual optimization the module steps its schedules."""
    if not scope.module.automatic_optimization:
        return {}
    return {context.index: _HeldSchedules(scope.trainer, scope.schedules) for context in scope.contexts}


class _HeldSchedules(Resource):
    """Makes Lightning's schedules advance as if skipped batches had not been drawn.

    Args:
        trainer: The Trainer.
        hold: Hold on the learning-rate schedules.
    """

    idle_until_skip = frozenset({"begin_batch", "end_batch"})

    def __init__(self, trainer: Trainer, hold: SchedulerHold) -> None:
        self._trainer = trainer
        self._hold = hold
        if hold.skipped_batches:  # before a resume
            self.idle_until_skip = frozenset()

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        # not at the end of the batch before, because Lightning steps plateau schedules after its last hook
        self._hold.release_plateaus()

    @override
    def commit(self, step: StepContext) -> None:
        # After an earlier skip the batch number no longer tells whether a schedule is due. Batches are counted without schedules
        # too, because a callback may add one in mid-epoch.
        self._hold.decide(self._trainer, skipped=False)

    @override
    def abort(self, step: StepContext, *, is_called: bool) -> None:
        self._hold.decide(self._trainer, skipped=True)

    @override
    def abort_on_device(self, skipped: Tensor) -> None:
        # the host does not know; steps are deferred only where no schedule is held
        self._hold.decide(self._trainer, skipped=False)

    @override
    def end_batch(self) -> None:
        self._hold.release()

    @override
    def detach(self) -> None:
        self._hold.release()
        self._hold.release_plateaus()

    @override
    def reason_against_deferral(self) -> str | None:
        if self._hold.holds(self._trainer):
            return "step-interval learning-rate schedules must not advance at a skipped step, unless hold_schedulers=False"
        return None
