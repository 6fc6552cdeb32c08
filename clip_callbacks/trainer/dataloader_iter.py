"""A ``training_step(self, dataloader_iter)``, which draws its batches itself.

Trap: Lightning decides by the name of the argument, and passes hooks of callbacks the previous batch, or None, instead of the
batch that is drawn.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def takes_dataloader_iter(module: LightningModule) -> bool:
    """Return whether Lightning passes the dataloader's iterator to ``training_step``."""
    return "dataloader_iter" in inspect.signature(module.training_step).parameters
