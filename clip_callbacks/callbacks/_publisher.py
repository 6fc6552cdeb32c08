"""Where metrics go: loggers, ``callback_metrics``, the progress bar."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class Publisher:
    """Writes metrics as Lightning's own LearningRateMonitor does: straight to the loggers, on Lightning's x-axis.

    ``LightningModule.log`` costs about 200 µs for each metric and call, and would log a stale value again where the new one is not
    finite. Non-finite values go nowhere.

    Args:
        trainer: A Trainer that has started to fit: it keeps the dictionaries taken here until the end.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._callback_metrics = trainer.callback_metrics
        self._progress_bar_metrics = trainer.progress_bar_metrics

    @staticmethod
    def is_logging_step(trainer: Trainer) -> bool:
        """Whether Lightning logs its own metrics at the end of this batch."""
        return trainer._logger_connector.should_update_logs or bool(getattr(trainer, "fast_dev_run", False))

    def offer(self, metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Put metrics where ModelCheckpoint and EarlyStopping look.

        Returns:
            The finite ones as numbers.
        """
        values = as_floats(metrics)
        self._callback_metrics.update({key: torch.as_tensor(metrics[key]) for key in values})
        return values

    def show(self, values: Mapping[str, float]) -> None:
        """Show values in the progress bar."""
        self._progress_bar_metrics.update({key: f"{value:.3g}" for key, value in values.items()})  # type: ignore[misc]

    @staticmethod
    def log(trainer: Trainer, values: Mapping[str, float], *, epoch_end: bool = False) -> None:
        """Write values to every logger at the step at which Lightning logs its own."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - int(epoch_end)
        for logger in trainer.loggers if values else ():
            logger.log_metrics(dict(values), step=step)


def as_floats(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The finite metrics as numbers; norms are on the host already."""
    values = {key: float(value) for key, value in metrics.items()}
    return {key: value for key, value in values.items() if math.isfinite(value)}


def optimizer_suffixes(trainer: Trainer) -> list[str]:
    """What tells the metrics of several optimizers apart, in the names that LearningRateMonitor gives them.

    Those with a scheduler come first, as there; one optimizer needs no suffix.
    """
    if len(trainer.optimizers) == 1:
        return [""]
    ordered = [config.scheduler.optimizer for config in trainer.lr_scheduler_configs] + trainer.optimizers
    suffixes: dict[int, str] = {}
    seen: Counter[str] = Counter()
    for optimizer in ordered:
        if id(optimizer) not in suffixes:
            name = type(optimizer).__name__
            suffixes[id(optimizer)] = f"-{name}-{seen[name]}" if seen[name] else f"-{name}"
            seen[name] += 1
    return [suffixes[id(optimizer)] for optimizer in trainer.optimizers]
