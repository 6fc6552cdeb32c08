"""Steps that are decided where the gradients are: the host learns of a step one step later, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from clip_callbacks.core.fused import DEVICES, is_fused, starts_momentum
from clip_callbacks.core.nonfinite import NonFiniteGradientError
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.trainer.device_event import DeviceEvent
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext


class DeferrablePart(Protocol):
    """A part of the fit that may have to know of a step before it is taken."""

    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        """Why the host must decide on steps of an optimizer, if it must."""
        ...


class PendingReport:
    """A report on its way to the host.

    Args:
        step: The step.
        report: Its report, where the gradients are.
    """

    def __init__(self, step: StepContext, report: StepRecord) -> None:
        self.step = step
        self._report = report.to_host()
        _ = step.place  # as it is now
        self._event = DeviceEvent(report.total.device)

    def read(self) -> StepRecord:
        """The report; a step later the device is long past it."""
        self._event.wait()
        return self._report.settled()


class DeferredSteps:
    """Which optimizers' steps can be decided on the device, and the reports of those that were.

    Args:
        parts: What may have to know of a step before it is taken.
        wanted: Whether steps are to be deferred; None: where it pays.

    Attributes:
        is_in_use: Whether any step was.
    """

    def __init__(self, parts: Iterable[DeferrablePart], *, wanted: bool | None) -> None:
        self._parts = tuple(parts)
        self._wanted = wanted
        self.is_in_use = False
        self._possible: dict[int, bool] = {}
        self._pending: dict[int, PendingReport] = {}
        self._errors: dict[int, NonFiniteGradientError] = {}

    def register(self, context: OptimizerContext) -> None:
        """Find out about an optimizer, now or again.

        Raises:
            ValueError: If the guard insists on deferral where it cannot be; it says why.
        """
        reason = self._reason_against(context)
        if reason and self._wanted:
            raise ValueError(f"`deferred` cannot be True here: {reason}. Set deferred=None or False, which costs one host sync.")
        self._possible[context.index] = reason is None

    def applies_to(self, context: OptimizerContext) -> bool:
        """Whether this step of an optimizer is to be decided on the device.

        The first one of SGD with momentum is not: skipped on the way it would leave its buffers uninitialized.
        """
        if not self._possible[context.index] or self._wanted is False:
            return False
        if self._wanted is None and context.table.tensors[0].is_cpu:
            return False
        return is_fused(context.optimizer) and not starts_momentum(context.optimizer)

    def _reason_against(self, context: OptimizerContext) -> str | None:
        """Why steps of an optimizer cannot be decided on the device, if they cannot."""
        if not is_fused(context.optimizer):
            return f"{type(context.optimizer).__name__} is not fused, so that it cannot stand still unless the host says so"
        if not _is_narrow(context):
            return "the parameters are not all of one dtype up to float32 on one device, a CPU or a CUDA one"
        for part in self._parts:
            if reason := part.reason_against_deferral(context):
                return reason
        return None

    def enqueue(self, step: StepContext, report: StepRecord) -> None:
        """Let the host learn of a step when the next one comes, or somebody asks."""
        self.is_in_use = True
        self._pending[step.optimizer.index] = PendingReport(step, report)

    def collect(self, context: OptimizerContext, learn: Callable[[StepContext, StepRecord], None]) -> None:
        """Collect the report of an optimizer's deferred step, if there is one.

        An error is stored and raised later, at a point that every rank reaches, because a single rank may have called this.

        Args:
            context: The optimizer.
            learn: Told of the report.
        """
        pending = self._pending.pop(context.index, None)
        if pending is not None:
            try:
                learn(pending.step, pending.read())
            except NonFiniteGradientError as error:
                self._errors[context.index] = error

    def raise_errors(self, contexts: Iterable[OptimizerContext]) -> None:
        """Raise what reports of deferred steps have led to.

        Args:
            contexts: The optimizers whose reports all ranks have collected by now.

        Raises:
            NonFiniteGradientError: If one has.
        """
        for context in contexts:
            if error := self._errors.pop(context.index, None):
                raise error

    def detach(self) -> None:
        """Forget what is on its way."""
        self._pending.clear()
        self._errors.clear()


def _is_narrow(context: OptimizerContext) -> bool:
    """Whether all parameters are of one dtype that the fused kernels take, on one device."""
    table = context.table
    if not table.tensors or not table.is_uniform:
        return False
    first = table.tensors[0]
    return first.dtype is not torch.float64 and first.device.type in DEVICES
