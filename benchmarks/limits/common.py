"""What the experiments share: how a section looks, and one plain training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clip_callbacks import ClipRule, ParameterTable, clip_step
from examples.char_rnn import read_stdlib

mpl.use("agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Batch = tuple[Tensor, Tensor]

SMALL = 0.1
"""Shares below it are printed with a digit more."""

COLOURS = {
    "unclipped": "black",
    "Fixed": "tab:gray",
    "Quantile": "tab:blue",
    "ZScore": "tab:orange",
    "RobustZScore": "tab:green",
    "Ema": "tab:red",
    "Ratio": "tab:purple",
    "Warmup": "tab:cyan",
}
"""By the beginning of a candidate's name, the same in all pictures."""


@dataclass(frozen=True)
class Section:
    """One experiment's part of the report.

    Args:
        title: Its heading.
        done: What was done.
        tables: In Markdown.
        shown: What it shows.
        draw: Draws the picture.
    """

    title: str
    done: str
    tables: Sequence[str]
    shown: str
    draw: Callable[[], Figure]

    def text(self, picture: Path | None) -> str:
        """In Markdown; draws the picture if a file for it is given."""
        parts = [f"## {self.title}", self.done, *self.tables]
        if picture:
            self.draw().savefig(picture, dpi=110)
            parts.append(f"![{self.title}]({picture.name})")
        return "\n\n".join([*parts, self.shown])


def panels(rows: int, columns: int, *, width: float = 5.0, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure and its plots, row by row."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes: list[Axes] = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes:
        axis.grid(visible=True, alpha=0.3)
    return figure, axes


def colour(name: str) -> str:
    """Of a candidate."""
    return next(value for prefix, value in COLOURS.items() if name.startswith(prefix))


def percent(share: float) -> str:
    """A share with as many digits as it needs."""
    return f"{100 * share:.2g} %" if share < SMALL else f"{100 * share:.0f} %"


def fit(
    model: nn.Module, optimizer: Optimizer, rules: Sequence[ClipRule], batches: Iterable[Batch], loss_of: Callable[[Batch], Tensor]
) -> list[float]:
    """Train on each batch once; steps whose gradients are not finite are skipped, with and without clipping.

    Returns:
        The loss of each batch.
    """
    parameters = ParameterTable(list(model.named_parameters()))
    state, losses = None, []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        _, state = clip_step(parameters, state, rules=rules)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def text() -> tuple[Tensor, Tensor]:
    """The characters of Python's standard library, a part for training and one for validation."""
    train, validation = (torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in read_stdlib(2.0))
    return train, validation


def pieces(characters: Tensor, length: int, count: int, dice: torch.Generator) -> Batch:
    """Pieces from random places, each with the same piece one character later."""
    starts = torch.randint(len(characters) - length, (count, 1), generator=dice)
    found = characters[starts + torch.arange(length + 1)]
    return found[:, :-1], found[:, 1:]
