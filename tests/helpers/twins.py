"""The two names of one Lightning, and a small network for each."""

from __future__ import annotations

import math

import lightning.pytorch
import pytorch_lightning
import torch
from torch import nn

TWINS = {"lightning": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
QUIET = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")


def regression(package, poisoned=()):
    """A small network, a module of that package; the losses of chosen batches are NaN."""

    class Regression(package.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

        def training_step(self, batch, batch_idx):
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            return loss * math.nan if batch_idx in poisoned else loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    return Regression()
