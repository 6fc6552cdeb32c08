"""A small GPT on real text at high learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.limits.common import Batch, Section, colour, fit, panels, percent, pieces, text
from benchmarks.timing import table
from clip_callbacks import ClipRule, EmaLimit, QuantileLimit, RobustZScoreLimit, WarmupLimit, ZScoreLimit
from examples.char_rnn import SYMBOLS

RULES: dict[str, list[ClipRule]] = {
    "unclipped": [],
    "FixedLimit(1.0)": [ClipRule(1.0)],
    "QuantileLimit(0.1)": [ClipRule(QuantileLimit(0.1))],
    "ZScoreLimit()": [ClipRule(ZScoreLimit())],
    "RobustZScoreLimit()": [ClipRule(RobustZScoreLimit())],
    "WarmupLimit(QuantileLimit(0.1), steps=50, warmup_limit=1.0)": [
        ClipRule(WarmupLimit(QuantileLimit(0.1), steps=50, warmup_limit=1.0))
    ],
    "EmaLimit(), per parameter": [ClipRule(EmaLimit(), "parameter")],
}
WIDTH, CONTEXT, BATCH, WINDOW = 64, 64, 8, 100
RARE, EARLY = 0.02, 20
"""How often a batch is of repeated characters, after so many steps."""
GUESSING = math.log2(SYMBOLS)
"""Bits per character of one who knows nothing."""


SHOWN = (
    "With AdamW no rate here makes the loss spike, and the limits differ little; where some batches are bad, clipping of "
    "any kind helps. SGD at this rate explodes from the first step on: what holds the first steps to a fixed norm survives "
    "it (FixedLimit, the warm-up of EmaLimit, WarmupLimit), while limits that learn from unclipped first norms learn the "
    "explosion."
)


@dataclass(frozen=True)
class Setting:
    """An optimizer, its learning rate, and whether a batch in 50 repeats one to three random characters."""

    optimizer: str
    rate: float
    repeats: bool = False

    def __str__(self) -> str:
        """For a table."""
        return f"{self.optimizer} {self.rate:g}{', repeats' if self.repeats else ''}"


@dataclass(frozen=True)
class Sizes:
    """How much to run."""

    settings: Sequence[Setting]
    seeds: int
    steps: int
    layers: int


FULL = Sizes((Setting("AdamW", 0.01), Setting("AdamW", 0.03), Setting("AdamW", 0.01, repeats=True), Setting("SGD", 1.0)), 3, 500, 2)
QUICK = Sizes((Setting("AdamW", 0.01, repeats=True), Setting("SGD", 1.0)), 1, 8, 1)


class GPT(nn.Module):
    """Predicts the next character with a causal transformer."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, SYMBOLS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def bits(self, batch: Batch) -> Tensor:
        """Bits per character."""
        inputs, targets = batch
        hidden = self.body(self.symbols(inputs) + self.places.weight, mask=self.mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten()) / math.log(2)


@dataclass(frozen=True)
class Run:
    """Losses in bits per character.

    Args:
        ordinary: Of the steps whose batch is real text.
        validation: On other files, at the end.
    """

    ordinary: list[float]
    validation: float

    @property
    def spike_score(self) -> float:
        """Share of ordinary steps whose loss is 6 standard deviations above the mean of the window before, or not finite."""
        each = torch.tensor(self.ordinary, dtype=torch.float64)
        before = each.unfold(0, min(WINDOW, len(each) - 1), 1)[:-1]
        now = each[-len(before) :]
        return float((~(now <= before.mean(1) + 6.0 * before.std(1))).double().mean())


def repeated(dice: torch.Generator) -> Batch:
    """Pieces of one to three random characters over and over."""
    period = int(torch.randint(1, 4, (), generator=dice))
    found = torch.randint(SYMBOLS, (BATCH, period), generator=dice).repeat(1, CONTEXT + 1)
    return found[:, :CONTEXT], found[:, 1 : CONTEXT + 1]


def train(rules: Sequence[ClipRule], setting: Setting, seed: int, sizes: Sizes, characters: Batch) -> Run:
    """Train one network on the same batches whatever the rules."""
    torch.manual_seed(seed)
    model, dice = GPT(sizes.layers), torch.Generator().manual_seed(seed)
    is_odd = (torch.rand(sizes.steps, generator=dice) < RARE) & (torch.arange(sizes.steps) > EARLY) & setting.repeats
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), lr=setting.rate)
        if setting.optimizer == "AdamW"
        else torch.optim.SGD(model.parameters(), lr=setting.rate, momentum=0.9)
    )

    def batches() -> Iterator[Batch]:
        for odd in is_odd.tolist():
            yield repeated(dice) if odd else pieces(characters[0], CONTEXT, BATCH, dice)

    losses = fit(model, optimizer, rules, batches(), model.bits)
    ordinary = [loss for loss, odd in zip(losses, is_odd.tolist(), strict=True) if not odd]
    with torch.no_grad():
        return Run(ordinary, float(model.bits(pieces(characters[1], CONTEXT, 256, torch.Generator().manual_seed(0)))))


Runs = dict[tuple[str, Setting], list[Run]]
"""A run for each seed, by rules and setting."""


def _cell(runs: Sequence[Run]) -> str:
    """Mean spike score and validation loss, unless that is worse than guessing."""
    loss = fmean(run.validation for run in runs)
    return f"{percent(fmean(run.spike_score for run in runs))}, {f'{loss:.2f}' if loss < GUESSING else 'diverged'}"


def _draw(found: Runs, settings: Sequence[Setting]) -> Figure:
    figure, axes = panels(len(settings) // 2, 2, width=5.5, height=3.6)
    for axis, setting in zip(axes, settings, strict=True):
        for name in RULES:
            shortest = min(len(run.ordinary) for run in found[name, setting])
            mean = torch.tensor([run.ordinary[:shortest] for run in found[name, setting]]).mean(0)
            width = min(20, len(mean))
            smooth = mean.unfold(0, width, 1).mean(1)
            axis.plot(torch.arange(len(smooth)) + width, smooth, color=colour(name), label=name, linewidth=1.2)
        axis.set(
            xlabel="step, repeats not counted", ylabel="training loss (bits per character)", ylim=(2.6, 6.0), title=str(setting)
        )
    axes[0].legend(fontsize=7)
    return figure


def section(quick: bool) -> Section:
    """Run it."""
    sizes, characters = QUICK if quick else FULL, text()
    found = {
        (name, setting): [train(rules, setting, seed, sizes, characters) for seed in range(sizes.seeds)]
        for name, rules in RULES.items()
        for setting in sizes.settings
    }
    rows = [[name, *(_cell(found[name, setting]) for setting in sizes.settings)] for name in RULES]
    return Section(
        "(e) A small GPT on real text at high learning rates",
        f"{sizes.layers} layers of width {WIDTH}, {sizes.steps} steps of {BATCH} pieces of {CONTEXT} characters of Python's "
        f"standard library, {sizes.seeds} seeds, no schedule, SGD with momentum 0.9. In the setting with repeats a batch in "
        f"{1 / RARE:.0f} is one to three random characters over and over. SpikeScore (OLMo 2) is the share of ordinary steps whose "
        f"loss is more than 6 standard deviations above the mean of the {WINDOW} before (OLMo 2: 1000), or not finite; beside it "
        "the loss on other files at the end, in bits per character.",
        [table(rows, ["SpikeScore, loss", *map(str, sizes.settings)])],
        SHOWN,
        lambda: _draw(found, sizes.settings),
    )
