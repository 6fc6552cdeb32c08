"""A ``training_step`` that draws its batches itself: what hooks of callbacks are given then is the batch before, or None."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def takes_dataloader_iter(module: LightningModule) -> bool:
    """Whether Lightning hands the dataloader's iterator to ``training_step``, by the name of its argument."""
    return "dataloader_iter" in inspect.signature(module.training_step).parameters
