"""What a skipped step must put back beside the gradients, so that it never happened.

The optimizer leaves parameters without a gradient alone. What it does not know of are batch statistics, learning-rate schedules,
and, with LBFGS, the trial points of its own line search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from clip_callbacks.callbacks._lane import Lane


class Rewind:
    """Puts back what skipped steps of one run have changed.

    Args:
        module: The module in training.
        lanes: Its optimizers.
        restore_buffers: Whether running statistics of batch normalization are put back.
        hold_schedulers: Whether step-interval learning-rate schedules stand still for a skipped step.
    """

    def __init__(self, module: LightningModule, lanes: Sequence[Lane], *, restore_buffers: bool, hold_schedulers: bool) -> None:
        self._statistics = {lane.index: BatchStatistics(module, lane, lanes) for lane in lanes} if restore_buffers else {}
        self.schedules = HeldSchedules(hold_schedulers)
        self._searches = {lane.index: LineSearch(lane) for lane in lanes if isinstance(lane.optimizer, LBFGS)}
        self._proven: set[int] = set()
        self._proofs: list[RemovableHandle] = []

    def begin_batch(self) -> None:
        """Keep the statistics of windows that begin with this batch."""
        for statistics in self._statistics.values():
            statistics.keep_if_new()

    def begin_step(self, lane: Lane, *, is_new: bool) -> None:
        """Keep where LBFGS stands before its first closure call has an effect."""
        self._end_proofs()
        if is_new and lane.index in self._searches:
            self._searches[lane.index].keep()

    def end_step(self, trainer: Trainer, module: LightningModule, lane: Lane, *, skipped: bool, steps: bool) -> None:
        """Undo a skipped step; after any step, a new window begins.

        Args:
            trainer: The Trainer.
            module: The module in training.
            lane: The optimizer.
            skipped: Whether its step is skipped.
            steps: Whether the optimizer is called all the same; a GradScaler does not call it.
        """
        statistics = self._statistics.get(lane.index)
        if skipped:
            if statistics:
                statistics.restore()
            if lane.index in self._searches:
                self._searches[lane.index].undo_after_step()
            elif steps and lane.index not in self._proven:
                self._proven.add(lane.index)
                self._proofs.append(prove_stillness(lane.optimizer, lane.table.tensors))
        if statistics:
            statistics.end_window()
            if not module.automatic_optimization:  # the next window may begin within this training_step
                statistics.keep_if_new()
        if module.automatic_optimization:
            self.schedules.settle(trainer, skipped=skipped)

    def end_batch(self) -> None:
        """Let schedules go on."""
        self.schedules.release()

    def close(self) -> None:
        """Take hooks off the optimizers."""
        self._end_proofs()
        for search in self._searches.values():
            search.close()

    def _end_proofs(self) -> None:
        while self._proofs:
            self._proofs.pop().remove()


class BatchStatistics:
    """Copies of one optimizer's running means, variances and counts, made in place before each window.

    Args:
        module: The module in training.
        lane: The optimizer; what it holds tells which normalization layers are its own.
        lanes: All optimizers: a layer without parameters belongs to each.
    """

    def __init__(self, module: LightningModule, lane: Lane, lanes: Sequence[Lane]) -> None:
        ours = {id(tensor) for tensor in lane.table.tensors}
        anyones = {id(tensor) for other in lanes for tensor in other.table.tensors}
        self._live: list[Tensor] = []
        for layer in module.modules():
            if isinstance(layer, _NormBase) and layer.running_mean is not None:
                held = {id(parameter) for parameter in layer.parameters(recurse=False)} & anyones
                if not held or held & ours:
                    self._live.extend(layer.buffers(recurse=False))
        self._copies = [torch.empty_like(buffer) for buffer in self._live]
        self._is_new = True

    def keep_if_new(self) -> None:
        """Copy the statistics if a window begins now."""
        if self._is_new and self._live:
            torch._foreach_copy_(self._copies, self._live)
        self._is_new = False

    def end_window(self) -> None:
        """Let a new window begin."""
        self._is_new = True

    @torch.no_grad()
    def restore(self) -> None:
        """Put the statistics back to where the window began."""
        if self._live:
            torch._foreach_copy_(self._live, self._copies)


class HeldSchedules:
    """Step-interval schedules that advance as if skipped batches had not been drawn; plateau schedules are left to Lightning.

    Lightning asks each schedule's interval and frequency after the batch, and counts batches, skipped ones too. For one batch they
    are set to what makes it do the right thing, then put back.

    Args:
        is_on: Whether anything is held at all.
    """

    def __init__(self, is_on: bool) -> None:
        self._is_on = is_on
        self._altered: list[tuple[LRSchedulerConfig, str, int]] = []
        self._epoch = -1
        self._left_out = self._window_start = self._seen = 0
        self._is_counted = False

    def settle(self, trainer: Trainer, *, skipped: bool) -> None:
        """Decide for each schedule whether it is to advance after this batch; LBFGS asks several times, and may change its mind."""
        self.release()
        self._begin(trainer.current_epoch, trainer.fit_loop.batch_idx + 1)
        if skipped and not self._is_counted:
            self._left_out += self._seen - self._window_start
            self._is_counted = True
        if not self._is_on or not self._left_out:
            return
        for config in trainer.lr_scheduler_configs:
            if config.interval == "step" and not config.reduce_on_plateau:
                self._altered.append((config, config.interval, config.frequency))
                is_due = not skipped and (self._seen - self._left_out) % config.frequency == 0
                config.interval, config.frequency = ("step", 1) if is_due else ("held", config.frequency)

    def _begin(self, epoch: int, batches: int) -> None:
        """Take note of the batches of the epoch seen so far; those since the last step are the window."""
        if epoch != self._epoch:
            self._epoch, self._left_out, self._seen = epoch, 0, 0
        if batches != self._seen:
            self._window_start, self._seen, self._is_counted = self._seen, batches, False

    def state(self) -> tuple[int, int, int]:
        """Where the epoch stands, for a checkpoint inside it."""
        return self._epoch, self._left_out, self._seen

    def load_state(self, state: tuple[int, int, int]) -> None:
        """Go on from what :meth:`state` returned."""
        self._epoch, self._left_out, self._seen = state

    def release(self) -> None:
        """Put intervals and frequencies back."""
        for config, interval, frequency in self._altered:
            config.interval, config.frequency = interval, frequency
        self._altered.clear()


class LineSearch:
    """Where LBFGS stood before a step: its search moves the parameters before the guard can know of a bad point.

    Args:
        lane: The optimizer, an LBFGS.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
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
        if self._is_bad:
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


def prove_stillness(optimizer: Optimizer, tensors: Sequence[Tensor]) -> RemovableHandle:
    """After the step that begins now, see that an optimizer without gradients has moved nothing; version counters tell.

    Returns:
        The hook to take off when the step is over: a subclass that calls ``super().step()`` runs it twice.

    Raises:
        RuntimeError: From ``optimizer.step()``, if it has; it names the optimizer.
    """
    before = [tensor._version for tensor in tensors]

    def check(*_: Any) -> None:
        if [tensor._version for tensor in tensors] != before:
            raise RuntimeError(
                f"`optimizer` must leave parameters without a gradient alone, got {type(optimizer).__name__}, which moved them in "
                "a skipped step: a bad step cannot be undone with it. Use an optimizer of torch.optim, or NonFiniteGuard('raise')."
            )

    return optimizer.register_step_post_hook(check)
