"""State of a run, as a checkpoint would have it: copied in memory, and restored in place."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy
from torch.utils._pytree import tree_leaves

from clip_callbacks.core.reduction import shard_of
from clip_callbacks.core.rules import ClipState
from clip_callbacks.core.tensor_table import learns
from clip_callbacks.trainer.averages import live_averages, restart_swa
from clip_callbacks.trainer.buffer_snapshot import live_buffers, restore_module_buffers
from clip_callbacks.trainer.grad_scaler import grad_scaler
from clip_callbacks.trainer.learning_rates import scaled_groups, scaled_schedule
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.scheduler_hold import SchedulerHold
from clip_callbacks.trainer.snapshot import Snapshot, can_be_copied, is_opaque, overlaps

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class HasLimitStates(Protocol):
    """Owner of limits whose states a rollback restores. States are values: no step changes them in place."""

    def limit_states(self, index: int) -> ClipState:
        """Return the states for an optimizer."""
        ...

    def save_limit_states(self, index: int, states: ClipState) -> None:
        """Store states for the next step."""
        ...


LimitStates = list[dict[int, ClipState]]
"""States of each owner of limits, by the index of the optimizer."""


@dataclass(frozen=True, eq=False)
class RunCopy:
    """Copy of the run before a good step, as a checkpoint at that moment would have it.

    Args:
        step: ``global_step`` before the step.
        trees: Parameters, optimizers' states, the scaler's tensors and averages of other callbacks; tensors are replaced by copies.
        groups: The optimizers' parameter groups; tensors are replaced by copies.
        buffers: The module's buffers at the beginning of the step's window.
        schedules: Learning-rate schedules, each with its state.
        mark: Position of the step-interval schedules in the epoch.
        limits: States of limits.
    """

    step: int
    trees: dict[str, Any]
    groups: Any
    buffers: Any
    schedules: list[tuple[Any, dict[str, Any]]]
    mark: int
    limits: LimitStates


class RunState:
    """The live run, and the memory for one copy of it.

    Args:
        trainer: The Trainer.
        module: The module in training.
        contexts: One context for each optimizer that is known yet.
        limits: Owners of limits.
        schedules: Hold on the learning-rate schedules.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        contexts: Sequence[OptimizerContext],
        limits: Sequence[HasLimitStates],
        schedules: SchedulerHold,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._contexts = contexts
        self._limits = limits
        self._schedules = schedules
        self.memory, self._groups = Snapshot(), Snapshot()
        # Two, since buffers are copied before it is known whether the step is good: until then the copy in use must stay whole.
        self._buffers, self._next_buffers = Snapshot(), Snapshot()
        self._kept_buffers: Any = None
        self._lazy: list[Tensor] = []
        self._kept_limits: LimitStates = []

    def attach(self, contexts: Sequence[OptimizerContext]) -> None:
        """Attach to the optimizers while there is no copy yet."""
        self._contexts = contexts

    def check(self) -> None:
        """Check that everything there is now can be copied; optimizers make their states in the first step.

        Raises:
            ValueError: If something cannot be copied; the message names it and says what to do.
        """
        for context in self._contexts:
            who = type(context.optimizer).__name__
            for name, tensor in zip(context.table.names, context.table.tensors, strict=True):
                if learns(tensor) and not _is_restorable(tensor):
                    raise ValueError(_no_copy(tensor, f"the parameter {name}"))
            for state in context.optimizer.state.values():
                for key, value in state.items() if isinstance(state, dict) else ():
                    for leaf in tree_leaves(value):
                        if isinstance(leaf, Tensor) and not can_be_copied(leaf):
                            raise ValueError(_no_copy(leaf, f"{key!r} in the state of {who}"))
        for name, buffer in self._module.named_buffers():
            if not can_be_copied(buffer):
                raise ValueError(_no_copy(buffer, f"the buffer {name}"))

    def keep_buffers(self) -> None:
        """Copy the buffers before the first forward pass of a window, which will change them."""
        self._kept_buffers = self._next_buffers.keep(live_buffers(self._module))
        self._lazy = [tensor for tensor in (*self._module.parameters(), *self._module.buffers()) if is_lazy(tensor)]

    @property
    def has_new_tensors(self) -> bool:
        """Whether lazy modules have made parameters or buffers since the buffers were copied, so that the copy lacks them."""
        return not all(map(is_lazy, self._lazy))

    def keep_limits(self) -> None:
        """Keep the limits' states from before a step."""
        self._kept_limits = self.limit_states()

    def copy(self) -> RunCopy:
        """Copy the run before the coming step, into the memory of the previous copy, which is lost.

        Raises:
            ValueError: If something cannot be copied.
        """
        # first, because what follows overwrites the copy in use
        self.check()
        trees = self.memory.keep(self._live_trees())
        self._buffers, self._next_buffers = self._next_buffers, self._buffers
        return RunCopy(
            step=self._trainer.global_step,
            trees=trees,
            groups=self._groups.keep(self._live_groups()),
            buffers=self._kept_buffers,
            schedules=self._live_schedules(),
            # The window of the coming step belongs to what a rollback undoes.
            mark=self._schedules.batches_before_window,
            # from before the measurement, which has entered the norm of this step already
            limits=self._kept_limits,
        )

    def restore(self, copy: RunCopy, factor: float) -> None:
        """Restore a copy in place, and drop all gradients.

        Args:
            copy: The copy.
            factor: Factor for its learning rates.
        """
        live = self._live_trees()
        # SWA averages that have begun since the copy restart from weights, so after these are restored.
        begun = live["averages"].keys() - copy.trees["averages"].keys()
        self.memory.restore(copy.trees, live)
        self._restore_groups(copy, factor)
        restore_module_buffers(self._buffers, copy.buffers, self._module)
        restart_swa(self._trainer, self._module, begun)
        for scheduler, state in copy.schedules:
            # torch's load_state_dict takes lists and dictionaries as they are: the schedule would go on to change the copy.
            own = deepcopy(state)
            if factor != 1.0:
                own = scaled_schedule(own, factor)
            scheduler.load_state_dict(own)
        for owner, states in zip(self._limits, copy.limits, strict=True):
            for index, of_optimizer in states.items():
                owner.save_limit_states(index, of_optimizer)
        for context in self._contexts:
            for tensor in context.table.tensors:
                tensor.grad = None

    def _restore_groups(self, copy: RunCopy, factor: float) -> None:
        restored = self._groups.restore(copy.groups, self._live_groups())
        for context, groups in zip(self._contexts, restored, strict=True):
            rescaled = groups
            if factor != 1.0:
                rescaled = scaled_groups(groups, factor)
            for group, values in zip(context.optimizer.param_groups, rescaled, strict=True):
                # The dictionary and its list of parameters stay the same objects: schedules and wrappers of optimizers hold them.
                parameters = group["params"]
                group.clear()
                group.update({"params": parameters} | values)

    def restore_scaler(self, copy: RunCopy) -> None:
        """Restore the GradScaler's scale once more, which its update has changed for a step that was not taken."""
        self.memory.restore(copy.trees["scaler"], self._scaler_tensors())

    def carry_over(self, copy: RunCopy, contexts: Sequence[OptimizerContext]) -> RunCopy | None:
        """Adapt a copy after optimizers have taken up or given up parameters.

        Present parameter groups, schedules and states of limits take the place of those in the copy.

        Args:
            copy: The copy.
            contexts: One context for each optimizer.

        Returns:
            The adapted copy; None if there are parameters that the copy does not hold.
        """
        is_same = [context.optimizer for context in contexts] == [context.optimizer for context in self._contexts]
        self._contexts = contexts
        if not is_same or not self._live_parameters().keys() <= copy.trees["parameters"].keys():
            return None
        held = [{parameter for group in context.optimizer.param_groups for parameter in group["params"]} for context in contexts]
        # Without parameters that were given up: Optimizer.state_dict() raises on a state whose parameter is in no group.
        states = [
            {key: state for key, state in each.items() if not isinstance(key, Tensor) or key in parameters}
            for each, parameters in zip(copy.trees["states"], held, strict=True)
        ]
        return replace(self.with_present_schedules(copy), trees=copy.trees | {"states": states}, limits=self.limit_states())

    def has_other_schedules(self, copy: RunCopy) -> bool:
        """Return whether the schedules of a copy have been replaced, as StochasticWeightAveraging does."""
        # compared as objects: the new one may be of the same class
        now = [config.scheduler for config in self._trainer.lr_scheduler_configs]
        return now != [scheduler for scheduler, _ in copy.schedules]

    def with_present_schedules(self, copy: RunCopy) -> RunCopy:
        """Return a copy with the present groups and schedules, whose learning rates earlier rollbacks may have lowered."""
        mark = self._schedules.batches_counted_in(self._trainer.current_epoch)
        return replace(copy, groups=self._groups.keep(self._live_groups()), schedules=self._live_schedules(), mark=mark)

    def limit_states(self) -> LimitStates:
        """Return the present states of all limits."""
        return [{context.index: owner.limit_states(context.index) for context in self._contexts} for owner in self._limits]

    def _live_trees(self) -> dict[str, Any]:
        return {
            "parameters": self._live_parameters(),
            "states": [context.optimizer.state for context in self._contexts],
            "scaler": self._scaler_tensors(),
            "averages": live_averages(self._trainer),
        }

    def _live_parameters(self) -> dict[Tensor, Tensor]:
        """Return the parameters that a copy holds, each as its own key.

        Left out are parameters that cannot be trained (lazy ones before their first pass, sparse and expanded ones), and frozen
        ones that cannot be copied.
        """
        each: dict[int, Tensor] = {id(tensor): tensor for tensor in self._module.parameters()}
        # by id, since most are in both: an optimizer may also hold tensors that are no parameters of the module
        each |= {id(tensor): tensor for context in self._contexts for tensor in context.table.tensors}
        return {
            tensor: tensor
            for tensor in each.values()
            if not is_lazy(tensor) and tensor.layout is torch.strided and not overlaps(shard_of(tensor))
            if _is_restorable(tensor)
        }

    def _live_groups(self) -> list[list[dict[str, Any]]]:
        return [
            [{key: value for key, value in group.items() if key != "params"} for group in context.optimizer.param_groups]
            for context in self._contexts
        ]

    def _live_schedules(self) -> list[tuple[Any, dict[str, Any]]]:
        schedulers = [config.scheduler for config in self._trainer.lr_scheduler_configs]
        # state_dict of torch's schedules returns their own lists, which go on to change
        return [(scheduler, deepcopy(dict(scheduler.state_dict()))) for scheduler in schedulers]

    def _scaler_tensors(self) -> list[Tensor | None]:
        scaler = grad_scaler(self._trainer)
        if not scaler:
            return []
        # The tensors themselves: scaler.state_dict() would read the scale on the host. Both are None until a loss was scaled.
        return [scaler._scale, scaler._growth_tracker]


def _is_restorable(parameter: Tensor) -> bool:
    """Return whether a parameter can be copied, and written to in place: an optimizer must keep holding the same object."""
    return can_be_copied(parameter) and not is_opaque(shard_of(parameter))


def _no_copy(tensor: Tensor, what: str) -> str:
    kind = type(tensor).__name__
    if type(tensor) in {Tensor, Parameter}:
        kind = str(tensor.dtype)
    return (
        f"`rollback` must be None where tensors cannot be copied, got Rollback(...) with {what}, which is of the kind {kind}. "
        "Use NonFiniteGuard(rollback=None), or an optimizer and layers whose tensors have clone() or __tensor_flatten__()."
    )
