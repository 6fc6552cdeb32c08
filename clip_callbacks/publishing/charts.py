"""Charts on loggers' dashboards: groups of metrics for TensorBoard, and definitions of metrics for Weights & Biases."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from clip_callbacks.core.metric_names import SHADOW_CLIP_FRACTION
from clip_callbacks.trainer.compat import TENSORBOARD, WANDB, is_instance

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

TENSORBOARD_CATEGORY = "Gradients"
"""Name of our category of charts in TensorBoard, before the suffix of the optimizer's metrics."""

WANDB_SUMMARIES = {"total_norm": "max,last", "clip_coef": "min,last", "clip_fraction": "mean,last"}
"""Summaries of a metric in W&B's table of runs, by the last part of its name. W&B shows the last value of all other metrics."""

Charts: TypeAlias = Mapping[str, Sequence[str]]
"""Names of the metrics in each chart, by its title."""


def lay_out_charts(trainer: Trainer, charts: Mapping[str, Charts]) -> None:
    """Describe our charts to TensorBoard and Weights & Biases.

    TensorBoard gets a layout for its tab "Custom Scalars", with one category for each optimizer. If one run has several layouts,
    TensorBoard shows the last one. This function is called before the module's ``on_fit_start``: a layout that the module writes
    there or later replaces ours, and ours replaces one that was written before the fit. TensorBoard merges the layouts of several
    runs by category.

    W&B gets definitions of metrics: their x-axis, which is that of Lightning's own metrics, and their summaries in its table of
    runs. If the module defines one of these metrics with ``define_metric``, before or after, W&B shows both summaries. A chart of
    several metrics belongs to a workspace on W&B's server, which a run cannot write.

    Args:
        trainer: A Trainer that has made its optimizers.
        charts: Charts of each optimizer, by the suffix of its metrics.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if is_instance(logger, TENSORBOARD):
            _write_layout(logger, charts)
        elif is_instance(logger, WANDB):
            _define_metrics(logger, charts)


def _summary(name: str) -> str | None:
    """Return the summaries of a metric in W&B's table of runs; None for the last value only."""
    # The last part of a shadow limit's metric is the label of the limit.
    if name.startswith(SHADOW_CLIP_FRACTION.format("")):
        return WANDB_SUMMARIES["clip_fraction"]
    return WANDB_SUMMARIES.get(name.rpartition("/")[2])


def _write_layout(logger: TensorBoardLogger, charts: Mapping[str, Charts]) -> None:
    """Write TensorBoard's layout, in which a chart is a list of regular expressions that match the beginnings of names."""
    layout = {
        TENSORBOARD_CATEGORY + suffix: {
            title: ["Multiline", [f"^{re.escape(_full_name(logger, name + suffix))}$" for name in names]]
            for title, names in each.items()
        }
        for suffix, each in charts.items()
    }
    logger.experiment.add_custom_scalars(layout)


def _define_metrics(logger: WandbLogger, charts: Mapping[str, Charts]) -> None:
    """Define the summaries of our metrics, and their x-axis again: Lightning's definition for ``*`` does not apply to them then."""
    x_axis = "trainer/global_step"
    # If W&B reads its metrics from TensorBoard's files, the x-axis has TensorBoard's name.
    if logger._wandb_init.get("sync_tensorboard"):
        x_axis = "global_step"
    summaries = {
        _full_name(logger, name + suffix): _summary(name)
        for suffix, each in charts.items()
        for names in each.values()
        for name in names
    }
    for name, summary in summaries.items():
        if summary:
            # W&B reads an unescaped dot as a key of a nested dictionary.
            logger.experiment.define_metric(name.replace(".", r"\."), step_metric=x_axis, step_sync=True, summary=summary)


def _full_name(logger: TensorBoardLogger | WandbLogger, name: str) -> str:
    """Return the name of a metric with the prefix of the logger."""
    if not logger._prefix:
        return name
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}{name}"
