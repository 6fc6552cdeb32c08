"""Steps that are decided where the gradients are: the host learns of a verdict one step later, without waiting for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer

from clip_callbacks.core.fused import DEVICES, is_fused, starts_momentum
from clip_callbacks.core.parameters import ParameterTable
from clip_callbacks.core.rules import ClipRule
from clip_callbacks.core.step_report import StepReport
from clip_callbacks.guard.step_context import Incident
from clip_callbacks.trainer.device_event import Arrival
from clip_callbacks.trainer.grad_scaler import grad_scaler
from clip_callbacks.trainer.optimizer_context import Lane

if TYPE_CHECKING:
    from clip_callbacks.guard.restore import Rewind
    from clip_callbacks.trainer.components import Roles


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
        self._arrival = Arrival(report.total.device)

    def read(self) -> StepReport:
        """The report; a step later the device is long past it."""
        self._arrival.wait()
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
        """What stands in the way, if anything does."""
        table, clipping, guard, rewind = lane.table, self._roles.clipping, self._roles.guard, self._rewind
        narrow = table.is_uniform and all(
            tensor.dtype is not torch.float64 and tensor.device.type in DEVICES for tensor in table.tensors[:1]
        )
        obstacles = {
            f"{type(lane.optimizer).__name__} is not fused, so that it cannot stand still unless the host says so": not is_fused(
                lane.optimizer
            ),
            "the parameters are not all of one dtype up to float32 on one device, a CPU or a CUDA one": not table.tensors
            or not narrow,
            "a `clip_value`, or a rule with local norms, gives the gradients more than one factor": clipping is not None
            and (clipping.clip_value is not None or any(_is_local(rule, table) for rule in clipping.rules_of(lane.index))),
            "the guard looks at bad gradients before the step is taken (its policy, or its level)": guard is not None
            and (guard.policy not in {"skip", "ignore"} or guard.level == "microbatch"),
            'on_streak="rollback", which must know of a good step before it is taken': guard is not None
            and guard.on_streak == "rollback",
            "a GradientNormMonitor with noise_scale looks at the gradients after each backward pass": any(
                monitor.noise_scale for monitor in self._roles.monitors
            ),
            'bundles of the weights (bundle_dir, weights="full") are written before other optimizers step': guard is not None
            and guard.evidence.holds_weights
            and len(self._trainer.optimizers) > 1,
            "a GradScaler, which takes the place of what skip_above tells the optimizer": guard is not None
            and guard.skip_above is not None
            and grad_scaler(self._trainer) is not None,
            "step-interval learning-rate schedules are to stand still for a skipped step (hold_schedulers), or batch statistics "
            "to be put back in manual optimization (restore_buffers)": rewind is not None
            and rewind.must_know_at_once(self._trainer, self._module),
        }
        return next((obstacle for obstacle, is_there in obstacles.items() if is_there), None)


def _is_local(rule: ClipRule, table: ParameterTable) -> bool:
    return not rule.stage(table).partition.is_whole
