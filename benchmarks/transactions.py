"""Cost of a good step if a skip restores all state, relative to batch statistics only: ``python -m benchmarks.transactions``.

One fit for each network; blocks of steps of both kinds alternate, so that both share the process, the weights and the machine.
"""

from __future__ import annotations

import argparse
import time
import warnings
from random import Random
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.timing import Ratio, machine, publish, table
from clip_callbacks import GradientClipping, NonFiniteGuard
from clip_callbacks.guard.line_search import line_searches
from clip_callbacks.guard.optimizer_bookkeeping import optimizer_bookkeeping
from clip_callbacks.guard.resource import Resource, ResourceScope
from clip_callbacks.guard.restore import SkippedStepRestorer
from clip_callbacks.guard.schedules import held_schedules
from clip_callbacks.trainer.tensor_copies import TensorCopies

WARM_UP = 12
BLOCK = 3
"""Steps in a row of one kind; the first of them does not count: what it reads was last in the cache a block before."""


CALLS = 500


class Residual(nn.Module):
    """A block of two convolutions with batch normalization."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        parts = [(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)) for _ in range(2)]
        self.net = nn.Sequential(*parts[0], nn.ReLU(), *parts[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of both ways."""
        return torch.relu(x + self.net(x))


class Network(LightningModule):
    """A network, and random batches for it."""

    def __init__(self, net: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.shape = net, shape

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """A loss that is small."""
        loss: torch.Tensor = self.net(batch).square().mean()
        return loss

    def train_dataloader(self) -> Any:
        """Eight random batches, again and again."""
        return DataLoader([torch.randn(self.shape) for _ in range(8)] * 1000, batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def residual() -> Network:
    """Fifty batch norms, as a ResNet-50 has 53."""
    return Network(nn.Sequential(nn.Conv2d(3, 16, 3), *(Residual(16) for _ in range(25)), nn.Flatten()), (8, 3, 10, 10))


def transformer() -> Network:
    """Layer norms, and no buffer that changes; a mask of each layer that does not."""
    layers = [nn.TransformerEncoderLayer(96, 6, 384, dropout=0.0, batch_first=True) for _ in range(12)]
    for layer in layers:
        layer.register_buffer("mask", torch.full((128, 128), -torch.inf).triu(1))
    return Network(nn.Sequential(*layers), (2, 64, 96))


class StatisticsOnly(Resource):
    """Copies of batch statistics for each window, and nothing else."""

    def __init__(self, module: nn.Module) -> None:
        self._copies = TensorCopies()
        for name, layer in module.named_modules():
            if isinstance(layer, nn.BatchNorm2d):
                for key, buffer in layer.named_buffers():
                    self._copies.add(f"{name}.{key}", buffer, None)

    def begin_batch(self, *, in_window: bool) -> None:
        """Copy them."""
        self._copies.keep()


def statistics_only(scope: ResourceScope) -> dict[int, Resource]:
    """Make the resource of the one optimizer."""
    return {0: StatisticsOnly(scope.module)}


class Switch(Callback):
    """First in the list of callbacks: changes between both kinds, and notes how long each step takes."""

    def __init__(self, guard: NonFiniteGuard) -> None:
        self.guard = guard
        self.dice = Random(0)
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self.kinds: dict[bool, SkippedStepRestorer] = {}
        self.context: Any = None
        self.calls: dict[bool, list[float]] = {True: [], False: []}
        self._is_all = True
        self._pair = [True, False]
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose, and start the clock."""
        part = self.guard._part
        if not self.kinds:
            (self.context,) = self.guard._engine.contexts
            scope = ResourceScope(trainer, pl_module, [self.context], part.schedules, lambda: 0)
            fewer = (statistics_only, line_searches, optimizer_bookkeeping, held_schedules)
            self.kinds = {True: part.restorer, False: SkippedStepRestorer(scope, fewer)}
        if batch_idx % BLOCK == 0:
            if not self._pair:
                self._pair = self.dice.sample([True, False], 2)
            self._is_all = self._pair.pop()
            part.restorer = self.kinds[self._is_all]
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock."""
        seconds = time.perf_counter() - self._start
        if batch_idx >= WARM_UP and batch_idx % BLOCK:
            self.times[self._is_all].append(seconds)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time the beginning of a batch by itself: what both kinds do for a good step, but for a look at a flag or two."""
        for kind, restorer in self.kinds.items():
            for _ in range(CALLS):
                start = time.perf_counter()
                for begin_batch in restorer.at_batch:
                    begin_batch(in_window=False)
                self.calls[kind].append(time.perf_counter() - start)


def run(module: Network, steps: int, *others: Callback) -> tuple[Switch, int]:
    """Seconds of each step of both kinds; bytes of the copies that are kept."""
    seed_everything(0, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guard = NonFiniteGuard()
        switch = Switch(guard)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(max_steps=steps, accelerator="cpu", callbacks=[switch, guard, GradientClipping(1e9), *others], **quiet)
        trainer.fit(module)
    before = switch.kinds[True].before(switch.context)
    return switch, sum(copy.numel() * copy.element_size() for copy in before.values())


def _median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", help="file in benchmarks/results")
    options = parser.parse_args()
    rows = []
    for name, make, others in (
        ("50 batch norms", residual, ()),
        ("50 batch norms, EMA of the weights", residual, (EMAWeightAveraging(),)),
        ("transformer, 12 constant masks", transformer, ()),
    ):
        switch, kept = run(make(), options.steps, *others)
        times, calls = switch.times, {kind: _median(seconds) * 1e6 for kind, seconds in switch.calls.items()}
        pairs = list(zip(times[True], times[False], strict=False))
        ratio = Ratio.of(*map(list, zip(*pairs, strict=True)))
        everything, fewer = _median(times[True]), _median(times[False])
        paired = f"{ratio.median:.4f} ({ratio.lower:.2f}-{ratio.upper:.2f})"
        direct = [f"{calls[False]:.0f}", f"{calls[True]:.0f}", f"{1 + (calls[True] - calls[False]) / fewer / 1e6:.4f}"]
        medians = [f"{fewer * 1e3:.2f}", f"{everything * 1e3:.2f}", f"{everything / fewer:.4f}"]
        rows.append([name, len(pairs), *medians, paired, *direct, kept])
    headers = ["network", "pairs", "statistics only, ms", "all, ms", "ratio of the medians", "median of the ratios (quartiles)"]
    headers += ["beginning of a batch, statistics only, us", "all, us", "ratio by these"]
    text = "# Good steps with all state guarded, over batch statistics only\n\n" + machine("cpu") + "\n\n"
    publish(text + table(rows, [*headers, "bytes copied for a window"]), options.output)


if __name__ == "__main__":
    main()
