"""What do global norms, local norms, both in turn, and clamping do to the gradients beside an exploding one?

    python examples/global_and_local.py             # tables, two pictures, TensorBoard logs; half a minute
    python examples/global_and_local.py --quick     # seconds
    python examples/global_and_local.py --dropout 0.2 --l1 1e-4 --l2 1e-3
    tensorboard --logdir logs/global_and_local      # tab Custom Scalars: the norms of all runs

The first part multiplies the gradient of one parameter of a recurrent network by a thousand. Clipping the global norm keeps the
direction, but shrinks the gradients of all other parameters to almost nothing. Clipping local norms leaves the others alone, but
changes the direction.

The second part trains the network (10 -> 20 -> 5, sequences of 20, batches of 32, Adam with 0.01, clipping at 0.5) with one bad
batch in twenty, and writes its norms to TensorBoard. Without clipping the network ends worse than it began; with clipped norms it
learns. "Global, then local" limits each parameter to an eighth of the global limit. The unclipped run also counts the steps that
other values of max_norm would have clipped: too small a value slows training, too large a value has no effect. Penalties are part
of the loss, and therefore of every norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from scaffold import BLUE, GREEN, GREY, ORANGE, RED, command_line, quiet_trainer, save, sheet, start
from tabulate import tabulate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clip_callbacks import ClipRule, GradientClipping, GradientNormMonitor, clip_step

THRESHOLD, OUTLIER, TIMES = 0.5, "rnn.weight_hh_l0", 1000.0
SPOILT = 50.0
"""Error above which a batch is a bad one; the errors of all other batches are below it."""
WAYS: dict[str, dict[str, Any]] = {
    "none": {"max_norm": None, "shadow": [0.5, 1.0, 2.0, 5.0, 10.0, 100.0]},
    "global": {"max_norm": THRESHOLD},
    "local": {"max_norm": THRESHOLD, "scope": "parameter"},
    "global, then local": {"rules": [ClipRule(THRESHOLD), ClipRule(THRESHOLD / 8, "parameter")]},
    "value": {"max_norm": None, "clip_value": THRESHOLD},
}
COLORS = dict(zip(WAYS, (GREY, RED, BLUE, GREEN, ORANGE), strict=True))


class SimpleRNN(LightningModule):
    """Maps a sequence to five numbers."""

    def __init__(self, dropout: float = 0.0, l1: float = 0.0, l2: float = 0.0) -> None:
        super().__init__()
        self.rnn, self.dropout, self.fc = nn.RNN(10, 20, batch_first=True), nn.Dropout(dropout), nn.Linear(20, 5)
        self.l1, self.l2 = l1, l2

    def forward(self, sequences: Tensor) -> Tensor:
        return self.fc(self.dropout(self.rnn(sequences)[0][:, -1]))

    def penalty(self) -> Tensor:
        sums = [self.l1 * parameter.abs().sum() + self.l2 * parameter.square().sum() for parameter in self.parameters()]
        return torch.stack(sums).sum()

    def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
        error = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_error", error)
        return error + self.penalty()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def sequences(batches: int) -> TensorDataset:
    """Return noise, with five signed sums of the last five steps as targets, of variance 1; 30 times as large in bad batches."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32 * batches, 20, 10, generator=generator)
    targets = inputs[:, -5:].sum(1) @ torch.randn(10, 5, generator=generator).sign() / 50**0.5
    sizes = torch.where(torch.arange(batches) % 20 == 5, 30.0, 1.0).repeat_interleave(32)
    return TensorDataset(inputs, targets * sizes[:, None])


