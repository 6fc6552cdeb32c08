"""Averages of the weights, which do not count a skipped step. A warning names averages of other code that count it anyway."""

from __future__ import annotations

from typing import TypeAlias

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS
from typing_extensions import override

from clip_callbacks.guard.resource import Resource, ResourceScope
from clip_callbacks.trainer.averages import AveragingHold, untrained_weights
from clip_callbacks.trainer.fingerprints import sum_of_bits, version_of
from clip_callbacks.trainer.step_context import StepContext

Fingerprints: TypeAlias = dict[str, list[int]]
"""Fingerprint of each tensor, by the name of the average that holds it."""


def averages(scope: ResourceScope) -> dict[int, Resource]:
    """Make one resource for all optimizers, because an average covers the whole module."""
    resource = _Averages(scope) if scope.module.automatic_optimization else _AveragesInManual(scope)
    return {context.index: resource for context in scope.contexts}


class _Averages(Resource):
    """Makes Lightning's averages leave out a skipped step, and watches all others from there to the next step.

    Between these two steps no average has a reason to move. One that moves in forward passes is found in the pass after the skipped
    step, because it moves twice between two steps then. Nothing is read before the first skip.

    Args:
        scope: The Trainer, the module, and the number of skipped steps.
    """

    idle_until_skip = frozenset({"begin_batch", "begin_step", "end_batch"})

    def __init__(self, scope: ResourceScope) -> None:
        self._trainer, self._module = scope.trainer, scope.module
        self._hold = AveragingHold(scope.trainer, scope.skipped_steps)
        self._rewritten = scope.rewritten
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
            self._name_moved_ones()
            # The coming step gives averages a reason to move.
            self._watched = {}

    @override
    def abort(self, step: StepContext, *, is_called: bool) -> None:
        # Both are needed: `hold` leaves this batch out, `renumber` keeps "every n steps" on the steps that were taken.
        self._hold.renumber()
        self._hold.hold()
        if not isinstance(step.optimizer.optimizer, LBFGS):  # its step is not over; it is restored when it ends
            self._watch()

    @override
    def abandon(self, step: StepContext, *, is_called: bool) -> None:
        # `global_step` advances here as well, but the step is not among the skipped ones, by which numbers are shifted.
        self._hold.hold()

    @override
    def end_batch(self) -> None:
        if self._watched:
            self._name_moved_ones()

    @override
    def reset(self) -> None:
        # A rollback has moved the averages back itself.
        self._watched = {}

    @override
    def detach(self) -> None:
        self._hold.release()
        self._watched = {}

    @override
    def reason_against_deferral(self) -> str | None:
        if self._hold.holds:
            return "an average of the weights is to leave skipped steps out (WeightAveraging)"
        return None

    def _watch(self) -> None:
        self._watched, self._time = self._fingerprints(), self._now()

    def _fingerprints(self) -> Fingerprints:
        # A skip restores parameters that forward passes rewrite, such as Embedding(max_norm=...): they move, and are no averages.
        apart = {
            name: [tensor for tensor in tensors if id(tensor) not in self._rewritten]
            for name, tensors in untrained_weights(self._trainer, self._module).items()
        }
        return {name: list(map(_fingerprint, tensors)) for name, tensors in apart.items() if name not in self._named}

    def _now(self) -> tuple[int, int]:
        """Return the number of epochs, and of batches of validation."""
        return self._trainer.current_epoch, self._trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.ready

    def _name_moved_ones(self) -> None:
        now = self._fingerprints()
        moved = [name for name, before in self._watched.items() if _has_moved(before, now.get(name, []))]
        if not moved:
            return
        self._named.update(moved)
        names = ", ".join(f"`{name}`" for name in moved)
        rank_zero_warn(
            f"{names} moved after a skipped step and before the next one: weights that no optimizer of the Trainer trains, such as "
            "an average of the others, count the skipped step, and are not restored. Move them after steps that were taken: in "
            "on_train_batch_end, if `callback.last_report` is another than after the batch before, and not `.skipped`, where "
            "callback is this NonFiniteGuard or GradientClipping. Or leave averages to Lightning's WeightAveraging, which does not "
            "count skipped steps.",
            category=RuntimeWarning,
            stacklevel=2,
        )


class _AveragesInManual(_Averages):
    """Averages in manual optimization, where a batch may hold several steps: they are due if one of these was taken."""

    idle_until_skip = frozenset({"begin_step", "end_batch"})

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
        self._taken.discard(_key(step))  # LBFGS commits a step before its line search meets a bad point
        if self._taken:
            self._hold.renumber()
        else:
            super().abort(step, is_called=is_called)


def _has_moved(before: list[int], now: list[int]) -> bool:
    """Return whether an average has moved; one with another number of tensors was replaced in between, or is gone."""
    return len(before) == len(now) and before != now


def _fingerprint(tensor: Tensor) -> int:
    """Return a number that changes when a tensor moves: a sum of its bits, or its version if these cannot be read."""
    # The bits come first, because writing the same values again raises the version although nothing has moved.
    bits = sum_of_bits(tensor)
    return version_of(tensor) or 0 if bits is None else bits


def _key(step: StepContext) -> tuple[int, int]:
    return step.optimizer.index, step.number
