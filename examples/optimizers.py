"""What effect do clipping, the scale of a gradient, and a bad batch have on SGD, momentum, Adagrad, RMSprop and Adam?

    python examples/optimizers.py            # a table, and logs/optimizers/scales.png, in half a minute
    python examples/optimizers.py --quick    # seconds

A classifier of handwritten digits (scikit-learn's) is trained with its loss, with a tenth of it, and with ten times it. SGD moves a
tenth or, at first, ten times as far; Adam, RMSprop and Adagrad divide by the size of past gradients, and their path hardly changes.
So a constant clip_coef slows SGD as a smaller learning rate would, and has no effect on Adam, for which clipping only helps against
outliers. A threshold below every norm removes the influence of the scale on every optimizer. At last one batch of each run has a
NaN loss: with the guard every optimizer ends with the bits of a run in which that batch was never drawn.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from scaffold import BLUE, ORANGE, RED, command_line, quiet_trainer, save, sheet, start
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from clip_callbacks import GradientClipping, NonFiniteGuard

Batch = tuple[Tensor, Tensor]
ALWAYS = 1e-3
"""A max_norm below every norm of this example, at every scale."""


class Way(NamedTuple):
    """An optimizer with its options, and the size of its batches."""

    make: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]
    batch_size: int = 64


WAYS = {
    "SGD, whole set": Way(torch.optim.SGD, {"lr": 0.1}, 1280),
    "SGD, mini-batches": Way(torch.optim.SGD, {"lr": 0.1}),
    "momentum": Way(torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    "Adagrad": Way(torch.optim.Adagrad, {"lr": 0.02}),
    "RMSprop": Way(torch.optim.RMSprop, {"lr": 0.002}),
    "Adam": Way(torch.optim.Adam, {"lr": 0.002}),
}


class Classifier(LightningModule):
    """A classifier whose loss is multiplied by ``scale``, and is NaN for batch number ``poisoned``."""

    def __init__(self, way: Way, scale: float = 1.0, poisoned: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        self.way, self.scale, self.poisoned, self.losses = way, scale, poisoned, []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss * (math.nan if batch_idx == self.poisoned else self.scale)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.way.make(self.parameters(), **self.way.options)


def batches(way: Way, steps: int) -> list[Batch]:
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.as_tensor(images, dtype=torch.float32)[:1280] / 16, torch.as_tensor(labels)[:1280]
    pieces = list(zip(inputs.split(way.batch_size), targets.split(way.batch_size), strict=True))
    return [pieces[step % len(pieces)] for step in range(steps)]


class Run(NamedTuple):
    losses: list[float]
    start: Tensor
    end: Tensor
    skipped: int


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).clone()


def train(way: Way, data: list[Batch], *, max_norm: float | None = None, scale: float = 1.0, poisoned: int | None = None) -> Run:
    module, guard = Classifier(way, scale, poisoned), NonFiniteGuard()
    start = flat(module)
    quiet_trainer(GradientClipping(max_norm), guard, max_epochs=1).fit(module, DataLoader(data, batch_size=None))
    return Run(module.losses, start, flat(module), guard.skipped_steps)


def path_ratio(run: Run, reference: Run) -> float:
    """Return the distance that the weights moved, as a multiple of the distance in the reference."""
    return float((run.end - run.start).norm() / (reference.end - reference.start).norm())


def compare(way: Way, steps: int) -> tuple[dict[str, Any], dict[float, Run]]:
    """Return the row of one optimizer in the table, and its runs by scale."""
    data = batches(way, steps)
    runs = {scale: train(way, data, scale=scale) for scale in (0.1, 1.0, 10.0)}
    clipped = {scale: train(way, data, max_norm=ALWAYS, scale=scale) for scale in (1.0, 10.0)}
    bad = steps // 2
    poisoned = train(way, data, max_norm=1.0, poisoned=bad)
    without = train(way, data[:bad] + data[bad + 1 :], max_norm=1.0)
    return {
        "last loss": runs[1.0].losses[-1],
        "x 0.1": path_ratio(runs[0.1], runs[1.0]),
        "x 10": path_ratio(runs[10.0], runs[1.0]),
        "clipped, x 10 / x 1": path_ratio(clipped[10.0], clipped[1.0]),
        "clipped / unclipped": path_ratio(clipped[1.0], runs[1.0]),
        "skipped": poisoned.skipped,
        "as if never drawn": torch.equal(poisoned.end, without.end),
    }, runs


def picture(found: dict[str, dict[float, Run]]):
    figure, axes = sheet(columns=3, rows=2, size=(4.0, 3.0))
    for axis, (name, runs) in zip(axes, found.items(), strict=True):
        for (scale, run), color, style in zip(runs.items(), (ORANGE, BLUE, RED), ("-", "-", "--"), strict=True):
            axis.semilogy(run.losses, style, color=color, linewidth=1.2, label=f"gradient times {scale:g}")
        axis.set(title=name, xlabel="optimizer step", ylabel="loss (nats, log scale)", ylim=(1e-2, 5))
        axis.legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    arguments = start(command_line(__doc__, "optimizers"), argv)
    warnings.filterwarnings("ignore", "Non-finite gradients")  # they are injected on purpose
    found = {name: compare(way, 20 if arguments.quick else 200) for name, way in WAYS.items()}
    print("Distance of the weights from their start, with a scaled or clipped gradient, as a multiple of that without")
    print(tabulate([{"optimizer": name, **row} for name, (row, _) in found.items()], headers="keys", floatfmt=".3f"))
    save(picture({name: runs for name, (_, runs) in found.items()}), arguments.output / "scales.png")


if __name__ == "__main__":
    main()
