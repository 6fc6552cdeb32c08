"""Averages of the weights, which do not count a skipped step; those that somebody else keeps are watched, and named if they do."""

from __future__ import annotations

from typing import TypeAlias

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS
from typing_extensions import override

from clip_callbacks.guard.resource import Resource, ResourceScope
from clip_callbacks.trainer.averages import AveragingHold, untrained_weights
from clip_callbacks.trainer.fingerprints import sum_of_bits
from clip_callbacks.trainer.step_context import StepContext

Fingerprints: TypeAlias = dict[str, list[int]]
"""By the name of what is watched, a number for each of its tensors."""


def averages(scope: ResourceScope) -> dict[int, Resource]:
    """Make one resource for all optimizers: an average is of the whole module."""
    resource = _Averages(scope) if scope.module.automatic_optimization else _AveragesInManual(scope)
    return {context.index: resource for context in scope.contexts}


class _Averages(Resource):
    """Has Lightning's averages leave a skipped step out, and watches others from there to the next step, in which nothing is due.

    What moves in a forward pass is seen in the pass after the skipped step: it has moved twice then between two steps. Nothing is
    read before the first skip.

    Args:
        scope: The Trainer, the module, and how many steps were skipped.
    """

    def __init__(self, scope: ResourceScope) -> None:
        self._trainer, self._module = scope.trainer, scope.module
        self._hold = AveragingHold(scope.trainer, scope.skipped_steps)
        self._put_back = scope.put_back
        self._watched: Fingerprints = {}
        self._named: set[str] = set()
        self._time = (0, 0)

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        if self._watched and self._time != self._now():
            self._watch()  # an average may well move at the end of an epoch or in validation

    @override
    def begin_step(self, step: StepContext) -> None:
        if self._watched:
            self._name_what_has_moved()
            self._watched = {}

    @override
    def abort(self, step: StepContext, *, is_called: bool) -> None:
        self._hold.renumber()
        self._hold.hold()
        if not isinstance(step.optimizer.optimizer, LBFGS):  # its step goes on, and is undone in the end
            self._watch()

    @override
    def abandon(self, step: StepContext, *, is_called: bool) -> None:
        self._hold.hold()

    @override
    def end_batch(self) -> None:
        if self._watched:
            self._name_what_has_moved()

    @override
    def reset(self) -> None:
        self._watched = {}

    @override
    def detach(self) -> None:
        self._hold.release()
        self._watched = {}

    @override
    def reason_against_deferral(self) -> str | None:
        return "an average of the weights is to leave skipped steps out (WeightAveraging)" if self._hold.holds else None

    def _watch(self) -> None:
        self._watched, self._time = self._fingerprints(), self._now()

    def _fingerprints(self) -> Fingerprints:
        apart = {
            name: [tensor for tensor in tensors if id(tensor) not in self._put_back]
            for name, tensors in untrained_weights(self._trainer, self._module).items()
        }
        return {name: list(map(_number, tensors)) for name, tensors in apart.items() if name not in self._named}

    def _now(self) -> tuple[int, int]:
        """Epochs, and batches of validation."""
        return self._trainer.current_epoch, self._trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.ready

    def _name_what_has_moved(self) -> None:
        now = self._fingerprints()
        moved = [name for name, before in self._watched.items() if _has_moved(before, now.get(name, []))]
        if not moved:
            return
        self._named.update(moved)
        names = ", ".join(f"`{name}`" for name in moved)
        rank_zero_warn(
            f"{names} moved after a skipped step and before the next one: weights that no optimizer of the Trainer trains, as an "
            "average of the others is, count the skipped step, and are not put back. Move them after steps that were taken, in "
            "on_train_batch_end: `if not callback.last_report.outcome.is_skipped: ...`, the callback being this NonFiniteGuard or "
            "GradientClipping. Or leave averages to Lightning's WeightAveraging: there skipped steps do not count.",
            category=RuntimeWarning,
            stacklevel=2,
        )


class _AveragesInManual(_Averages):
    """The same where a batch may hold several steps: one that is taken is enough for averages to be due after it."""

    def __init__(self, scope: ResourceScope) -> None:
        super().__init__(scope)
        self._taken: set[tuple[int, int]] = set()

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        super().begin_batch(in_window=in_window)
        self._taken.clear()

    @override
    def commit(self, step: StepContext) -> None:
        self._taken.add(_key(step))

    @override
    def abort_on_device(self, skipped: Tensor) -> None:
        self._taken.add((-1, -1))  # it may be taken

    @override
    def abort(self, step: StepContext, *, is_called: bool) -> None:
        self._taken.discard(_key(step))  # LBFGS's, until its search came by a bad point
        if self._taken:
            self._hold.renumber()
        else:
            super().abort(step, is_called=is_called)


def _has_moved(before: list[int], now: list[int]) -> bool:
    """Whether it has; what consists of other tensors than before was made in between, or is gone."""
    return len(before) == len(now) and before != now


def _number(tensor: Tensor) -> int:
    """What tells whether a tensor has moved: its bits, or its version where they cannot be read; for bad steps only."""
    bits = sum_of_bits(tensor)
    return tensor._version if bits is None else bits


def _key(step: StepContext) -> tuple[int, int]:
    return step.optimizer.index, step.number
