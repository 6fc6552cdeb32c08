"""Charts on loggers' own dashboards: which metrics are to be seen together, and what a table of runs says of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from clip_callbacks.core.metric_names import SHADOW_CLIP_FRACTION
from clip_callbacks.trainer.compat import TENSORBOARD, WANDB, is_instance

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

CATEGORY = "Gradients"
"""What TensorBoard calls our charts; the suffix of the optimizer's metrics follows."""

SUMMARIES = {"total_norm": "max,last", "clip_coef": "min,last", "clip_fraction": "mean,last"}
"""What W&B's table of runs says of a metric, by the last part of its name; of others the last value, which it says of any."""

Charts: TypeAlias = Mapping[str, Sequence[str]]
"""By title, the names of the metrics in one chart."""


def lay_out_charts(trainer: Trainer, charts: Mapping[str, Charts]) -> None:
    """Tell the loggers whose dashboards can be arranged from here which of our metrics belong together.

    TensorBoard gets a layout for its tab "Custom Scalars", a category for each optimizer. Of several layouts in one run it takes
    the last: this is called before the module's ``on_fit_start``, so that one which the module writes there, or later, takes the
    place of ours; one written before the fit gives way to it. Layouts of other runs are merged with it, category by category.

    W&B gets definitions of metrics: their x-axis, which is that of Lightning's own, and what its table of runs says of them. A
    module's own ``define_metric`` of the same metric, before or after, adds its summary to ours. A chart of several metrics is
    part of a workspace there, which lives on the server: no run can write one.

    Args:
        trainer: A Trainer that has made its optimizers.
        charts: The charts of each optimizer, by its suffix.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if is_instance(logger, TENSORBOARD):
            _write_layout(logger, charts)
        elif is_instance(logger, WANDB):
            _define_metrics(logger, charts)


def _summary(name: str) -> str | None:
    """What W&B's table of runs says of a metric; None: the last value.

    That of a shadow limit has the limit's label behind its name.
    """
    if name.startswith(SHADOW_CLIP_FRACTION.format("")):
        return SUMMARIES["clip_fraction"]
    return SUMMARIES.get(name.rpartition("/")[2])


def _write_layout(logger: TensorBoardLogger, charts: Mapping[str, Charts]) -> None:
    """TensorBoard's charts are made of regular expressions, matched at the beginning of a metric's name."""
    layout = {
        CATEGORY + suffix: {
            title: ["Multiline", [f"^{re.escape(_full_name(logger, name + suffix))}$" for name in names]]
            for title, names in each.items()
        }
        for suffix, each in charts.items()
    }
    logger.experiment.add_custom_scalars(layout)


def _define_metrics(logger: WandbLogger, charts: Mapping[str, Charts]) -> None:
    """A definition of its own takes a metric out of Lightning's for ``*``: the x-axis is to be told again."""
    x_axis = "trainer/global_step"
    # Where W&B takes its metrics from TensorBoard's files, Lightning names the axis as it is called there.
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
            # a bare dot would lead into a dictionary
            logger.experiment.define_metric(name.replace(".", r"\."), step_metric=x_axis, step_sync=True, summary=summary)


def _full_name(logger: TensorBoardLogger | WandbLogger, name: str) -> str:
    """What a metric is called behind the prefix that the logger was given."""
    if not logger._prefix:
        return name
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}{name}"
