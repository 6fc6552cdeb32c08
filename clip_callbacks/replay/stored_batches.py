"""Stored batches, as a Trainer takes them from a data loader, and a module leaves them as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
"""What a Trainer makes of the numbers in a batch."""


class StoredBatches:
    """A data loader; the loop takes the next batch's number from its progress, which is set just before.

    Args:
        rows: The micro-batches.
        trainer: Which takes them.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], trainer: Trainer) -> None:
        self._rows, self._trainer = rows, trainer

    def __len__(self) -> int:
        """How many there are."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Any]:
        """Each batch, as a copy."""
        progress = self._trainer.fit_loop.epoch_loop.batch_progress
        for row in self._rows:
            for tracker in (progress.current, progress.total):
                set_tracker(tracker, row["batch_idx"])
            yield copy.deepcopy(row["batch"])  # steps may change a batch in place


def leave_batches_alone(module: LightningModule) -> None:
    """What makes a batch what training_step gets is not done twice.

    Args:
        module: Whose hooks would.
    """

    def as_is(batch: Any, dataloader_idx: int) -> Any:
        return batch

    module.on_before_batch_transfer = as_is  # type: ignore[method-assign]
    module.on_after_batch_transfer = as_is  # type: ignore[method-assign]


def as_precise(row: dict[str, Any], had: str, wanted: str) -> dict[str, Any]:
    """A micro-batch whose numbers a run in half precision has rounded goes to a full one as they are.

    Args:
        row: The micro-batch.
        had: Precision of the run.
        wanted: Precision of the replay.
    """
    before, now = (_DTYPES.get(precision, torch.float32) for precision in (had, wanted))
    if before is now:
        return row
    cast = partial(_as_dtype, had=before, wanted=now)
    return row | {"batch": apply_to_collection(row["batch"], Tensor, cast)}


def _as_dtype(tensor: Tensor, had: torch.dtype, wanted: torch.dtype) -> Tensor:
    return tensor.to(wanted) if tensor.dtype is had else tensor


def set_tracker(tracker: Any, count: int) -> None:
    """Let a loop believe that so many are done.

    Args:
        tracker: Of the loop.
        count: How many.
    """
    for stage in vars(tracker):
        setattr(tracker, stage, count)
