"""Searches for the learning rate in a fit that has begun, which restore a checkpoint in mid-fit."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import LearningRateFinder

from tests.helpers.training import Regression


class Later(LearningRateFinder):
    """Searches when training has begun, or before the second epoch, where Lightning 2.6 tries one rate at most."""

    epoch = 0

    def on_fit_start(self, *_: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.lr_find(trainer, pl_module)


class InEpochOne(Later):
    epoch = 1


class OfAnyRate(Regression):
    """Takes the rate that a search has found."""

    lr = 0.01

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)
