"""Compare plain accumulation with accumulation weighted by tokens, for a small language model on padded lines of Python source.

Micro-batches contain lines of similar length, so that little is padded, and therefore hold from a hundred to some thousand
characters. Plain accumulation gives the mean loss of each micro-batch the same weight, and so gives a character of a short line
many times the weight of a character of a long one. One callback corrects this:

python examples/token_weighted.py --steps 360 --picture token_weighted.png
"""

from __future__ import annotations

import argparse
import math
import random
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from char_rnn import SYMBOLS, read_stdlib
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from clip_callbacks import AccumulationRescaling, GradientClipping, LabelTokens

mpl.use("agg")
from matplotlib import pyplot as plt

IGNORED, LINES, WINDOW, END = -100, 32, 8, 10
"""Label of padding; lines in a micro-batch; micro-batches in a window; code of the character that ends a line."""

Batch = dict[str, Tensor]


def micro_batches(text: bytes, most: int, seed: int) -> list[Batch]:
    """Return micro-batches of lines of similar length, in random order."""
    lines = sorted((line.strip()[:240] for line in text.splitlines() if len(line.strip()) > 1), key=len)
    groups = [lines[start : start + LINES] for start in range(0, len(lines) - LINES + 1, LINES)]
    random.Random(seed).shuffle(groups)
    return [padded(group) for group in groups[:most]]


def padded(lines: list[bytes]) -> Batch:
    """Return inputs, and labels one character later; the loss ignores padding."""
    rows = [torch.tensor([END, *line, END]) for line in lines]
    inputs = pad_sequence([row[:-1] for row in rows], batch_first=True)
    labels = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=IGNORED)
    return {"inputs": inputs, "labels": labels}


class LineModel(LightningModule):
    """A GRU that predicts the next character. It does not know that micro-batches are weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(SYMBOLS, 48), nn.GRU(48, 160, batch_first=True), nn.Linear(160, SYMBOLS)
        self.validated: list[tuple[int, float]] = []

    def bits(self, batch: Batch) -> Tensor:
        """Return the mean loss in bits over the characters that are not padding."""
        logits = self.head(self.rnn(self.embedding(batch["inputs"]))[0])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED) / math.log(2)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.bits(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_bits", self.bits(batch), batch_size=int((batch["labels"] != IGNORED).sum()))

    def on_validation_epoch_end(self) -> None:
        self.validated.append((self.trainer.global_step, float(self.trainer.callback_metrics["val_bits"])))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=4e-3)


def run(rescaling: Callback, train: list[Batch], validation: list[Batch], steps: int) -> list[tuple[int, float]]:
    """Train, and return the validation loss over optimizer steps."""
    seed_everything(0, verbose=False)
    module = LineModel()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=WINDOW,
        callbacks=[rescaling, GradientClipping(1.0)],
        val_check_interval=max(1, steps // 12) * WINDOW,
        check_val_every_n_epoch=None,
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    loaders: list[Any] = [DataLoader(batches, batch_size=None) for batches in (train, validation)]  # type: ignore[arg-type]
    trainer.fit(module, *loaders)
    return [(step, bits) for step, bits in module.validated if step]


def draw(curves: dict[str, list[tuple[int, float]]], tokens: list[int], file: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", width_ratios=(3, 2))
    for (name, curve), color in zip(curves.items(), ("#d1495b", "#00798c"), strict=True):
        left.plot(*zip(*curve, strict=True), marker="o", markersize=3, color=color, label=f"{name}: ends at {curve[-1][1]:.3f}")
    left.set(
        xlabel="optimizer step", ylabel="validation loss (bits per character)", title="Micro-batches weighted equally or by tokens"
    )
    left.legend()
    right.hist(tokens, bins=40, color="#66a182")
    right.set(xlabel="characters in a micro-batch", ylabel="number of micro-batches", title="Sizes of the micro-batches")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    train_text, validation_text = read_stdlib(3.0)
    train = micro_batches(train_text, most=arguments.steps * WINDOW, seed=0)
    validation = micro_batches(validation_text, most=40, seed=1)
    tokens = [int((batch["labels"] != IGNORED).sum()) for batch in train]
    print(f"{len(train)} micro-batches of {min(tokens)} to {max(tokens)} characters")
    curves = {
        "plain": run(AccumulationRescaling(), train, validation, arguments.steps),
        "LabelTokens": run(AccumulationRescaling(LabelTokens("labels", IGNORED)), train, validation, arguments.steps),
    }
    for name, curve in curves.items():
        print(f"{name}: {curve[-1][1]:.3f} bits per character in validation")
    if arguments.picture:
        draw(curves, tokens, arguments.picture)


if __name__ == "__main__":
    main()
