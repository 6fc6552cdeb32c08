"""What a good step costs with ``bundles`` set, over one without, in the demo's model: ``python -m benchmarks.bundles``.

One fit; each step draws whether bundles are on. So both kinds
of steps share the process, the weights and whatever else disturbs the machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from random import Random
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from benchmarks.timing import Ratio, machine, publish, table
from clip_callbacks import GradientClipping, NonFiniteGuard
from examples.char_rnn import CharRNN, StdlibText

WARM_UP = 50
"""Steps at the beginning that do not count."""
BLOCK = 4
"""Steps in a row of one kind; the first of them does not count, so that a kept batch of the other kind is gone."""


class Switch(Callback):
    """First in the list of callbacks: turns bundles on and off, and notes how long each step takes."""

    def __init__(self, guard: NonFiniteGuard) -> None:
        self.guard = guard
        self.dice = Random(0)
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self._start = 0.0
        self.bundles: Any = None
        self._is_on = True
        self._pair = [True, False]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose, and start the clock."""
        if self.bundles is None:
            self.bundles = self.guard._part.journal._bundles
            assert self.bundles is not None, "or both kinds are the same"
        if batch_idx % BLOCK == 0:
            if not self._pair:
                self._pair = self.dice.sample([True, False], 2)
            self._is_on = self._pair.pop()
            self.guard._part.journal._bundles = self.bundles if self._is_on else None
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock."""
        seconds = time.perf_counter() - self._start
        if batch_idx >= WARM_UP and batch_idx % BLOCK:
            self.times[self._is_on].append(seconds)


def run(steps: int, accumulate: int, batch_size: int) -> dict[bool, list[float]]:
    """Seconds of each micro-batch, with and without."""
    seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guard = NonFiniteGuard(bundles=folder)
        switch = Switch(guard)
        trainer = Trainer(
            max_steps=steps // accumulate,
            accumulate_grad_batches=accumulate,
            limit_val_batches=0,
            logger=False,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[switch, guard, GradientClipping(1.0)],
        )
        trainer.fit(CharRNN(), StdlibText(batch_size=batch_size, validation_batches=1))
    return switch.times


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--output", help="file in benchmarks/results")
    options = parser.parse_args()
    rows = []
    for name, accumulate, batch_size in (("the demo", 1, 32), ("windows of 4 micro-batches", 4, 8)):
        times = run(options.steps, accumulate, batch_size)
        pairs = list(zip(times[True], times[False], strict=False))
        ratio = Ratio.of(*map(list, zip(*pairs, strict=True)))
        on, off = (sorted(times[kind])[len(times[kind]) // 2] for kind in (True, False))
        paired = f"{ratio.median:.4f} ({ratio.lower:.2f}-{ratio.upper:.2f})"
        rows.append([name, len(pairs), f"{off * 1e3:.2f}", f"{on * 1e3:.2f}", f"{on / off:.4f}", paired])
    headers = ["run", "pairs of steps", "without, ms", "with, ms", "ratio of the medians", "median of the ratios (quartiles)"]
    text = "# Good steps with `bundles`, over those without\n\n" + machine("cpu") + "\n\n" + table(rows, headers)
    publish(text, options.output)


if __name__ == "__main__":
    main()
