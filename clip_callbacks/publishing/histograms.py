"""Histograms of gradients: read before a step is clipped, written by the loggers that take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clip_callbacks.core.blocks import OUTSIDE, Partition
from clip_callbacks.stats.histogram import CODES, Histogram, code_counts
from clip_callbacks.trainer.compat import TENSORBOARD, WANDB, is_instance
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger


def check_histograms(trainer: Trainer, contexts: Sequence[OptimizerContext]) -> None:
    """Refuse histograms that nobody would see, or that would show a part for the whole.

    Raises:
        ValueError: It says why, and what to do instead.
    """
    if not trainer.fast_dev_run and not any(_takes_histograms(logger) for logger in trainer.loggers):  # type: ignore[attr-defined]
        names = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "no logger"
        raise ValueError(
            f"`histograms` must be False without a TensorBoardLogger or a WandbLogger, got True with {names}: no other takes "
            "histograms. Add one of them to the Trainer."
        )
    if any(context.table.reduction for context in contexts):
        raise ValueError(
            f"`histograms` must be False where ranks hold parts of the gradients, got True with {type(trainer.strategy).__name__}: "
            "each rank would show its own part as the whole. Use strategy='ddp', or look at them in a short run on one device."
        )


def block_codes(step: StepContext, blocks: Partition) -> Tensor:
    """Signs and exponents of each block's gradient as it is before clipping, after rescaling and without the loss scale.

    Of a sparse gradient those entries count that it stores.

    Args:
        step: The step; its gradients are not yet written.
        blocks: The blocks of its parameters.

    Returns:
        Shape ``(B, 512)``, where the gradients are.
    """
    table = step.optimizer.table
    gradients = table.gradients(bucketed=False)
    factor: float | Tensor = step.scale
    if step.loss_scale is not None:
        factor = step.scale / step.loss_scale
    device = gradients.device if len(table) else torch.device("cpu")
    codes = torch.zeros(len(blocks.names), CODES, dtype=torch.int64, device=device)
    for position, tensor in zip(gradients.positions, gradients.tensors, strict=True):
        if (block := blocks.index[position]) != OUTSIDE:
            of_tensor = factor
            if isinstance(of_tensor, Tensor):
                of_tensor = of_tensor.to(tensor.device)
            codes[block] += code_counts(tensor, of_tensor).to(device)
    return codes


def log_histograms(trainer: Trainer, histograms: Mapping[str, Histogram], step: int) -> None:
    """Write histograms to the loggers that take them, on the axis of their other metrics."""
    if not histograms or not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if is_instance(logger, TENSORBOARD):
            for tag, histogram in histograms.items():
                _write_to_tensorboard(logger, _prefix(logger) + tag, histogram, step)
        elif is_instance(logger, WANDB):
            _write_to_wandb(logger, histograms, step)


def _takes_histograms(logger: Logger) -> bool:
    return is_instance(logger, TENSORBOARD) or is_instance(logger, WANDB)


def _write_to_tensorboard(logger: TensorBoardLogger, tag: str, histogram: Histogram, step: int) -> None:
    """Sums are those of the bins' middles: nothing is read again for them."""
    counts, middles = histogram.counts.double(), histogram.middles
    logger.experiment.add_histogram_raw(
        tag,
        min=float(histogram.edges[0]),
        max=float(histogram.edges[-1]),
        num=int(histogram.counts.sum()),
        sum=float(counts @ middles),
        sum_squares=float(counts @ middles.square()),
        bucket_limits=histogram.edges[1:].tolist(),
        bucket_counts=histogram.counts.tolist(),
        global_step=step,
    )


def _write_to_wandb(logger: WandbLogger, histograms: Mapping[str, Histogram], step: int) -> None:
    make = import_module("wandb").Histogram
    each = ((_prefix(logger) + tag, it.counts.tolist(), it.edges.tolist()) for tag, it in histograms.items())
    values = {tag: make(np_histogram=(counts, edges)) for tag, counts, edges in each}
    # As in Lightning's log_metrics: an axis that comes from TensorBoard's files is not logged beside it.
    if not logger._wandb_init.get("sync_tensorboard"):
        values["trainer/global_step"] = step
    logger.experiment.log(values)


def _prefix(logger: TensorBoardLogger | WandbLogger) -> str:
    if not logger._prefix:
        return ""
    return logger._prefix + logger.LOGGER_JOIN_CHAR
