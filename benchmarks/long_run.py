"""Whether memory, the time of a step and checkpoints grow in a long epoch: ``python -m benchmarks.long_run``."""

from __future__ import annotations

import argparse
import gc
import io
import logging
import sys
import tempfile
import time
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.timing import machine, publish, table
from clip_callbacks import (
    AccumulationRescaling,
    GradientClipping,
    GradientNoiseScale,
    GradientNormMonitor,
    NonFiniteGuard,
    QuantileLimit,
    RobustZScoreLimit,
    ZScoreLimit,
)

BLOCKS = 20
"""Number of blocks of steps, each with a row of the table."""

WARM_UP_BLOCKS = 2
"""Blocks after which the memory must stay as it is: windows of limits are full, lists of waiting norms were full once."""

MAX_GROWTH_MIB = 1.0
"""Largest growth of the resident memory after the warm-up, beyond that of a Trainer without callbacks."""

QUICK_STEPS = 400

RULER_EVERY = 7
"""Number of steps, not a divisor of the logging interval, after which a fixed piece of work is timed for comparison."""

WINDOW = 2
"""Number of micro-batches in an accumulation window."""

BARE, FAMILY = "no callbacks", "every callback"


class Batches(IterableDataset[Tensor]):
    """Random batches without end, so that a run is one epoch of any length."""

    def __iter__(self) -> Iterator[Tensor]:
        """Make each batch when it is asked for."""
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(4, 1, generator=generator)


class Network(LightningModule):
    """Two parameters, and a layer with buffers, which a skipped step must restore."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, affine=False))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Losses that differ from step to step."""
        loss: Tensor = (self.net(batch) - batch * batch.mean() - 1.0).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with a state."""
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


def every_callback() -> list[Callback]:
    """Each of them, with all that remembers something of the steps before."""
    options = ("log_update_ratio", "log_weight_norm", "log_statistics", "log_contributions", "log_histograms")
    return [
        AccumulationRescaling(),
        NonFiniteGuard(skip_above=RobustZScoreLimit(6.0), loss_above=RobustZScoreLimit(6.0, scale="linear")),
        GradientClipping(QuantileLimit(0.9), shadow=[ZScoreLimit(2.0), 1.0], summary=False),
        GradientNormMonitor("parameter", summary=False, **dict.fromkeys(options, True)),
        GradientNoiseScale(),
    ]


class Row(NamedTuple):
    """A block of steps: what is true at its end, and how long its steps took."""

    steps: int
    resident_mib: float
    step_us: float
    step_over_ruler: float
    state_bytes: int
    objects: Counter[str]


class Watch(Callback):
    """Notes memory, times and sizes of states at the end of each block of steps; it is in every run."""

    def __init__(self, steps: int, *, counts_objects: bool) -> None:
        self.block = steps // BLOCKS
        self.counts_objects = counts_objects
        self.rows: list[Row] = []
        self._times = array("d", [0.0]) * self.block
        self._ruler_times = array("d", [0.0]) * max(1, self.block // RULER_EVERY)
        self._start = 0.0

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End a window and, once in a while, a block."""
        if batch_idx % WINDOW < WINDOW - 1:
            return
        steps = trainer.global_step
        # from the end of one window to the end of the next: all hooks are in it
        self._times[(steps - 1) % self.block] = time.process_time() - self._start
        if steps % RULER_EVERY == 0:
            self._ruler_times[steps // RULER_EVERY % len(self._ruler_times)] = ruler_time()
        if steps % self.block == 0:
            size = state_bytes(trainer)
            gc.collect()
            step, ruler = median(self._times), median(self._ruler_times)
            self.rows.append(Row(steps, resident_mib(), 1e6 * step, step / ruler, size, self._objects()))
            sys.stderr.write(f"{steps:,} steps: {self.rows[-1].resident_mib:.2f} MiB\n")
        self._start = time.process_time()

    def _objects(self) -> Counter[str]:
        if not self.counts_objects:
            return Counter()
        return Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())


def ruler_time() -> float:
    """Seconds that a piece of work takes which never changes: Python and small tensors, as in a step.

    The speed of a machine drifts within an hour. A step over this piece of work drifts far less.
    """
    start = time.process_time()
    tensor = torch.ones(16)
    for _ in range(20):
        tensor = (tensor * tensor).clamp(max=1.0)
    return time.process_time() - start


def resident_mib() -> float:
    """Resident memory of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def state_bytes(trainer: Trainer) -> int:
    """Size of the callbacks' states in a checkpoint."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    file = io.BytesIO()
    torch.save({each.state_key: each.state_dict() for each in callbacks}, file)
    return len(file.getvalue())


