"""A ``training_step`` that draws its batches itself: what hooks of callbacks are given then is the batch before, or None."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature


def takes_dataloader_iter(module: LightningModule) -> bool:
    """Whether Lightning hands the dataloader's iterator to ``training_step``, by the name of its argument."""
    return is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True)
