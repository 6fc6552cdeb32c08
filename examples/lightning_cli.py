"""A classifier of handwritten digits under LightningCLI: clipping, guard and metrics come from YAML, or from the command line.

python examples/lightning_cli.py fit --config configs/lightning_cli.yaml
python examples/lightning_cli.py fit --config configs/lightning_cli.yaml --trainer.callbacks.max_norm=0.5
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import clip_callbacks  # noqa: F401  (so that the CLI knows its callbacks by their short names)


class Digits(LightningDataModule):
    """Images of digits, 8 x 8 pixels, that come with scikit-learn.

    Args:
        batch_size: Number of images in a batch.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        digits = load_digits()
        everything = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
        self.train, self.validation = random_split(everything, [0.8, 0.2], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.validation, self.batch_size)


class Classifier(LightningModule):
    """A network with one hidden layer.

    Args:
        hidden: Width of the hidden layer.
        learning_rate: Learning rate of AdamW.
    """

    def __init__(self, hidden: int = 64, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", (self.net(batch[0]).argmax(dim=1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


if __name__ == "__main__":
    LightningCLI(Classifier, Digits, seed_everything_default=0, save_config_kwargs={"overwrite": True})
