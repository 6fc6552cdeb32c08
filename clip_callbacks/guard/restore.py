"""What a skipped step must put back beside the gradients, so that it never happened.

The optimizer leaves parameters without a gradient alone. What it does not know of are batch statistics, learning-rate schedules,
and, with LBFGS, the trial points of its own line search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from clip_callbacks.trainer.batch_norm import BatchStatistics
from clip_callbacks.trainer.scheduler_hold import HeldSchedules

if TYPE_CHECKING:
    from clip_callbacks.trainer.optimizer_context import Lane


class Rewind:
    """Puts back what skipped steps of one run have changed.

    Args:
        module: The module in training.
        lanes: Its optimizers.
        restore_buffers: Whether running statistics of batch normalization are put back.
        hold_schedulers: Whether step-interval learning-rate schedules stand still for a skipped step.
    """

    def __init__(self, module: LightningModule, lanes: Sequence[Lane], *, restore_buffers: bool, hold_schedulers: bool) -> None:
        self._is_manual = not module.automatic_optimization
        self._at_batch = BatchStatistics(module, is_on=restore_buffers)
        self._at_step = BatchStatistics(module, is_on=restore_buffers and self._is_manual)
        self.schedules = HeldSchedules(hold_schedulers)
        keep = self._at_step.keep if self._is_manual else None
        self._searches = {lane.index: LineSearch(lane, keep) for lane in lanes if isinstance(lane.optimizer, LBFGS)}
        self._proofs: list[RemovableHandle] = []

    def begin_batch(self, *, in_window: bool) -> None:
        """Keep the statistics as they are before the batch.

        Args:
            in_window: Whether backward passes wait for their step: then a skip goes back to before the first of them.
        """
        self.schedules.release_plateaus()
        if self._is_manual or not in_window:
            self._at_batch.keep()
        if not in_window:
            self._at_step.keep()

    def begin_step(self, lane: Lane, *, is_new: bool) -> None:
        """Keep where LBFGS stands before its first closure call has an effect."""
        self._end_proofs()
        if is_new and lane.index in self._searches:
            self._searches[lane.index].keep()

    def end_step(self, trainer: Trainer, lane: Lane, *, skipped: bool, steps: bool) -> None:
        """Undo a skipped step; keep the statistics of a good one.

        Args:
            trainer: The Trainer.
            lane: The optimizer.
            skipped: Whether its step is skipped.
            steps: Whether the optimizer is called all the same; a GradScaler that found an overflow does not call it.
        """
        if skipped:
            self._restore_statistics()
            if lane.index in self._searches:
                self._searches[lane.index].undo_after_step()
            elif steps:
                self._proofs.append(prove_stillness(lane.optimizer, lane.table.tensors, lane.table.shards))
        elif lane.index not in self._searches:
            self._at_step.keep()
        if not self._is_manual:
            self.schedules.settle(trainer, skipped=skipped)

    def must_know_at_once(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether a skipped step cannot be undone without the host knowing of it before the batch ends."""
        if not module.automatic_optimization:
            return not self._at_step.is_empty
        return self.schedules.holds(trainer)

    def end_deferred_step(self, trainer: Trainer, skipped: Tensor) -> None:
        """Undo a step if it is skipped, which the host does not know.

        Args:
            trainer: The Trainer.
            skipped: Whether it is, 0-dim bool.
        """
        if not self._is_manual:
            self._at_batch.restore_where(skipped)
            self.schedules.settle(trainer, skipped=False)

    def take_statistics(self) -> None:
        """Take the statistics as they are now for those that a skip goes back to: a rollback has put them there."""
        self._at_batch.keep()
        self._at_step.keep()

    def _restore_statistics(self) -> None:
        before = self._before()
        before.restore()
        if before is self._at_batch:
            self._at_step.keep()

    def _before(self) -> BatchStatistics:
        """Those of the last step, or, if another optimizer's bad pass was part of that already, of the batch's beginning."""
        return self._at_step if self._is_manual and self._at_step.is_finite else self._at_batch

    def statistics_before(self) -> dict[int, Tensor]:
        """Batch statistics as a skip would put them back, by the ``id`` of the buffer."""
        return self._before().copies()

    def end_batch(self) -> None:
        """Let schedules go on."""
        self.schedules.release()

    def close(self) -> None:
        """Take hooks off the optimizers."""
        self._end_proofs()
        self.schedules.release()
        self.schedules.release_plateaus()
        for search in self._searches.values():
            search.close()

    def _end_proofs(self) -> None:
        while self._proofs:
            self._proofs.pop().remove()


class LineSearch:
    """Where LBFGS stood before a step: its search moves the parameters before the guard can know of a bad point.

    Args:
        lane: The optimizer, an LBFGS.
        at_end: Called at the end of a good step.
    """

    def __init__(self, lane: Lane, at_end: Callable[[], None] | None) -> None:
        self._lane = lane
        self._at_end = at_end
        self._is_bad = False
        self._parameters: list[Tensor] = []
        self._state: dict[str, Any] = {}
        self._handle: RemovableHandle = lane.optimizer.register_step_post_hook(self._after_step)

    def keep(self) -> None:
        """Copy the parameters and the state: about as much as LBFGS itself holds for two steps."""
        self._is_bad = False
        self._parameters = [tensor.detach().clone() for tensor in self._lane.table.tensors]
        self._state = {key: _copied(value) for key, value in self._own_state().items()}

    def undo_after_step(self) -> None:
        """Put everything back when the optimizer is through with its step."""
        self._is_bad = True

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        if not self._is_bad:
            if self._at_end:
                self._at_end()
            return
        self._is_bad = False
        torch._foreach_copy_(list(self._lane.table.tensors), self._parameters)
        self._own_state().clear()
        self._own_state().update(self._state)

    def _own_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._lane.optimizer.state[self._lane.optimizer.param_groups[0]["params"][0]]
        return state

    def close(self) -> None:
        """Take the hook off."""
        self._handle.remove()


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value


def prove_stillness(optimizer: Optimizer, tensors: Sequence[Tensor], shards: Sequence[Tensor]) -> RemovableHandle:
    """After the step that begins now, see that an optimizer without gradients has moved nothing.

    Version counters tell, and the norms of the parameters, since ``parameter.data`` goes around the counters: those of this rank's
    shards, where ranks hold shards.

    Returns:
        The hook to take off when the step is over: a subclass that calls ``super().step()`` runs it twice.

    Raises:
        RuntimeError: From ``optimizer.step()``, if it has; it names the optimizer.
    """
    before = _whereabouts(tensors, shards)

    def check(*_: Any) -> None:
        if _whereabouts(tensors, shards) != before:
            raise RuntimeError(
                f"`optimizer` must leave parameters without a gradient alone, got {type(optimizer).__name__}, which moved them in "
                "a skipped step: a bad step cannot be undone with it. Use an optimizer of torch.optim, or NonFiniteGuard('raise')."
            )

    return optimizer.register_step_post_hook(check)


@torch.no_grad()
def _whereabouts(tensors: Sequence[Tensor], shards: Sequence[Tensor]) -> list[tuple[int, str]]:
    norms = torch._foreach_norm([shard.detach() for shard in shards]) if shards else []
    return [(tensor._version, str(norm.tolist())) for tensor, norm in zip(tensors, norms, strict=True)]
