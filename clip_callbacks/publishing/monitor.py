"""Base class of the parts that observe the steps of a fit without changing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.stats.histogram import Histogram
from clip_callbacks.stats.noise_scale import WindowNorms
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Monitor:
    """Observes nothing: subclasses override the methods for the events that they need."""

    reads_before_write: bool = False
    """If True, :meth:`before_write` is called of steps that are probably logged."""
    measures_micro_batches: bool = False
    """If True, :meth:`end_step` gets the norms of single micro-batches, for which each backward pass is measured."""

    def check(self, trainer: Trainer, contexts: Sequence[OptimizerContext]) -> None:
        """Refuse a Trainer or optimizers that this monitor cannot observe; called once for a fit.

        Raises:
            ValueError: It says why, and what to do instead.
        """

    def attach(self, contexts: Sequence[OptimizerContext], names: Sequence[str], *, renewed: bool) -> None:
        """Take up optimizers that are new, or hold other parameters.

        Args:
            contexts: These optimizers.
            names: The names of all parameters of the module.
            renewed: If True, an optimizer has changed in the middle of the fit.

        Raises:
            ValueError: If a pattern matches no parameter.
        """

    def before_write(self, step: StepContext) -> None:
        """Copy what the step is about to change, while the gradients are as they were measured."""

    def end_step(self, context: OptimizerContext, report: StepRecord, window: WindowNorms | None) -> None:
        """Record a step.

        Args:
            context: The optimizer.
            report: The report of its step.
            window: The norms of the window's micro-batches and of their mean, if they are known.
        """

    def readings(self, context: OptimizerContext, report: StepRecord) -> tuple[dict[str, float], dict[str, Histogram]]:
        """Return the metrics and the histograms of a logging step, by their names."""
        return {}, {}

    def end_epoch(self, context: OptimizerContext) -> Mapping[str, float]:
        """Return the metrics of an epoch, and begin the next one."""
        return {}

    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        """Return why steps of an optimizer cannot be decided on the device; None if they can."""
        return None

    def summary(self, contexts: Sequence[OptimizerContext]) -> list[str]:
        """Return the messages that sum up the fit."""
        return []

    def detach(self) -> None:
        """Release all tensors that belong to the fit."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}
