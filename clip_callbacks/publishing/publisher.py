"""Where metrics go: loggers, ``callback_metrics``, the progress bar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from clip_callbacks.core.step_report import (
    ACCUMULATION_SCALE,
    AMP_SCALE,
    CLIP_COEF,
    SKIPPED_STEPS,
    TOTAL_NORM,
)
from clip_callbacks.publishing.histograms import log_histograms
from clip_callbacks.stats.histogram import Histogram
from clip_callbacks.trainer.grad_scaler import grad_scaler
from clip_callbacks.trainer.optimizer_context import Lane

if TYPE_CHECKING:
    from clip_callbacks.trainer.components import Roles

SHOWN = (TOTAL_NORM, CLIP_COEF)
"""What the progress bar shows."""


class Publisher:
    """Writes metrics as Lightning's own LearningRateMonitor does: straight to the loggers, on Lightning's x-axis.

    ``LightningModule.log`` costs about 200 µs for each metric and call, and would log a stale value again where the new one is not
    finite. Non-finite values go nowhere.

    Args:
        trainer: A Trainer that has started to fit: it keeps the dictionaries taken here until the end.
        roles: The members, whose metrics these are.
    """

    def __init__(self, trainer: Trainer, roles: Roles) -> None:
        self._roles = roles
        self._callback_metrics = trainer.callback_metrics
        self._progress_bar_metrics = trainer.progress_bar_metrics

    @staticmethod
    def is_logging_step(trainer: Trainer) -> bool:
        """Whether Lightning logs at the end of this batch."""
        return bool(trainer._logger_connector.should_update_logs or getattr(trainer, "fast_dev_run", False))

    def publish(self, trainer: Trainer, module: LightningModule, lanes: Sequence[Lane]) -> None:
        """Offer a batch's reports to ModelCheckpoint and the progress bar; on logging steps, write them to the loggers."""
        is_logging_step = self.is_logging_step(trainer)
        for lane in lanes:
            # in manual optimization the step may have come in a batch before the one that logs
            if is_logging_step and lane.unlogged and (lane.stepped or not module.automatic_optimization):
                self._log_step(trainer, lane)
            elif lane.stepped:
                self._offer_step(lane)
            lane.stepped = False

    def end_epoch(self, trainer: Trainer, lanes: Sequence[Lane]) -> None:
        """Publish percentiles and clip fractions of the epoch, at the step of Lightning's own epoch metrics."""
        for lane in lanes:
            self._offer(lane.named(self._values(lane)))
            values = lane.history.epoch_metrics(clipping=self._roles.clipping is not None)
            lane.history.end_epoch()
            for monitor in self._roles.monitors:
                values |= monitor.end_epoch(lane)
            metrics = as_floats(lane.named(values))
            self._offer(metrics)
            self._log(trainer, metrics, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)

    def _offer_step(self, lane: Lane) -> None:
        """Between logging steps nothing is read or reckoned: the tensors of the report are handed on."""
        if lane.report is not None:
            metrics = lane.named(lane.report.metrics(clipping=self._roles.clipping is not None))
            self._callback_metrics.update(metrics)
            if self._shows:
                self._show(lane, as_floats(metrics))

    def _values(self, lane: Lane) -> dict[str, float]:
        """All metrics of an optimizer, the finite ones, as numbers."""
        if lane.report is None:
            return {}
        roles = self._roles
        metrics: dict[str, Tensor | float] = {**lane.report.metrics(clipping=roles.clipping is not None)}
        if roles.clipping:
            metrics.update(lane.report.rule_metrics())
            metrics.update(lane.history.fractions())
        if roles.guard:
            metrics[SKIPPED_STEPS] = float(roles.guard.skipped_steps_of(lane.index))
        if roles.rescaling:
            metrics[ACCUMULATION_SCALE] = lane.report.accumulation_scale
        return as_floats(metrics)

    def _log_step(self, trainer: Trainer, lane: Lane) -> None:
        assert lane.report is not None
        metrics = self._values(lane)
        if (scaler := grad_scaler(trainer)) is not None:
            metrics[AMP_SCALE] = scaler.get_scale()
        histograms: dict[str, Histogram] = {}
        for monitor in self._roles.monitors:
            values, counts = monitor.readings(lane, lane.report)
            metrics |= as_floats(values)
            histograms |= counts
        self._offer(lane.named(metrics))
        if self._shows:
            self._show(lane, lane.named(metrics))
        if lane.report.accumulation_scale == 1.0:
            metrics.pop(ACCUMULATION_SCALE, None)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._log(trainer, lane.named(metrics), step)
        log_histograms(trainer, lane.named(histograms), step)
        lane.history.begin_log()
        lane.unlogged = False

    @property
    def _shows(self) -> bool:
        return self._roles.clipping is not None and self._roles.clipping.prog_bar

    def _offer(self, values: Mapping[str, float]) -> None:
        """Put metrics where ModelCheckpoint and EarlyStopping look."""
        self._callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})

    def _show(self, lane: Lane, values: Mapping[str, float]) -> None:
        shown = {key: f"{values.get(key, math.nan):.3g}" for key in lane.named(dict.fromkeys(SHOWN))}
        self._progress_bar_metrics.update(shown)  # type: ignore[arg-type]

    @staticmethod
    def _log(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
        for logger in trainer.loggers if values else ():
            logger.log_metrics(dict(values), step=step)


def as_floats(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The finite metrics as numbers; norms are on the host already."""
    values = {key: float(value) for key, value in metrics.items()}
    return {key: value for key, value in values.items() if math.isfinite(value)}
