"""The report of a step to the GradScaler of 16-mixed precision, between the write and ``scaler.step``."""

from __future__ import annotations

from torch.amp.grad_scaler import GradScaler

from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.guard.unguarded import Resolution
from clip_callbacks.trainer.grad_scaler import is_incurable, keep_scale, keep_scale_where, mark_unscaled
from clip_callbacks.trainer.step_context import StepContext, StepMode


def report_to_scaler(scaler: GradScaler, step: StepContext, report: StepRecord, resolution: Resolution) -> None:
    """Tell the GradScaler whether gradients are finite, where Lightning has left unscaling to the optimizer.

    A non-finite loss is not reported as an overflow: no lower scale cures it. The scale is halved for each overflow and grows once
    in 2,000 good steps, so that one such loss in a hundred would drive it towards 0, until gradients underflow and learning stops.

    Args:
        scaler: The scaler.
        step: The step.
        report: The report of the step.
        resolution: The guard's resolution.
    """
    optimizer = step.optimizer.optimizer
    if resolution.holds_scale and step.mode is not StepMode.ON_DEVICE:
        keep_scale(scaler, optimizer)
    elif step.loss_scale is not None:
        mark_unscaled(scaler, optimizer, report.finite)
        if resolution.holds_scale:  # on the device: whether it applies to this step is not known on the host
            incurable = is_incurable(step.losses, step.loss_scale)
            keep_scale_where(scaler, optimizer, report.finite.logical_not() & incurable)
