"""Deferred steps, which the device decides: the host reads the report one step later, and never waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from clip_callbacks.core.fused import FUSED_DEVICES, is_fused, starts_momentum
from clip_callbacks.core.nonfinite import NonFiniteGradientError
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.trainer.device_event import DeviceEvent
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext


class DeferrablePart(Protocol):
    """A part of the fit that may need the host to decide on a step before it is taken."""

    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        """Return the reason why the host must decide on steps of an optimizer; None if it need not."""
        ...


class PendingReport:
    """A report that is being copied to the host.

    Args:
        step: The step.
        report: The report of the step, on the device of the gradients.
    """

    def __init__(self, step: StepContext, report: StepRecord) -> None:
        self.step = step
        self._report = report.to_host()  # enqueued now, and complete when the event has occurred
        _ = step.logged_place  # a cached property: the Trainer will have moved on when the report is read
        self._event = DeviceEvent(report.total_norm.device)

    def read(self) -> StepRecord:
        """Return the report. One step later this does not wait: the device has finished the copy."""
        self._event.wait()
        return self._report.decided_on_host()


class DeferredSteps:
    """The deferred steps of a fit: which optimizers can have them, and their pending reports.

    Args:
        parts: The parts that may need the host to decide.
        wanted: If True, steps are deferred; if False, none is; None defers steps on devices other than the CPU.

    Attributes:
        is_in_use: True once a step was deferred.
        possible: The numbers of the optimizers whose steps can be deferred.
    """

    def __init__(self, parts: Iterable[DeferrablePart], *, wanted: bool | None) -> None:
        self._parts = tuple(parts)
        self._wanted = wanted
        self.is_in_use = False
        self.possible: set[int] = set()
        self._pending: dict[int, PendingReport] = {}
        self._errors: dict[int, NonFiniteGradientError] = {}

    def register(self, context: OptimizerContext) -> None:
        """Determine whether the steps of an optimizer can be deferred; called again when its parameters change.

        Raises:
            ValueError: If the guard has ``deferred=True`` and they cannot. The message says why.
        """
        reason = self._reason_against(context)
        if reason and self._wanted:
            raise ValueError(f"`deferred` cannot be True here: {reason}. Set deferred=None or False, which costs one host sync.")
        # on a CPU there is no host sync to save
        is_wanted = self._wanted
        if is_wanted is None and reason is None:
            is_wanted = not context.table.tensors[0].is_cpu
        self.possible.discard(context.index)
        if reason is None and is_wanted:
            self.possible.add(context.index)

    @staticmethod
    def applies_to(context: OptimizerContext) -> bool:
        """Return whether the next step of an optimizer whose steps can be deferred is decided on the device."""
        # fused SGD allocates momentum buffers with empty_like in its first step: skipped through found_inf, that step would leave
        # uninitialized memory in them
        return is_fused(context.optimizer) and not starts_momentum(context.optimizer)

    def _reason_against(self, context: OptimizerContext) -> str | None:
        """Return the reason why steps of an optimizer cannot be decided on the device; None if they can."""
        if not is_fused(context.optimizer):
            return f"{type(context.optimizer).__name__} is not fused, and only a fused optimizer can skip a step on the device"
        if not _suits_fused_kernels(context):
            return "the parameters do not all have one dtype of at most 32 bits and one device, a CPU or CUDA"
        for part in self._parts:
            if reason := part.reason_against_deferral(context):
                return reason
        return None

    def enqueue(self, step: StepContext, report: StepRecord) -> None:
        """Keep the report of a step as pending, until the next step or until it is asked for."""
        self.is_in_use = True
        self._pending[step.optimizer.index] = PendingReport(step, report)

    def collect(self, context: OptimizerContext, receive: Callable[[StepContext, StepRecord], None]) -> None:
        """Collect the report of an optimizer's deferred step, if there is one.

        An error is stored and raised later, at a point that every rank reaches, because a single rank may have called this.

        Args:
            context: The context of the optimizer.
            receive: Function that receives the step and its report.
        """
        pending = self._pending.pop(context.index, None)
        if pending is not None:
            try:
                receive(pending.step, pending.read())
            except NonFiniteGradientError as error:
                self._errors[context.index] = error

    def raise_errors(self, contexts: Iterable[OptimizerContext]) -> None:
        """Raise the stored error of a deferred step.

        Args:
            contexts: The contexts of optimizers whose reports all ranks have collected by now.

        Raises:
            NonFiniteGradientError: If one is stored.
        """
        for context in contexts:
            if error := self._errors.pop(context.index, None):
                raise error

    def detach(self) -> None:
        """Drop pending reports and stored errors."""
        self._pending.clear()
        self._errors.clear()


def _suits_fused_kernels(context: OptimizerContext) -> bool:
    """Return whether all parameters have one dtype that the fused kernels take, and are on one device."""
    table = context.table
    if not table.tensors or not table.is_uniform:
        return False
    first = table.tensors[0]
    return first.dtype is not torch.float64 and first.device.type in FUSED_DEVICES
