"""What a monitor reads of a step before its gradients are written: weights, statistics, histograms."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from clip_callbacks.core.actions import StepOutcome
from clip_callbacks.core.blocks import Partition
from clip_callbacks.core.gradients import gradients_of
from clip_callbacks.core.metric_names import GRADIENT_MEAN, GRADIENT_STD, GRADIENT_ZEROS, UPDATE_RATIO, WEIGHT_NORM
from clip_callbacks.publishing.histograms import block_codes
from clip_callbacks.publishing.monitor_options import MonitorOptions
from clip_callbacks.stats.gradient_statistics import GradientMoments
from clip_callbacks.stats.update_ratio import WeightsBefore
from clip_callbacks.trainer.after_step import call_after_step
from clip_callbacks.trainer.step_context import StepContext


class StateBeforeWrite:
    """What the options of a monitor need of a step before it, kept on its device until the logging step reads it.

    Args:
        step: The step, before its gradients are written.
        blocks: Partition of its parameters into B blocks.
        options: The options.

    Attributes:
        codes: Counts of the gradients' signs and exponents, as from :func:`~clip_callbacks.publishing.histograms.block_codes`;
            None without the option.
    """

    def __init__(self, step: StepContext, blocks: Partition, options: MonitorOptions) -> None:
        self._options = options
        self._weights: WeightsBefore | None = None
        self._cancel_measurement: Callable[[], None] | None = None
        self._moments: GradientMoments | None = None
        self.codes: Tensor | None = None
        table = step.optimizer.table
        if options.log_update_ratio or options.log_weight_norm:
            # copies serve both options, so that the weights are read once
            self._weights = WeightsBefore(table, blocks, options.norm_type, with_copies=options.log_update_ratio)
            if options.log_update_ratio:
                # when the step ends, because hooks, averages and other optimizers may change the weights before the log
                self._cancel_measurement = call_after_step(step.trainer, step.optimizer.optimizer, self._weights.measure_update)
        if options.log_statistics:
            self._moments = GradientMoments(gradients_of(table, bucketed=False), blocks, step.factor)
        if options.log_histograms:
            self.codes = block_codes(step, blocks)

    def detach(self) -> None:
        """Cancel the measurement of a step that does not end, such as one that has raised an error."""
        if self._cancel_measurement is not None:
            self._cancel_measurement()

    def metrics(self, outcome: StepOutcome) -> dict[str, Tensor]:
        """Return values of all blocks by the prefixes of their metrics, each of shape ``(B,)`` on the host.

        Where ranks hold parts of the parameters, statistics take one collective, and all values of weights together another one.

        Args:
            outcome: The outcome of the step. Update ratios are those of steps that were taken.
        """
        values: dict[str, Tensor] = {}
        if self._weights is not None:
            values |= self._weight_metrics(self._weights, outcome)
        if self._moments is not None:
            found = self._moments.statistics()
            values |= {GRADIENT_MEAN: found.mean, GRADIENT_STD: found.std, GRADIENT_ZEROS: found.zeros}
        return values

    def _weight_metrics(self, weights: WeightsBefore, outcome: StepOutcome) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        if self._options.log_update_ratio and outcome is StepOutcome.TAKEN:
            norms, values[UPDATE_RATIO] = weights.norms_and_ratios()
        elif self._options.log_weight_norm:
            norms = weights.norms()
        else:
            return values
        if self._options.log_weight_norm:
            values[WEIGHT_NORM] = norms
        return values