def run(callbacks: list[Callback], steps: int, *, counts_objects: bool) -> list[Row]:
    """Train for one long epoch."""
    torch.manual_seed(0)
    watch = Watch(steps, counts_objects=counts_objects)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=steps,
            max_epochs=-1,
            callbacks=[*callbacks, watch],
            logger=TensorBoardLogger(folder),
            accumulate_grad_batches=WINDOW,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Network(), DataLoader(Batches(), batch_size=None))
    return watch.rows


def rows_of(found: dict[str, list[Row]]) -> list[list[str]]:
    """A row of the table for each block."""
    each = []
    for bare, family in zip(found[BARE], found[FAMILY], strict=True):
        numbers = [f"{number:.2f}" for number in (bare.resident_mib, family.resident_mib)]
        times = [f"{number:.0f}" for number in (bare.step_us, family.step_us)]
        ratios = [f"{number:.1f}" for number in (bare.step_over_ruler, family.step_over_ruler)]
        each.append([f"{bare.steps:,}", *numbers, *times, *ratios, f"{family.state_bytes:,}"])
    return each


def conclusion(found: dict[str, list[Row]]) -> str:
    """What has grown after the warm-up."""
    growth = {}
    for name, rows in found.items():
        # medians of three blocks, since the allocator's pages and the logger's queue come and go
        first, last = rows[WARM_UP_BLOCKS : WARM_UP_BLOCKS + 3], rows[-3:]
        mib = median(row.resident_mib for row in last) - median(row.resident_mib for row in first)
        time_ratio = median(row.step_over_ruler for row in last) / median(row.step_over_ruler for row in first)
        growth[name] = mib, time_ratio
    added = growth[FAMILY][0] - growth[BARE][0]
    holds = "holds" if added <= MAX_GROWTH_MIB else "does NOT hold"
    sizes = [row.state_bytes for row in found[FAMILY][WARM_UP_BLOCKS:]]
    lines = [f"- {name}: {mib:+.2f} MiB, time of a step x {ratio:.3f}" for name, (mib, ratio) in growth.items()]
    return "\n".join(
        [
            "From the first three blocks after the warm-up to the last three, medians:\n",
            *lines,
            f"- added by the callbacks: {added:+.2f} MiB (at most {MAX_GROWTH_MIB:g}: {holds})",
            f"- states in a checkpoint after the warm-up: {min(sizes):,} to {max(sizes):,} bytes",
        ]
    )


def growing_objects(rows: list[Row]) -> str:
    """Types of which there are more objects at the end than after the warm-up."""
    before, after = rows[WARM_UP_BLOCKS].objects, rows[-1].objects
    grown = sorted(((count - before[name], name) for name, count in after.items() if count > before[name]), reverse=True)
    return table([[name, f"+{more}", after[name]] for more, name in grown[:20]], ["type", "more", "at the end"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps")
    parser.add_argument("--objects", action="store_true", help="count Python objects by type, and print those that grow")
    parser.add_argument("--output", help="file in benchmarks/results to write")
    arguments = parser.parse_args()
    steps = QUICK_STEPS if arguments.quick else arguments.steps
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = {
        name: run(callbacks, steps, counts_objects=arguments.objects)
        for name, callbacks in ((BARE, []), (FAMILY, every_callback()))
    }
    headers = [
        "steps",
        "resident, MiB: bare",
        "all",
        "a step, µs: bare",
        "all",
        "a step over the ruler: bare",
        "all",
        "states, bytes",
    ]
    note = (
        f"One epoch of {steps:,} optimizer steps with windows of {WINDOW} micro-batches, two parameters and a BatchNorm1d, "
        f'TensorBoardLogger, in one process, first "{BARE}", then "{FAMILY}". Times are medians of a block, in time of the '
        "processor, so that other work on the machine shows little; the ruler is a fixed piece of work that is timed every "
        f"{RULER_EVERY} steps, because the speed of a machine drifts within an hour. The state is what a checkpoint holds of all "
        "callbacks. Above 1,024 steps norms are counted in bins of 2 %: it grows with the range of the norms, and not with their "
        "number. Made by `python -m benchmarks.long_run`."
    )
    parts = [f"# A long run, CPU\n\n{machine('cpu')}\n\n{note}", table(rows_of(found), headers), conclusion(found)]
    if arguments.objects:
        parts += [f"More Python objects, {name}:\n\n{growing_objects(rows)}" for name, rows in found.items()]
    publish("\n\n".join(parts), arguments.output)


if __name__ == "__main__":
    main()