def train(way: str, steps: int, folder: Path, **regularization: float) -> dict[str, float]:
    """Train with one kind of clipping and the norms in TensorBoard; return the metrics at the end."""
    seed_everything(0, verbose=False)
    for file in folder.glob("events.*"):  # of an earlier run
        file.unlink()
    module, logger = SimpleRNN(**regularization), TensorBoardLogger(folder, name="", version="")
    callbacks = GradientClipping(**WAYS[way]), GradientNormMonitor("parameter", log_contributions=True)
    trainer = quiet_trainer(*callbacks, max_epochs=4, logger=logger, log_every_n_steps=1)
    trainer.fit(module, DataLoader(sequences(-(-steps // 4)), batch_size=32))
    logger.finalize("success")
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def curve(folder: Path, metric: str) -> list[tuple[int, float]]:
    """Read a metric over steps from TensorBoard's files."""
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(metric)]


def shrinking(way: str) -> tuple[dict[str, float], float]:
    """Return each parameter's norm after clipping / before, beside an exploding one, and the cosine between both gradients."""
    torch.manual_seed(0)
    module = SimpleRNN()
    inputs, targets = sequences(1).tensors
    nn.functional.mse_loss(module(inputs), targets).backward()
    module.get_parameter(OUTLIER).grad *= TIMES
    before = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    clipping = GradientClipping(**WAYS[way])
    clip_step(module.named_parameters(), rules=clipping.rules, clip_value=clipping.clip_value)
    after = {name: parameter.grad for name, parameter in module.named_parameters()}
    both = [torch.cat([gradient.flatten() for gradient in each.values()]).double() for each in (before, after)]
    return {name: float(after[name].norm() / before[name].norm()) for name in before}, float(torch.cosine_similarity(*both, dim=0))


def shrinking_picture(factors: dict[str, dict[str, float]]):
    figure, (axis,) = sheet(size=(10.5, 4.2))
    for place, (way, each) in enumerate(factors.items()):
        axis.bar([x + 0.2 * (place - 1.5) for x in range(len(each))], each.values(), 0.2, color=COLORS[way], label=way)
    names = [f"{name}\ntimes {TIMES:g}" if name == OUTLIER else name for name in each]
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set(yscale="log", xlabel="parameter", ylabel="norm after / before clipping (log scale)")
    axis.set_title("Remaining share of each gradient when that of one parameter explodes")
    figure.legend(title="kind of clipping", loc="outside right upper")
    return figure


def training_picture(folders: dict[str, Path]):
    figure, axes = sheet(columns=3, size=(4.4, 3.8))
    metrics = ("train_error", "grad/total_norm", "grad/clipped_norm")
    labels = ("mean squared error", "total_norm before clipping", "norm after max_norm, before clip_value")
    for axis, metric, label in zip(axes, metrics, labels, strict=True):
        for way, folder in folders.items():
            steps, values = zip(*curve(folder, metric), strict=True)
            shown = [value if metric != "train_error" or value < SPOILT else math.nan for value in values]
            axis.plot(steps, shown, color=COLORS[way], linewidth=1, label=way)
        axis.set(xlabel="optimizer step", ylabel=f"{label}\n(log scale)", yscale="log")
    axes[0].set_title("Error without the spoilt batches")
    figure.legend(*axes[0].get_legend_handles_labels(), title="kind of clipping", loc="outside right upper")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, "global_and_local")
    for option, text in (("dropout", "share of states dropped"), ("l1", "factor of sum |w| in the loss"), ("l2", "of sum w²")):
        parser.add_argument(f"--{option}", type=float, default=0.0, help=text)
    arguments = start(parser, argv)
    found = {way: shrinking(way) for way in WAYS if way != "none"}
    rows = [(way, *factors.values(), cosine) for way, (factors, cosine) in found.items()]
    print(f"{OUTLIER} x {TIMES:g}: norm after clipping / norm before, and the cosine between both gradients")
    print(tabulate(rows, ("clipping", *found["global"][0], "cosine"), floatfmt=".5f"), end="\n\n")
    save(shrinking_picture({way: factors for way, (factors, _) in found.items()}), arguments.output / "outlier.png")

    regularization = {option: getattr(arguments, option) for option in ("dropout", "l1", "l2")}
    folders = {way: arguments.output / way.replace(", ", "_").replace(" ", "_") for way in WAYS}
    ends = {way: train(way, 40 if arguments.quick else 400, folder, **regularization) for way, folder in folders.items()}
    rows = [(way, end["train_error"], end.get("grad/clip_fraction_epoch", 0.0)) for way, end in ends.items()]
    print(tabulate(rows, ("clipping", "squared error, last batch", "clipped steps, last epoch"), floatfmt=".3f"), end="\n\n")
    shadows = {name.rpartition("/")[2]: share for name, share in ends["none"].items() if "shadow_clip_fraction_epoch" in name}
    print("Unclipped run, last epoch: share of steps that a global max_norm would have clipped")
    print(tabulate(shadows.items(), ("max_norm", "clipped steps"), floatfmt=".3f", disable_numparse=[0]), end="\n\n")
    save(training_picture(folders), arguments.output / "training.png")


if __name__ == "__main__":
    main()
