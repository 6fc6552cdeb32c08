"""Histograms of gradients before clipping, for the loggers that take histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clip_callbacks.core.blocks import OUTSIDE, Partition
from clip_callbacks.core.gradients import gradients_of
from clip_callbacks.stats.histogram import CODE_COUNT, Histogram, code_counts
from clip_callbacks.trainer.compat import TENSORBOARD, WANDB, is_instance
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger


def check_histograms(trainer: Trainer, contexts: Sequence[OptimizerContext]) -> None:
    """Check that a logger takes histograms, and that each rank has whole gradients.

    Raises:
        ValueError: If not; it says what to do instead.
    """
    if not trainer.fast_dev_run and not any(_takes_histograms(logger) for logger in trainer.loggers):  # type: ignore[attr-defined]
        names = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "no logger"
        raise ValueError(
            f"`log_histograms` must be False without a TensorBoardLogger or a WandbLogger, got True with {names}: other "
            "loggers take no histograms. Add one of them to the Trainer."
        )
    if any(context.table.reduction for context in contexts):
        raise ValueError(
            "`log_histograms` must be False where ranks hold parts of the gradients, got True with "
            f"{type(trainer.strategy).__name__}: each rank would log its part as the whole. Use strategy='ddp', or log "
            "histograms in a short run on one device."
        )


def block_codes(step: StepContext, blocks: Partition) -> Tensor:
    """Count the signs and exponents of each block's gradient before clipping, after rescaling and without the loss scale.

    For a sparse gradient, stored entries count.

    Args:
        step: The step, before its gradients are written.
        blocks: Partition of its parameters into B blocks.

    Returns:
        Number of entries of each code, int64 of shape ``(B, 512)``, on the device of the gradients.
    """
    table = step.optimizer.table
    gradients = gradients_of(table, bucketed=False)
    factor = step.factor
    device = gradients.device if len(table) else torch.device("cpu")
    codes = torch.zeros(len(blocks.names), CODE_COUNT, dtype=torch.int64, device=device)
    for position, tensor in zip(gradients.positions, gradients.tensors, strict=True):
        if (block := blocks.index[position]) != OUTSIDE:
            of_tensor = factor
            if isinstance(of_tensor, Tensor):
                of_tensor = of_tensor.to(tensor.device)
            codes[block] += code_counts(tensor, of_tensor).to(device)
    return codes


def log_histograms(trainer: Trainer, histograms: Mapping[str, Histogram], step: int) -> None:
    """Write histograms to the loggers that take them, on the x-axis of the other metrics."""
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
    """Write one histogram; its sums are computed from the middles of its bins, without another read of the gradient."""
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
    # As in Lightning's log_metrics: with sync_tensorboard the x-axis comes from TensorBoard's files.
    if not logger._wandb_init.get("sync_tensorboard"):
        values["trainer/global_step"] = step
    logger.experiment.log(values)


def _prefix(logger: TensorBoardLogger | WandbLogger) -> str:
    if not logger._prefix:
        return ""
    return logger._prefix + logger.LOGGER_JOIN_CHAR
