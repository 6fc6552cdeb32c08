"""Going back to the last good weights when bad steps do not end."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS
from torch.utils.hooks import RemovableHandle

from clip_callbacks.core.measurement import TRUE
from clip_callbacks.core.nonfinite import Policy, all_finite
from clip_callbacks.core.reduction import on_any_rank, shard_of
from clip_callbacks.trainer.averages import begin_anew, live_averages
from clip_callbacks.trainer.buffers import live_buffers, put_back_buffers
from clip_callbacks.trainer.grad_scaler import grad_scaler
from clip_callbacks.trainer.learning_rates import scaled_groups, scaled_schedule
from clip_callbacks.trainer.snapshot import Snapshot, overlaps

if TYPE_CHECKING:
    from clip_callbacks.core.rules import ClipState
    from clip_callbacks.core.step_report import StepReport
    from clip_callbacks.guard.restore import Rewind
    from clip_callbacks.trainer.components import Roles
    from clip_callbacks.trainer.optimizer_context import Lane

LimitStates = dict[int, tuple["ClipState", "ClipState"]]
"""For each optimizer those of clipping and of ``skip_above``: values that no step changes."""


@dataclass(frozen=True, eq=False)
class _Point:
    """The run before a good step, as a checkpoint then would have it.

    Args:
        step: ``global_step``.
        trees: Parameters, optimizers' states, the scaler's tensors, averages in other callbacks, with copies in place of tensors.
        groups: The optimizers' groups in the same way.
        buffers: The module's buffers when the step's window began.
        schedules: Learning-rate schedules, each with its state.
        mark: How far the epoch's step-interval schedules had counted.
        limits: States of limits.
    """

    step: int
    trees: dict[str, Any]
    groups: Any
    buffers: Any
    schedules: list[tuple[Any, dict[str, Any]]]
    mark: int
    limits: LimitStates


class Rollback:
    """Keeps one copy of the weights and all that goes with them, and puts it back.

    Args:
        trainer: The Trainer.
        module: The module in training.
        lanes: Its optimizers.
        roles: Who does what: their limits go back too.
        rewind: What puts single skipped steps back.
        every: Good steps between copies.
        lr_factor: For learning rates, at each return.

    Attributes:
        is_fresh: Whether the run has gone back in this batch: what else comes of the batch does not count.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        lanes: Sequence[Lane],
        roles: Roles,
        rewind: Rewind,
        *,
        every: int,
        lr_factor: float,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._lanes = lanes
        self._roles = roles
        self._rewind = rewind
        self._every = every
        self._lr_factor = lr_factor
        self._memory, self._groups = Snapshot(), Snapshot()
        self._buffers, self._next_buffers = Snapshot(), Snapshot()
        self._kept_buffers: Any = None
        self._limits: LimitStates = {}
        self._point: _Point | None = None
        self._good_steps = self._returns = 0
        self._is_candidate = self._is_asked = self._is_lost = False
        self._handles: list[RemovableHandle] = []
        self.is_fresh = False

    def is_of(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether this run is the one."""
        return self._trainer is trainer and self._module is module

    def renew(self, lanes: Sequence[Lane], rewind: Rewind) -> None:
        """Go on after optimizers have taken up or given up parameters.

        The copy still serves if it holds all the weights: those that were frozen until now are in it. What the optimizers,
        schedules and limits were told since stays.

        Args:
            lanes: The optimizers.
            rewind: What puts single skipped steps back.
        """
        is_same = [lane.optimizer for lane in lanes] == [lane.optimizer for lane in self._lanes]
        self._lanes, self._rewind = lanes, rewind
        point, self._point = self._point, None
        if point is None:
            return
        if not is_same or not self._live_parameters().keys() <= point.trees["parameters"].keys():
            self._is_lost = True
            return
        held = [{parameter for group in lane.optimizer.param_groups for parameter in group["params"]} for lane in lanes]
        states = [
            {key: state for key, state in each.items() if not isinstance(key, Tensor) or key in parameters}
            for each, parameters in zip(point.trees["states"], held, strict=True)
        ]
        self._point = replace(self._retold(point), trees=point.trees | {"states": states}, limits=self._limit_states())

    @property
    def step(self) -> int | None:
        """The optimizer step before which the copy was made; None if there is none."""
        return self._point.step if self._point else None

    @property
    def factor(self) -> float:
        """What the next return multiplies the copy's learning rates by: it may be one of several to the same copy."""
        return self._lr_factor ** (self._returns + 1)

    @property
    def since(self) -> str:
        """For the message that there is no copy: since when."""
        if self._is_lost:
            return " since the optimizers took up other parameters"
        return " since the resume" if self._trainer.ckpt_path else ""

    def ask(self) -> None:
        """Go back at the end of this optimizer step."""
        self._is_asked = True

    def begin_batch(self, *, in_window: bool) -> None:
        """Copy the buffers if a window begins here whose step may be the one to copy: its forward pass will change them.

        Args:
            in_window: Whether backward passes wait for their step.
        """
        self.is_fresh = False
        self._meet_schedules()
        if in_window:
            return
        self._is_candidate = self._point is None or self._good_steps >= self._every
        if self._is_candidate:
            self._kept_buffers = self._next_buffers.keep(live_buffers(self._module))

    def begin_step(self) -> None:
        """Hold the limits' states as they are before this step."""
        if self._is_candidate:
            self._limits = self._limit_states()

    def go_back(self, lane: Lane) -> None:
        """Put everything back if it was asked for, and once more after the step, which is taken all the same.

        LBFGS moves on in it, and others count their steps in their groups.
        """
        if not self._is_asked:
            return
        self._meet_schedules()
        self._is_asked, self.is_fresh = False, True
        self._returns += 1
        self._good_steps = 0
        self._handles.append(lane.optimizer.register_step_post_hook(lambda *_: self._restore()))
        if not isinstance(lane.optimizer, LBFGS):
            self._restore()
            self._rewind.take_statistics()

    def end_step(self, lane: Lane, report: StepReport, *, is_new: bool) -> None:
        """Copy what led to a good step, which is about to be taken, if it is time to.

        Args:
            lane: The optimizer.
            report: Of its step.
            is_new: Whether it is no further closure call of the last one.
        """
        if self.is_fresh:
            assert self._point is not None
            if self._module.automatic_optimization:
                self._rewind.schedules.go_back(self._trainer, self._point.mark)
            return
        if not is_new:
            return
        is_first, self._is_candidate = self._is_candidate, False
        if report.finite is not TRUE or lane.is_skipped or not lane.table.has_gradients:
            return
        if is_first and self._others_are_good(lane):
            self._keep()
        self._good_steps += 1

    def end_batch(self) -> None:
        """Undo what the rest of a batch did to what was put back."""
        self.close()
        if not self.is_fresh or self._point is None:
            return
        if self._module.automatic_optimization:
            self._memory.put_back(self._point.trees["scaler"], self._scaler_tensors())
        else:
            self._restore()

    def close(self) -> None:
        """Take hooks off the optimizers: a GradScaler that found an overflow has not called theirs."""
        while self._handles:
            self._handles.pop().remove()

    def _others_are_good(self, lane: Lane) -> bool:
        """Whether what other optimizers hold may be copied with this one's weights: it has no part in these gradients."""
        others = [other for other in self._lanes if other is not lane]
        if not others:
            return True
        if any(other.report is not None and (other.is_skipped or other.report.finite is not TRUE) for other in others):
            return False
        shards = [shard.detach() for other in others for shard in other.table.shards]
        are_finite = all_finite(torch._foreach_norm(shards)) if shards else True  # of norms: a weight of 1e30 is as lost as a NaN
        return not on_any_rank(not are_finite, lane.table.shards[0].device) if self._trainer.world_size > 1 else are_finite

    def _keep(self) -> None:
        self._point = None  # what is in memory is no longer that of the old one
        trees = self._memory.keep(self._live_trees())
        self._buffers, self._next_buffers = self._next_buffers, self._buffers
        groups, schedules, mark = self._groups.keep(self._live_groups()), self._live_schedules(), self._rewind.schedules.mark
        self._point = _Point(self._trainer.global_step, trees, groups, self._kept_buffers, schedules, mark, self._limits)
        self._good_steps = self._returns = 0

    def _meet_schedules(self) -> None:
        """Take up schedules that came in the place of others, as with SWA: what those were before is of no use to them."""
        point, now = self._point, [config.scheduler for config in self._trainer.lr_scheduler_configs]
        if point is not None and now != [scheduler for scheduler, _ in point.schedules]:
            self._point = self._retold(point)

    def _retold(self, point: _Point) -> _Point:
        """A copy with groups and schedules as they are now, learning rates lowered at earlier returns among them."""
        self._returns = 0
        mark = self._rewind.schedules.mark_in(self._trainer.current_epoch)
        return replace(point, groups=self._groups.keep(self._live_groups()), schedules=self._live_schedules(), mark=mark)

    def _restore(self) -> None:
        point = self._point
        assert point is not None
        factor = self._lr_factor**self._returns
        live = self._live_trees()
        begun = live["averages"].keys() - point.trees["averages"].keys()
        self._memory.put_back(point.trees, live)
        for lane, groups in zip(self._lanes, self._groups.put_back(point.groups, self._live_groups()), strict=True):
            rescaled = groups if factor == 1.0 else scaled_groups(groups, factor)
            for group, values in zip(lane.optimizer.param_groups, rescaled, strict=True):
                parameters = group["params"]
                group.clear()
                group.update({"params": parameters} | values)
        put_back_buffers(self._buffers, point.buffers, self._module)
        begin_anew(self._trainer, self._module, begun)
        for scheduler, state in point.schedules:
            own = deepcopy(state)
            scheduler.load_state_dict(own if factor == 1.0 else scaled_schedule(own, factor))
        for index, (clipping, guard) in point.limits.items():
            if self._roles.clipping:
                self._roles.clipping.keep(index, clipping)
            if self._roles.guard and guard:
                self._roles.guard.keep_limit(index, guard)
        for lane in self._lanes:
            for tensor in lane.table.tensors:
                tensor.grad = None

    def _live_trees(self) -> dict[str, Any]:
        return {
            "parameters": self._live_parameters(),
            "states": [lane.optimizer.state for lane in self._lanes],
            "scaler": self._scaler_tensors(),
            "averages": live_averages(self._trainer),
        }

    def _live_parameters(self) -> dict[Tensor, Tensor]:
        """By themselves, without those that cannot be trained: lazy ones before their first pass, sparse and expanded ones."""
        each: dict[int, Tensor] = {id(tensor): tensor for tensor in self._module.parameters()}
        each |= {id(tensor): tensor for lane in self._lanes for tensor in lane.table.tensors}
        return {
            tensor: tensor
            for tensor in each.values()
            if not is_lazy(tensor) and tensor.layout is torch.strided and not overlaps(shard_of(tensor))
        }

    def _live_groups(self) -> list[list[dict[str, Any]]]:
        return [
            [{key: value for key, value in group.items() if key != "params"} for group in lane.optimizer.param_groups]
            for lane in self._lanes
        ]

    def _live_schedules(self) -> list[tuple[Any, dict[str, Any]]]:
        schedulers = [config.scheduler for config in self._trainer.lr_scheduler_configs]
        return [(scheduler, deepcopy(dict(scheduler.state_dict()))) for scheduler in schedulers]

    def _scaler_tensors(self) -> list[Tensor | None]:
        scaler = grad_scaler(self._trainer)
        return [scaler._scale, scaler._growth_tracker] if scaler else []

    def _limit_states(self) -> LimitStates:
        clipping, guard = self._roles.clipping, self._roles.guard
        return {
            lane.index: (
                clipping.state_of(lane.index) if clipping else (),
                guard.limit_state_of(lane.index) if guard and guard.skip_above else (),
            )
            for lane in self._lanes
        }


def check_rollback(policy: Policy, *, is_on: bool, every: int, max_rollbacks: int, lr_factor: float) -> None:
    """Check what is asked of rollbacks.

    Raises:
        ValueError: If a number is out of its range, is set though there are no rollbacks, or the policy ends no streak.
    """
    for argument, count in (("every", every), ("max_rollbacks", max_rollbacks)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"`{argument}` must be a whole number of at least 1, got {count!r}.")
    if isinstance(lr_factor, bool) or not isinstance(lr_factor, (int, float)) or not 0 < lr_factor <= 1:
        raise ValueError(f"`lr_factor` must be above 0 and at most 1, got {lr_factor!r}: 1 leaves learning rates as they were.")
    given = {"every": (every, 100), "max_rollbacks": (max_rollbacks, 3), "lr_factor": (lr_factor, 1.0)}
    for argument, (value, default) in given.items():
        if not is_on and value != default:
            raise ValueError(f'`{argument}` must be left at {default} without rollbacks, got {value!r}: set on_streak="rollback".')
    if is_on and policy in {"raise", "ignore"}:
        raise ValueError(
            f'`on_streak` must be "raise" for the policy {policy!r}, got "rollback": no streak comes to its end there. Use the '
            'policy "skip" or "zero".'
        )
