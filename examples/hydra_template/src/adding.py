"""The adding problem: a recurrent network learns to add up the two marked ones of many numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class AddingData(LightningDataModule):
    def __init__(self, length: int, batch_size: int, train_batches: int) -> None:
        super().__init__()
        self.length, self.batch_size, self.train_batches = length, batch_size, train_batches

    def loader(self, batches: int, seed: int) -> DataLoader:
        """Return sequences of (number, mark), and the sums of the marked numbers."""
        generator, shape = torch.Generator().manual_seed(seed), (batches * self.batch_size, self.length)
        numbers = torch.rand(shape, generator=generator)
        marks = torch.zeros(shape).scatter_(1, torch.rand(shape, generator=generator).topk(2).indices, 1.0)
        data = TensorDataset(torch.stack([numbers, marks], -1), (numbers * marks).sum(1))
        return DataLoader(data, batch_size=self.batch_size)

    def train_dataloader(self) -> DataLoader:
        return self.loader(self.train_batches, seed=1)

    def val_dataloader(self) -> DataLoader:
        return self.loader(4, seed=2)


class Adder(LightningModule):
    def __init__(self, cell: Callable[..., nn.Module], hidden: int, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.encoder, self.head = cell(input_size=2, hidden_size=hidden), nn.Linear(hidden, 1)
        self.make_optimizer = optimizer

    def loss(self, batch: list[Tensor]) -> Tensor:
        sequences, sums = batch
        return nn.functional.mse_loss(self.head(self.encoder(sequences)[0][:, -1]).squeeze(-1), sums)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(params=self.parameters())
