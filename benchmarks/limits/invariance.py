"""One setting under losses of any scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.limits.common import Batch, Section, colour, fit, panels, pieces, text
from benchmarks.timing import table
from clip_callbacks import ClipRule, QuantileLimit
from clip_callbacks.core.limits import FixedLimit, Limit
from examples.char_rnn import SYMBOLS

SCALES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
LIMITS: dict[str, Limit] = {"FixedLimit(0.25)": FixedLimit(0.25), "QuantileLimit(0.1)": QuantileLimit(0.1)}
LAST = 20
"""How many steps the loss at the end is the mean of."""

Curves = dict[tuple[str, str, float], list[float]]
"""Losses by optimizer, limit and scale."""

SHOWN = (
    "With SGD the curves under QuantileLimit coincide but for rounding, while one fixed threshold is no limit at one end "
    "and stops the training at the other. With Adam, which takes out the scale itself, a threshold only decides whether "
    "nearly every step is cut or none; what differs under QuantileLimit comes from Adam's own epsilon and from rounding."
)


@dataclass(frozen=True)
class Sizes:
    """How much to run."""

    steps: int
    hidden: int
    batch: int


FULL, QUICK = Sizes(300, 128, 16), Sizes(8, 16, 4)


class CharacterRNN(nn.Module):
    """Predicts the next character with a vanilla recurrent network."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 32)
        self.rnn = nn.RNN(32, hidden, batch_first=True)
        self.head = nn.Linear(hidden, SYMBOLS)

    def bits(self, batch: Batch) -> Tensor:
        """Bits per character."""
        inputs, targets = batch
        states, _ = self.rnn(self.embedding(inputs))
        return nn.functional.cross_entropy(self.head(states).flatten(0, 1), targets.flatten()) / math.log(2)


def losses(optimizer: str, limit: Limit, scale: float, sizes: Sizes, characters: Tensor) -> list[float]:
    """The training loss, without its scale, step by step."""
    torch.manual_seed(0)
    model, dice = CharacterRNN(sizes.hidden), torch.Generator().manual_seed(0)
    steps: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.5 / scale)
        if optimizer == "SGD"
        else torch.optim.Adam(model.parameters(), lr=0.003)
    )
    batches = (pieces(characters, 64, sizes.batch, dice) for _ in range(sizes.steps))
    return [loss / scale for loss in fit(model, steps, [ClipRule(limit)], batches, lambda batch: scale * model.bits(batch))]


def curves(sizes: Sizes) -> Curves:
    """All of them."""
    characters, _ = text()
    return {
        (optimizer, name, scale): losses(optimizer, limit, scale, sizes, characters)
        for optimizer in ("SGD", "Adam")
        for name, limit in LIMITS.items()
        for scale in SCALES
    }


def at_end(losses: list[float]) -> float:
    """Mean of the last."""
    return fmean(losses[-LAST:])


def spread(found: Curves, optimizer: str, name: str) -> str:
    """The largest difference of any step's losses between scales."""
    each = torch.tensor([found[optimizer, name, scale] for scale in SCALES])
    return f"{float((each.amax(0) - each.amin(0)).max()):.1g}"


def _draw(found: Curves) -> Figure:
    figure, axes = panels(1, 2)
    for axis, optimizer in zip(axes, ("SGD", "Adam"), strict=True):
        for name in LIMITS:
            ends = [at_end(found[optimizer, name, scale]) for scale in SCALES]
            axis.plot(SCALES, ends, marker="o", color=colour(name), label=name)
        rate = "learning rate / scale" if optimizer == "SGD" else "one learning rate"
        axis.set(xscale="log", xlabel="scale of the loss", title=f"{optimizer}, {rate}")
        axis.set_ylabel(f"loss of the last {LAST} steps (bits per character)")
        axis.legend(fontsize=8, loc="upper left")
    lows, highs = zip(*(axis.get_ylim() for axis in axes), strict=True)
    for axis in axes:
        axis.set_ylim(min(lows) - 0.2, max(highs))
    return figure


def section(quick: bool) -> Section:
    """Run it."""
    sizes = QUICK if quick else FULL
    found = curves(sizes)
    rows = [
        [
            f"{optimizer}, {name}",
            *(f"{at_end(found[optimizer, name, scale]):.3f}" for scale in SCALES),
            spread(found, optimizer, name),
        ]
        for optimizer in ("SGD", "Adam")
        for name in LIMITS
    ]
    return Section(
        "(b) One setting for losses of any scale",
        f"A vanilla recurrent network of {sizes.hidden} units on the characters of Python's standard library, {sizes.steps} steps, "
        "the loss multiplied by the scale. SGD has a learning rate of 0.5 / scale, so that unclipped training would be the same at "
        "every scale; Adam, which takes the scale out by itself, has 0.003, as in AutoClip's paper one for all.",
        [table(rows, ["loss at the end, bits", *(f"loss * {scale:g}" for scale in SCALES), "largest spread at any step"])],
        SHOWN,
        lambda: _draw(found),
    )
