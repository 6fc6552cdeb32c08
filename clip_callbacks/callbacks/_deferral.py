"""Steps that are decided where the gradients are: the host learns of a verdict one step later, without waiting for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer

from clip_callbacks.callbacks._incident import Incident
from clip_callbacks.callbacks._lane import Lane
from clip_callbacks.fused import is_fused, starts_momentum
from clip_callbacks.parameters import ParameterTable
from clip_callbacks.report import StepReport
from clip_callbacks.rules import ClipRule

if TYPE_CHECKING:
    from clip_callbacks.callbacks._pass import Roles
    from clip_callbacks.callbacks._rewind import Rewind


class Verdict:
    """A report on its way to the host.

    Args:
        report: Of a deferred step.
        incident: Where and when it was.
    """

    def __init__(self, report: StepReport, incident: Incident) -> None:
        self._report = report.to_host()
        self.incident = incident
        _ = incident.place  # as it is now
        device = report.total.device
        self._event = None
        if device.type != "cpu":
            module = torch.get_device_module(device)
            self._event = module.Event()
            self._event.record(module.current_stream(device))

    def read(self) -> StepReport:
        """The report; a step later the device is long past it."""
        if self._event:
            self._event.synchronize()
        return self._report.settled()


class Deferral:
    """Which optimizers' steps can be decided on the device, and whether they are.

    Args:
        trainer: The Trainer.
        module: The module in training.
        roles: Who does what.
        rewind: What puts skipped steps back.

    Raises:
        ValueError: If the guard insists on it where it cannot be; it says why.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, roles: Roles, rewind: Rewind | None) -> None:
        self._trainer = trainer
        self._module = module
        self._roles = roles
        self._rewind = rewind
        self._wanted = roles.guard.deferred if roles.guard else None
        self._possible: dict[int, bool] = {}

    def meet(self, lane: Lane) -> None:
        """Find out about an optimizer, now or again.

        Raises:
            ValueError: If the guard insists where it cannot be.
        """
        obstacle = self._obstacle(lane)
        if obstacle and self._wanted:
            raise ValueError(f"`deferred` cannot be True here: {obstacle}. Set deferred=None or False, which costs one host sync.")
        self._possible[lane.index] = obstacle is None

    def is_on(self, lane: Lane) -> bool:
        """Whether this step of an optimizer is to be decided on the device.

        The first one of SGD with momentum is not: skipped on the way it would leave its buffers uninitialized.
        """
        if not self._possible[lane.index] or self._wanted is False:
            return False
        if self._wanted is None and lane.table.tensors[0].is_cpu:
            return False
        return is_fused(lane.optimizer) and not starts_momentum(lane.optimizer)

    def _obstacle(self, lane: Lane) -> str | None:
        table, clipping, guard = lane.table, self._roles.clipping, self._roles.guard
        if not is_fused(lane.optimizer):
            return f"{type(lane.optimizer).__name__} is not fused, so that it cannot stand still unless the host says so"
        if not table.tensors or not table.is_uniform or table.tensors[0].dtype is torch.float64:
            return "the parameters are not all of one dtype up to float32 on one device"
        if clipping and (clipping.clip_value is not None or any(_is_local(rule, table) for rule in clipping.rules_of(lane.index))):
            return "a `clip_value`, or a rule with local norms, gives the gradients more than one factor"
        if guard and (guard.policy not in {"skip", "ignore"} or guard.level == "microbatch"):
            return f"the guard ({guard.policy!r}, level {guard.level!r}) looks at bad gradients before the step is taken"
        if self._rewind and self._rewind.must_know_at_once(self._trainer, self._module):
            return (
                "step-interval learning-rate schedules are to stand still for a skipped step (hold_schedulers), or batch "
                "statistics to be put back in manual optimization (restore_buffers)"
            )
        return None


def _is_local(rule: ClipRule, table: ParameterTable) -> bool:
    return not rule.stage(table).partition.is_whole
