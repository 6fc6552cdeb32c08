"""A convolutional network without normalization layers over batch size, with and without AGC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.limits.common import Batch, Section, colour, fit, panels
from benchmarks.timing import table
from clip_callbacks import ClipRule, RatioLimit

RULES: dict[str, list[ClipRule]] = {
    "unclipped": [],
    "FixedLimit(1.0)": [ClipRule(1.0)],
    **{f"RatioLimit({ratio})": [ClipRule(RatioLimit(ratio), "unit", exclude=r"^head\.")] for ratio in (0.02, 0.08)},
}
TRAINED = 1437
"""Four images in five."""
RATE = 0.005
"""Learning rate for each 32 images of a batch."""

Accuracies = dict[tuple[str, int], list[float]]
"""Of each seed, by rules and batch size."""

SHOWN = (
    "Without clipping training fails once batch and learning rate are large; AGC keeps it alive. So does one fixed limit "
    "for all gradients, which on a task this small is no worse than AGC."
)


@dataclass(frozen=True)
class Sizes:
    """How much to run."""

    batches: Sequence[int]
    seeds: int
    epochs: int
    blocks: int


FULL, QUICK = Sizes((32, 128, 512, 1024), 5, 30, 8), Sizes((128, 512), 1, 1, 2)


class Residual(nn.Module):
    """Two convolutions beside the way straight through."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        """Images of the same shape."""
        added: Tensor = self.second(self.first(images.relu()).relu())
        return images + added


class Network(nn.Module):
    """Residual blocks and nothing that normalizes."""

    def __init__(self, blocks: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, stride=2)
        self.body = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.head = nn.Linear(width * 16, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """A score for each digit."""
        scores: Tensor = self.head(self.body(self.stem(images)).flatten(1))
        return scores


def digits(seed: int) -> tuple[Batch, Batch]:
    """scikit-learn's images and what they show, for training and for testing."""
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 8.0 - 1.0
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAINED], order[TRAINED:]
    return (images[train], labels[train]), (images[test], labels[test])


def shuffled(data: Batch, size: int, epochs: int, dice: torch.Generator) -> Iterator[Batch]:
    """Whole batches."""
    images, labels = data
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=dice)
        for chosen in order[: len(order) // size * size].split(size):
            yield images[chosen], labels[chosen]


def accuracy(rules: Sequence[ClipRule], batch: int, seed: int, sizes: Sizes) -> float:
    """Share of test images that are named rightly after training."""
    train, (images, labels) = digits(seed)
    torch.manual_seed(seed)
    model = Network(sizes.blocks)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE * batch / 32, momentum=0.9)
    batches = shuffled(train, batch, sizes.epochs, torch.Generator().manual_seed(seed))
    fit(model, optimizer, rules, batches, lambda pair: nn.functional.cross_entropy(model(pair[0]), pair[1]))
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def _draw(found: Accuracies, sizes: Sizes) -> Figure:
    figure, (axis,) = panels(1, 1, width=6.0)
    for name, style in zip(RULES, ("o-", "s-", "D-", "^:"), strict=True):
        means = [fmean(found[name, batch]) for batch in sizes.batches]
        reach = [
            [mean - min(found[name, batch]), max(found[name, batch]) - mean]
            for mean, batch in zip(means, sizes.batches, strict=True)
        ]
        bars = 100 * torch.tensor(reach).T.clamp(min=0.0)
        axis.errorbar(
            sizes.batches, [100 * mean for mean in means], bars.numpy(), fmt=style, color=colour(name), label=name, capsize=3
        )
    axis.set(
        xscale="log",
        xlabel=f"batch size; learning rate {RATE:g} for each 32 images",
        ylabel="test accuracy: mean, least, largest (%)",
    )
    axis.set_xticks(sizes.batches, [str(batch) for batch in sizes.batches], minor=False)
    axis.minorticks_off()
    axis.legend(fontsize=8, loc="lower left")
    return figure


def section(quick: bool) -> Section:
    """Run it."""
    sizes = QUICK if quick else FULL
    found = {
        (name, batch): [accuracy(rules, batch, seed, sizes) for seed in range(sizes.seeds)]
        for name, rules in RULES.items()
        for batch in sizes.batches
    }
    rows = [[name, *(_cell(found[name, batch]) for batch in sizes.batches)] for name in RULES]
    return Section(
        "(d) A convolutional network without normalization",
        f"{2 * sizes.blocks + 1} convolutions with residual connections and nothing that normalizes, on scikit-learn's digits: "
        f"{sizes.epochs} epochs of SGD with momentum 0.9, the learning rate {RATE:g} · batch / 32, {sizes.seeds} seeds. RatioLimit "
        'is AGC: `ClipRule(RatioLimit(ratio), "unit", exclude=r"^head\\.")`; FixedLimit clips all gradients together.',
        [table(rows, ["test accuracy: mean (least to largest)", *(f"batch {batch}" for batch in sizes.batches)])],
        SHOWN,
        lambda: _draw(found, sizes),
    )


def _cell(each: Sequence[float]) -> str:
    return f"{100 * fmean(each):.1f} ({100 * min(each):.1f} to {100 * max(each):.1f})"
