"""A character-level recurrent language model on the source text of Python's standard library, with LightningCLI.

python examples/char_rnn.py fit --config configs/char_rnn.yaml
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import clip_callbacks  # noqa: F401  (makes the short names of its callbacks known to the CLI)

SYMBOLS = 128
"""Number of ASCII characters; every other character becomes a question mark."""
PADDING = 0
"""Code of a character that no source text contains."""


def read_stdlib(megabytes: float) -> tuple[bytes, bytes]:
    """Return the source text of the standard library in use, split by file: about one file in ten is for validation."""
    train, validation = bytearray(), bytearray()
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = [path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)]
    for path in sorted(files, key=lambda path: digest(path.relative_to(root))):
        text = path.read_text(encoding="utf-8", errors="replace").encode("ascii", errors="replace")
        (validation if digest(path.relative_to(root)) % 10 == 0 else train).extend(text)
        if len(train) + len(validation) >= megabytes * 1e6:
            break
    return bytes(train), bytes(validation)


def digest(path: Path) -> int:
    return int.from_bytes(hashlib.sha256(path.as_posix().encode()).digest()[:4], "big")


class Chunks(Dataset[tuple[Tensor, Tensor]]):
    """Pieces of a text, each with its targets one character later; ``blank`` of them hold nothing but padding."""

    def __init__(self, text: bytes, length: int, blank: int = 0) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.length = length
        # drawn from a generator of its own, so that blank pieces change no other random number
        self.blank = set(torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:blank].tolist())

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.length
        piece = self.text[start : start + self.length + 1]
        if index in self.blank:
            piece = torch.full_like(piece, PADDING)
        return piece[:-1], piece[1:]


class StdlibText(LightningDataModule):
    """The standard library's source text in pieces.

    Args:
        megabytes: Size of the text to read, in megabytes.
        length: Number of characters in a piece.
        batch_size: Number of pieces in a batch.
        validation_batches: Number of batches to validate on.
        poison: Share of training batches that contain a blank piece, for which the model divides by zero.
    """

    def __init__(
        self,
        megabytes: float = 4.0,
        length: int = 128,
        batch_size: int = 32,
        validation_batches: int = 20,
        poison: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        train, validation = read_stdlib(self.hparams.megabytes)
        pieces = len(train) // self.hparams.length
        self.train = Chunks(train, self.hparams.length, blank=round(self.hparams.poison * pieces / self.hparams.batch_size))
        pieces = Chunks(validation, self.hparams.length)
        wanted = self.hparams.validation_batches * self.hparams.batch_size
        self.validation = torch.utils.data.Subset(pieces, range(min(wanted, len(pieces))))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.validation, batch_size=self.hparams.batch_size)


class PaddingScale(nn.Module):
    """Divides each piece by its share of characters that are not padding. The fault: a blank piece divides by zero."""

    def forward(self, embedded: Tensor, characters: Tensor) -> Tensor:
        return embedded / (characters != PADDING).float().mean(dim=1)[:, None, None]


class CharRNN(LightningModule):
    """A network that predicts the next character; its loss is in bits per character.

    Args:
        cell: Kind of recurrent network: "RNN_TANH", "RNN_RELU", "GRU" or "LSTM".
        hidden: Width of the hidden state.
        layers: Number of layers.
        learning_rate: Learning rate of SGD with momentum 0.9; it falls to a fifth along a cosine, step by step.
    """

    def __init__(self, cell: str = "RNN_TANH", hidden: int = 256, layers: int = 1, learning_rate: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()
        kind, _, nonlinearity = cell.partition("_")
        options = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
        self.embedding = nn.Embedding(SYMBOLS, 64)
        self.padding = PaddingScale()
        self.rnn = getattr(nn, kind)(64, hidden, layers, batch_first=True, **options)
        self.head = nn.Linear(hidden, SYMBOLS)

    def bits(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss in bits per character."""
        inputs, targets = batch
        states, _ = self.rnn(self.padding(self.embedding(inputs), inputs))
        return nn.functional.cross_entropy(self.head(states).flatten(0, 1), targets.flatten()) / math.log(2)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.bits(batch)
        self.log("train_bits", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_bits", self.bits(batch), prog_bar=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_steps, self.hparams.learning_rate / 5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class CLI(LightningCLI):
    """LightningCLI with ``--poison``, short for ``--data.poison``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--poison", type=float, default=0.0, help="share of training batches with a blank piece, which makes NaN"
        )
        parser.link_arguments("poison", "data.poison")


if __name__ == "__main__":
    CLI(CharRNN, StdlibText, save_config_kwargs={"overwrite": True})
