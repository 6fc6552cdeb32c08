"""The stored micro-batches as a data loader of a Trainer, unchanged by transfer hooks and in the precision of the replay."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

_BATCH_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
"""Dtypes to which a Trainer converts the floating-point tensors of a batch, by precision; float32 stays with all others."""


class StoredBatches:
    """A data loader that yields a copy of each stored batch, and sets the number of the batch in the Trainer's loop.

    Args:
        rows: The micro-batches of the bundle.
        trainer: The Trainer that takes the batches.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], trainer: Trainer) -> None:
        self._rows, self._trainer = rows, trainer

    def __len__(self) -> int:
        """Return the number of micro-batches."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the batches."""
        progress = self._trainer.fit_loop.epoch_loop.batch_progress
        for row in self._rows:
            for tracker in (progress.current, progress.total):
                set_tracker(tracker, row["batch_idx"])
            yield copy.deepcopy(row["batch"])  # a step may change its batch in place


def disable_transfer_hooks(module: LightningModule) -> None:
    """Replace the module's hooks around the transfer of a batch: they ran before the batch was stored, and must not run twice."""

    def unchanged(batch: Any, dataloader_idx: int) -> Any:
        return batch

    module.on_before_batch_transfer = unchanged  # type: ignore[method-assign]
    module.on_after_batch_transfer = unchanged  # type: ignore[method-assign]


def convert_batch(row: dict[str, Any], recorded_precision: str, precision: str) -> dict[str, Any]:
    """Return a micro-batch whose floating-point tensors have the dtype that the precision of the replay asks for.

    Args:
        row: The micro-batch, with the dtype of the run's precision.
        recorded_precision: Precision of the run.
        precision: Precision of the replay.
    """
    before, after = (_BATCH_DTYPES.get(name, torch.float32) for name in (recorded_precision, precision))
    if before is after:
        return row

    def converted(tensor: Tensor) -> Tensor:
        return tensor.to(after) if tensor.dtype is before else tensor

    return row | {"batch": apply_to_collection(row["batch"], Tensor, converted)}


def set_tracker(tracker: Any, count: int) -> None:
    """Set all counters of a progress tracker of a loop.

    Args:
        tracker: The progress tracker.
        count: Number of batches, epochs or steps that shall count as done.
    """
    for stage in vars(tracker):
        setattr(tracker, stage, count)
