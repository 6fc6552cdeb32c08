"""Charts on loggers' own dashboards: which metrics are to be seen together, and what a table of runs says of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from clip_callbacks.core.step_report import (
    ACCUMULATION_SCALE,
    AMP_SCALE,
    CLIP_COEF,
    CLIP_FRACTION,
    CLIPPED_NORM,
    MAX_NORM,
    RULE_CLIP_COEF,
    RULE_CLIP_FRACTION,
    RULE_MAX_NORM,
    RULE_TOTAL_NORM,
    SHADOW_CLIP_FRACTION,
    SKIPPED_STEPS,
    TOTAL_NORM,
)
from clip_callbacks.trainer.compat import is_of
from clip_callbacks.trainer.components import Roles
from clip_callbacks.trainer.grad_scaler import grad_scaler
from clip_callbacks.trainer.optimizer_context import Lane

CATEGORY = "Gradients"
"""What TensorBoard calls our charts; the suffix of the optimizer's metrics follows."""

LARGEST, SMALLEST, MEAN, LAST = "max,last", "min,last", "mean,last", None
"""What W&B's table of runs says of a metric; the last value is what it says of any."""

Charts: TypeAlias = dict[str, dict[str, str | None]]
"""By title, the names of the metrics in one chart, each with its summary."""


def lay_out_charts(trainer: Trainer, roles: Roles, lanes: Sequence[Lane]) -> None:
    """Tell the loggers whose dashboards can be arranged from here which of our metrics belong together.

    TensorBoard gets a layout for its tab "Custom Scalars", a category for each optimizer. Of several layouts in one run it takes
    the last: this is called before the module's ``on_fit_start``, so that one which the module writes there, or later, takes the
    place of ours; one written before the fit gives way to it. Layouts of other runs are merged with it, category by category.

    W&B gets definitions of metrics: their x-axis, which is that of Lightning's own, and what its table of runs says of them. A
    module's own ``define_metric`` of the same metric, before or after, adds its summary to ours. A chart of several metrics is
    part of a workspace there, which lives on the server: no run can write one.

    Args:
        trainer: A Trainer that has made its optimizers.
        roles: The members, whose metrics these are.
        lanes: The optimizers.
    """
    if not trainer.is_global_zero:
        return
    charts = {lane.suffix: _charts(trainer, roles, lane) for lane in lanes}
    for logger in trainer.loggers:
        if is_of(logger, TensorBoardLogger):
            _write_layout(logger, charts)
        elif is_of(logger, WandbLogger):
            _define_metrics(logger, charts)


def _charts(trainer: Trainer, roles: Roles, lane: Lane) -> Charts:
    """The charts of one optimizer: only such metrics as its members log."""
    charts: Charts = {"total_norm": {TOTAL_NORM: LARGEST}}
    if roles.clipping:
        charts = {
            "total_norm, clipped_norm, max_norm": {TOTAL_NORM: LARGEST, CLIPPED_NORM: LAST, MAX_NORM: LAST},
            "clip_coef, clip_fraction": {CLIP_COEF: SMALLEST, CLIP_FRACTION: MEAN},
        }
        for name in (rule.name for rule in roles.clipping.rules_of(lane.index) if rule.name):
            charts[f"{name}: total_norm, max_norm"] = {RULE_TOTAL_NORM.format(name): LARGEST, RULE_MAX_NORM.format(name): LAST}
            charts[f"{name}: clip_coef, clip_fraction"] = {
                RULE_CLIP_COEF.format(name): SMALLEST,
                RULE_CLIP_FRACTION.format(name): MEAN,
            }
        shadows = {SHADOW_CLIP_FRACTION.format(rule.name): MEAN for rule in roles.clipping.shadows_of(lane.index)}
        if shadows:
            charts["clip_fraction, in force and of shadows"] = {CLIP_FRACTION: MEAN, **shadows}
    if roles.guard:
        charts["skipped_steps"] = {SKIPPED_STEPS: LAST}
    if roles.rescaling:
        charts["accumulation_scale"] = {ACCUMULATION_SCALE: LAST}
    if grad_scaler(trainer):
        charts["amp_scale"] = {AMP_SCALE: LAST}
    return charts


def _write_layout(logger: TensorBoardLogger, charts: dict[str, Charts]) -> None:
    """TensorBoard's charts are made of regular expressions, matched at the beginning of a metric's name."""
    layout = {
        CATEGORY + suffix: {
            title: ["Multiline", [f"^{re.escape(_full_name(logger, name + suffix))}$" for name in names]]
            for title, names in each.items()
        }
        for suffix, each in charts.items()
    }
    logger.experiment.add_custom_scalars(layout)


def _define_metrics(logger: WandbLogger, charts: dict[str, Charts]) -> None:
    """A definition of its own takes a metric out of Lightning's for ``*``: the x-axis is to be told again."""
    x_axis = "global_step" if logger._wandb_init.get("sync_tensorboard") else "trainer/global_step"
    summaries = {
        _full_name(logger, name + suffix): summary
        for suffix, each in charts.items()
        for names in each.values()
        for name, summary in names.items()
    }
    for name, summary in summaries.items():
        if summary:
            # a bare dot would lead into a dictionary
            logger.experiment.define_metric(name.replace(".", r"\."), step_metric=x_axis, step_sync=True, summary=summary)


def _full_name(logger: TensorBoardLogger | WandbLogger, name: str) -> str:
    """What a metric is called behind the prefix that the logger was given."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}{name}" if logger._prefix else name
