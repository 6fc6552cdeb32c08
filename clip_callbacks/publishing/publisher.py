"""Metrics for loggers, ``callback_metrics`` and the progress bar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from clip_callbacks.core.metric_names import ACCUMULATION_SCALE, AMP_SCALE, CLIP_COEF, TOTAL_NORM
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.publishing.histograms import log_histograms
from clip_callbacks.publishing.monitor import Monitor
from clip_callbacks.stats.histogram import Histogram
from clip_callbacks.trainer.grad_scaler import grad_scaler
from clip_callbacks.trainer.optimizer_context import OptimizerContext

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

PROGRESS_BAR_METRICS = (TOTAL_NORM, CLIP_COEF)


class MetricSource(Protocol):
    """A part of the fit with metrics that are not on the report of a step."""

    def step_metrics(self, context: OptimizerContext, report: StepRecord) -> Mapping[str, Tensor | float]:
        """Return the metrics of a logging step of one optimizer."""
        ...

    def count_metrics(self, context: OptimizerContext) -> Mapping[str, float]:
        """Return counts of one optimizer's steps over the run so far."""
        ...


class Publisher:
    """Writes metrics directly to the loggers, on Lightning's x-axis, as Lightning's LearningRateMonitor does.

    ``LightningModule.log`` would take about 200 µs for each metric and call, and would repeat an old value in place of a non-finite
    one. Non-finite values are not published.

    Args:
        trainer: The Trainer.
        sources: Parts with metrics of their own, in the order of the metrics.
        monitors: Parts that observe the steps.
        clips: If True, a callback may clip gradients.
        shows: If True, the progress bar shows total_norm and clip_coef.
    """

    def __init__(
        self, trainer: Trainer, sources: Sequence[MetricSource], monitors: Sequence[Monitor], *, clips: bool, shows: bool
    ) -> None:
        self._trainer = trainer
        self._sources = sources
        self._monitors = monitors
        self._clips = clips
        self._shows = shows
        # by the number of the optimizer
        self._offered: dict[int, StepRecord] = {}
        self._logged: dict[int, StepRecord] = {}
        self._logged_at: dict[int, int] = {}
        self._callback_metrics: dict[str, Any] = {}
        self._progress_bar_metrics: dict[str, Any] = {}

    def start_fit(self) -> None:
        """Get the dictionaries of metrics, which stay the same objects until the end of the fit."""
        self._callback_metrics = self._trainer.callback_metrics
        self._progress_bar_metrics = self._trainer.progress_bar_metrics

    @property
    def batches_before_log(self) -> float:
        """Number of windows (in manual optimization of batches) until Lightning logs: 0 if after this one, inf if never."""
        # where Lightning's `should_update_logs` is true, after a dozen calls by which it finds out that this is a fit
        trainer: Any = self._trainer  # whose options mypy does not find
        every = trainer.log_every_n_steps
        if trainer.fast_dev_run or (every and trainer.should_stop):
            return 0
        if not every:
            return math.inf
        before: int = -(trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every
        return before

    def end_batch(self, module: LightningModule, contexts: Sequence[OptimizerContext], *, is_logging_step: bool) -> None:
        """Publish a batch's reports in ``callback_metrics`` and the progress bar and, on logging steps, to the loggers."""
        for context in contexts:
            report = context.report
            if report is None:
                continue
            is_offered = self._offered.get(context.index) is report
            self._offered[context.index] = report
            # In manual optimization the step may have been taken in an earlier batch than the one that logs.
            if (
                is_logging_step
                and self._logged.get(context.index) is not report
                and not (is_offered and module.automatic_optimization)
            ):
                self._log_step(context, report)
            elif not is_offered:
                self._offer_step(context, report)

    def end_epoch(self, contexts: Sequence[OptimizerContext]) -> None:
        """Publish percentiles, clip fractions and counts, at the x-value of Lightning's own epoch metrics."""
        step = self._trainer.fit_loop.epoch_loop._batches_that_stepped - 1
        for context in contexts:
            self._offer(context.named(self._values(context)))
            values = context.history.epoch_metrics(clipping=self._clips)
            context.history.end_epoch()
            for monitor in self._monitors:
                values |= monitor.end_epoch(context)
            counts = self._counts(context)
            self._offer(as_floats(context.named(values | counts)))
            if self._logged_at.get(context.index) != step:  # otherwise the loggers have counts of this step already
                values |= counts
            self._log(as_floats(context.named(values)), step)

    def close_epoch(self, contexts: Sequence[OptimizerContext]) -> None:
        """Count the steps of an epoch that has no end in this fit as steps of the run alone; nothing is published."""
        for context in contexts:
            context.history.end_epoch()
            for monitor in self._monitors:
                monitor.end_epoch(context)

    def end_after_error(self, contexts: Sequence[OptimizerContext]) -> None:
        """Log the counts when an error ends the run, which may be the bad steps since the last logging step."""
        step = self._trainer.fit_loop.epoch_loop._batches_that_stepped
        for context in contexts:
            counts = self._counts(context)
            if any(counts.values()) and self._logged_at.get(context.index) != step:
                # the error may be the logger's own: it must stay the one that the user sees
                with suppress(Exception):
                    self._log(as_floats(context.named(counts)), step)

    def _counts(self, context: OptimizerContext) -> dict[str, float]:
        return {key: count for source in self._sources for key, count in source.count_metrics(context).items()}

    def _offer_step(self, context: OptimizerContext, report: StepRecord) -> None:
        """Publish the tensors of a report in ``callback_metrics``; nothing is computed between logging steps."""
        metrics = report.metrics(clipping=self._clips)
        if context.suffix:
            metrics = context.named(metrics)
        self._callback_metrics.update(metrics)
        if self._shows:
            self._show(context, as_floats(metrics))

    def _values(self, context: OptimizerContext) -> dict[str, float]:
        """Return the finite metrics of an optimizer's last step."""
        report = context.report
        if report is None:
            return {}
        metrics: dict[str, Tensor | float] = {**report.metrics(clipping=self._clips)}
        for source in self._sources:
            metrics.update(source.step_metrics(context, report))
        return as_floats(metrics)

    def _log_step(self, context: OptimizerContext, report: StepRecord) -> None:
        metrics = self._values(context)
        if (scaler := grad_scaler(self._trainer)) is not None:
            metrics[AMP_SCALE] = scaler.get_scale()
        histograms: dict[str, Histogram] = {}
        for monitor in self._monitors:
            values, counts = monitor.readings(context, report)
            metrics |= as_floats(values)
            histograms |= counts
        self._offer(context.named(metrics))
        if self._shows:
            self._show(context, context.named(metrics))
        if report.accumulation_scale == 1.0:
            metrics.pop(ACCUMULATION_SCALE, None)
        step = self._trainer.fit_loop.epoch_loop._batches_that_stepped
        self._log(context.named(metrics), step)
        log_histograms(self._trainer, context.named(histograms), step)
        context.history.begin_log()
        self._logged[context.index], self._logged_at[context.index] = report, step

    def _offer(self, values: Mapping[str, float]) -> None:
        """Publish metrics in ``callback_metrics``, for ModelCheckpoint and EarlyStopping."""
        for key, value in values.items():
            # what Lightning makes of a number, whatever the default dtype and device are
            self._callback_metrics[key] = torch.tensor(value, dtype=torch.float32, device="cpu")

    def _show(self, context: OptimizerContext, values: Mapping[str, float]) -> None:
        shown = {key: f"{values.get(key, math.nan):.3g}" for key in context.named(dict.fromkeys(PROGRESS_BAR_METRICS))}
        self._progress_bar_metrics.update(shown)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        if not values:
            return
        for logger in self._trainer.loggers:
            logger.log_metrics(dict(values), step=step)


def as_floats(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Return the finite metrics as numbers; all tensors among them are on the host."""
    values = {key: float(value) for key, value in metrics.items()}
    return {key: value for key, value in values.items() if math.isfinite(value)}
