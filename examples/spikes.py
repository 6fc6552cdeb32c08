"""What helps against loss spikes? A small GPT at a high learning rate, with the targets of one batch in 200 shuffled.

    python examples/spikes.py            # two tables, and two pictures in logs/spikes; seven minutes on one core
    python examples/spikes.py --quick    # seconds

The GPT reads the source text of Python's standard library, character by character, and is trained with AdamW. Its learning rate is
too high for this network, so that steps on bad batches do harm. Each method is trained with the same seeds and the same batches,
and one more run for each seed has no poisoned batch: it shows what there is to gain. The first table says how much the loss rises
after poisoned batches, how many of them each method skips, and how many healthy ones; the second one what other thresholds would
have found.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

import torch
from char_rnn import SYMBOLS, read_stdlib
from lightning.pytorch import Callback, LightningModule
from matplotlib.figure import Figure
from scaffold import BLUE, GREEN, GREY, ORANGE, RED, command_line, quiet_trainer, save, sheet, start
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from clip_callbacks import BlockNorms, GradientClipping, Limit, NonFiniteGuard, RobustZScoreLimit, Rollback

Batch = tuple[Tensor, Tensor]
Watched = GradientClipping | NonFiniteGuard
CONTEXT, PIECES, HEADS = 32, 16, 4
"""Characters in a piece of text, pieces in a batch, heads of attention."""
RATE, WARMUP, DECAY = 0.03, 50, 0.2
"""Learning rate of AdamW, number of steps in which it rises to that, and share of the steps at the end in which it falls to 0."""
EVERY, AFTER = 200, 10
"""Number of batches of which one is poisoned, and number of steps before and after it that its damage is measured in."""

NORM_LIMIT = RobustZScoreLimit(z=4.0)
LOSS_LIMIT = RobustZScoreLimit(z=4.0, floor=0.01, scale="linear")
METHODS: dict[str, Callable[[], Watched]] = {
    "nothing": lambda: GradientClipping(None),  # measures the norm, and changes nothing
    "clip": lambda: GradientClipping(1.0),
    "skip by norm": lambda: NonFiniteGuard(skip_above=NORM_LIMIT),
    "skip by loss": lambda: NonFiniteGuard(loss_above=LOSS_LIMIT),
    "skip by both": lambda: NonFiniteGuard(skip_above=NORM_LIMIT, loss_above=LOSS_LIMIT, both=True),
    "rollback": lambda: NonFiniteGuard(
        loss_above=LOSS_LIMIT, max_consecutive=1, rollback=Rollback(every_n_steps=50, max_rollbacks=1000)
    ),
}
CLEAN = "no poison"
COLORS = dict(zip([*METHODS, CLEAN], (RED, ORANGE, GREEN, BLUE, "#8f5fbf", "#9c6b4f", GREY), strict=True))


class Sizes(NamedTuple):
    """Sizes of the network and of the comparison."""

    layers: int
    width: int
    steps: int
    seeds: int


FULL, QUICK = Sizes(layers=2, width=48, steps=800, seeds=3), Sizes(layers=1, width=32, steps=60, seeds=1)


class Block(nn.Module):
    """One layer of the GPT: causal attention and a perceptron, each behind a LayerNorm and beside a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(self.attention_norm(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class GPT(LightningModule):
    """A language model of characters that keeps the loss of each step, in nats per character."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(SYMBOLS, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, SYMBOLS)
        self.losses: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.blocks(self.characters(inputs) + self.places.weight))

    def loss(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Steps(Callback):
    """The total norm of each step, and whether it was skipped."""

    def __init__(self, watched: Watched) -> None:
        self.watched, self.norms, self.skipped = watched, [], []

    def on_train_batch_end(self, *_: object) -> None:
        report = self.watched.last_report
        self.norms.append(float(report.total_norm))
        self.skipped.append(bool(report.skipped))


class Run(NamedTuple):
    """The loss and the total norm of each step, whether its batch was poisoned, whether it was skipped; the loss on other files."""

    losses: list[float]
    norms: list[float]
    poisoned: list[bool]
    skipped: list[bool]
    validation: float

    def count(self, *, poisoned: bool, skipped: bool) -> int:
        """Return the number of steps of a kind."""
        return list(zip(self.poisoned, self.skipped, strict=True)).count((poisoned, skipped))

    def spikes(self, window: int = 100) -> int:
        """Return the number of healthy batches whose loss is 6 standard deviations above the mean of the ``window`` before."""
        losses = torch.tensor([loss for loss, bad in zip(self.losses, self.poisoned, strict=True) if not bad])
        before = losses.unfold(0, min(window, len(losses) - 1), 1)[:-1]
        return int((losses[-len(before) :] > before.mean(1) + 6.0 * before.std(1)).sum())

    def excess(self, clean: Run) -> Tensor:
        """Return the loss of each step above that of the run without poison; NaN where the batch was poisoned."""
        return (torch.tensor(self.losses) - torch.tensor(clean.losses)).masked_fill(torch.tensor(self.poisoned), torch.nan)

    def damage(self, clean: Run) -> float:
        """Return the mean rise of the excess from the steps before a poisoned batch to those after it, ``AFTER`` of each."""
        excess = self.excess(clean)
        places = [step for step, bad in enumerate(self.poisoned) if bad]
        rises = [excess[place + 1 :][:AFTER].nanmean() - excess[:place][-AFTER:].nanmean() for place in places]
        return float(torch.stack(rises).nanmean())  # NaN at the first step and the last one, which have no steps on one side


def poisoned_steps(steps: int, seed: int) -> set[int]:
    """Return a random step of each ``EVERY`` steps, and one at least."""
    dice = torch.Generator().manual_seed(seed)
    starts = range(0, max(1, steps - EVERY + 1), EVERY)
    return {begin + int(torch.randint(min(EVERY, steps), (), generator=dice)) for begin in starts}


def pieces(text: bytes, count: int, dice: torch.Generator) -> Batch:
    """Return random pieces of a text, and their targets one character later."""
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=dice)
    characters = torch.frombuffer(bytearray(text), dtype=torch.uint8)[starts + torch.arange(CONTEXT + 1)].long()
    return characters[:, :-1], characters[:, 1:].clone()  # or a change of the targets would change the inputs


def batches(text: bytes, steps: int, seed: int, poisoned: set[int]) -> list[Batch]:
    """Return the batches of a run; the targets of poisoned ones are shuffled over the whole batch, the inputs are the same."""
    dice = torch.Generator().manual_seed(seed)
    inputs, targets = (part.unflatten(0, (steps, PIECES)) for part in pieces(text, steps * PIECES, dice))
    for step in poisoned:
        shuffled = torch.randperm(targets[step].numel(), generator=torch.Generator().manual_seed(step))
        targets[step] = targets[step].flatten()[shuffled].view_as(targets[step])
    return list(zip(inputs, targets, strict=True))


def train(callback: Watched, seed: int, sizes: Sizes, texts: tuple[bytes, bytes], poisoned: set[int]) -> Run:
    """Train with a callback on batches of which some are poisoned, and return what happened."""
    steps = Steps(callback)
    torch.manual_seed(seed)
    model = GPT(sizes.layers, sizes.width)
    loader = DataLoader(batches(texts[0], sizes.steps, seed, poisoned), batch_size=None)
    quiet_trainer(callback, steps, max_epochs=1).fit(model, loader)
    with torch.no_grad():
        validation = model.loss(pieces(texts[1], 1000, torch.Generator().manual_seed(0)))
    is_poisoned = [step in poisoned for step in range(sizes.steps)]
    return Run(model.losses, steps.norms, is_poisoned, steps.skipped, float(validation))


Runs = dict[str, list[Run]]
"""A run for each seed, by method."""


def shares(runs: list[Run]) -> list[str]:
    """Return how many poisoned batches were skipped, and how many healthy ones."""
    texts = []
    for poisoned in (True, False):
        skipped, taken = (sum(run.count(poisoned=poisoned, skipped=skipped) for run in runs) for skipped in (True, False))
        texts.append(f"{skipped} of {skipped + taken}")
    return texts


def row(method: str, runs: list[Run], clean: list[Run]) -> tuple[str | float, ...]:
    """Return a row of the table: means and sums over the seeds."""
    return (
        method,
        fmean(run.validation for run in runs),
        " ".join(f"{run.validation:.3f}" for run in runs),
        "" if method == CLEAN else fmean(run.damage(each) for run, each in zip(runs, clean, strict=True)),
        sum(run.spikes() for run in runs),
        *shares(runs),
    )


def exceeded(limit: Limit, values: Sequence[float], *, are_losses: bool) -> list[bool]:
    """Return which values are above a limit that has seen those before."""
    state, found = limit.init(1), []
    for value in values:
        now, state = limit.step(BlockNorms(torch.tensor([value]), are_losses=are_losses), state)
        found.append(value > float(now))
    return found


def row_of_z(z: float, runs: list[Run]) -> list[str | float]:
    """Return what thresholds on norm, loss and both would have skipped in runs in which nothing was done."""
    found: list[list[Run]] = [[], [], []]
    for run in runs:
        norm = exceeded(replace(NORM_LIMIT, z=z), run.norms, are_losses=False)
        loss = exceeded(replace(LOSS_LIMIT, z=z), run.losses, are_losses=True)
        both = [a and b for a, b in zip(norm, loss, strict=True)]
        for kind, skipped in zip(found, (norm, loss, both), strict=True):
            kind.append(run._replace(skipped=skipped))
    return [z, *(text for kind in found for text in shares(kind))]


def steps_picture(run: Run) -> Figure:
    """Draw loss and total norm of an unprotected run, with the steps on poisoned batches."""
    figure, axes = sheet(columns=2)
    poisoned = [step for step, bad in enumerate(run.poisoned) if bad]
    for axis, values, name in zip(axes, (run.losses, run.norms), ("training loss (nats)", "total norm"), strict=True):
        axis.plot(values, color=GREY, linewidth=0.6)
        axis.plot(poisoned, [values[step] for step in poisoned], "o", color=RED, label="poisoned batch")
        axis.set(xlabel="optimizer step", ylabel=name, title=f"Nothing is done: {name} of each step")
        axis.legend(fontsize=8)
    axes[1].set_yscale("log")
    return figure


def methods_picture(found: Runs) -> Figure:
    """Draw the training loss on healthy batches, above that of the run without poison, and the final losses."""
    figure, axes = sheet(columns=2)
    places = {name: place for place, name in enumerate(found)}
    for name, runs in found.items():
        axes[1].plot([run.validation for run in runs], [places[name]] * len(runs), "o", color=COLORS[name])
        if name != CLEAN:
            above = [run.excess(clean) for run, clean in zip(runs, found[CLEAN], strict=True)]
            mean = torch.stack(above).nanmean(0).unfold(0, 20, 1).nanmean(1)
            # dashed where two runs may be equal, because both thresholds found the same batches
            style = "--" if name == "skip by both" else "-"
            axes[0].plot(range(20, len(mean) + 20), mean, style, color=COLORS[name], label=name, linewidth=1.2)
    axes[0].axhline(0.0, color=GREY, linewidth=0.8)
    axes[0].set(xlabel="optimizer step", ylabel="training loss (nats)", title="Above the run without poison, mean of the seeds")
    axes[0].legend(fontsize=8)
    axes[1].set(xlabel="validation loss at the end (nats)", title="One point for each seed")
    axes[1].set_yticks(list(places.values()), list(places))
    axes[1].invert_yaxis()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    arguments = start(command_line(__doc__, "spikes"), argv)
    warnings.filterwarnings("ignore", "Spike at", RuntimeWarning)
    sizes, texts = QUICK if arguments.quick else FULL, read_stdlib(0.5 if arguments.quick else 3.0)
    found: Runs = {method: [] for method in (CLEAN, *METHODS)}
    for seed in range(sizes.seeds):
        for method, runs in found.items():
            poisoned = set() if method == CLEAN else poisoned_steps(sizes.steps, seed)
            runs.append(train(METHODS.get(method, METHODS["nothing"])(), seed, sizes, texts, poisoned))
            print(f"seed {seed}, {method}: validation loss {runs[-1].validation:.3f}", flush=True)
    headers = ("", "validation loss", "of each seed", f"damage in {AFTER} steps", "spikes", "poisoned skipped", "healthy skipped")
    print(tabulate([row(method, runs, found[CLEAN]) for method, runs in found.items()], headers, floatfmt=".3f"))
    print("\nThresholds with other z where nothing is done: poisoned batches above them, and healthy ones")
    rows = [row_of_z(z, found["nothing"]) for z in (2.5, 3.0, 4.0, 5.0, 6.0)]
    print(tabulate(rows, ("z", "norm", "", "loss", "", "both", "")))
    save(steps_picture(found["nothing"][0]), arguments.output / "steps.png")
    save(methods_picture(found), arguments.output / "methods.png")


if __name__ == "__main__":
    main()
