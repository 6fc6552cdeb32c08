"""What statistics, weight norms, update ratios and thresholds cost in a Trainer: ``python -m benchmarks.monitor``."""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from random import Random
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule

from benchmarks.timing import Ratio, machine, publish, table
from benchmarks.trainer import WARM_UP, Network, seconds_per_step
from clip_callbacks import GradientNormMonitor, NonFiniteGuard, RobustZScoreLimit

BUDGET = 1.02
"""Largest ratio of the time of a step with everything on to that of GradientNormMonitor() alone, at the default interval."""

ALONE, AGAIN, EVERYTHING = "GradientNormMonitor()", "the same once more: the floor", "everything, and a guard with thresholds"
OPTIONS = ("log_statistics", "log_weight_norm", "log_update_ratio")

NETWORKS = {16: ("50 tensors of 16 x 16 and 16", 25), 512: ("10 tensors of 512 x 512 and 512", 5)}
"""Name and number of layers of each network, by its width."""

BATCH_SIZE = 64

Run = Callable[[str], tuple[LightningModule, list[Callback], dict[str, Any]]]


def everything() -> list[Callback]:
    """All options that read gradients or weights once more, and a guard that compares each step with recent ones."""
    guard = NonFiniteGuard(skip_above=RobustZScoreLimit(6.0), loss_above=RobustZScoreLimit(4.0, scale="linear"))
    return [guard, GradientNormMonitor(**dict.fromkeys(OPTIONS, True))]


def runs(
    network: Callable[[], LightningModule], callbacks: Mapping[str, Callable[[], list[Callback]]], **options: Any
) -> dict[str, Run]:
    """Module, callbacks and Trainer options of each run, as ``seconds_per_step`` takes them."""

    def run(make: Callable[[], list[Callback]]) -> Run:
        return lambda _: (network(), make(), options)

    return {name: run(make) for name, make in callbacks.items()}


def interleaved_fits(candidates: Mapping[str, Run], width: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of each candidate in each round, in a new order each time; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, rounds):
            order = list(candidates.items())
            Random(number).shuffle(order)
            for name, make in order:
                seconds = seconds_per_step(make, width, steps, folder, batch_size=BATCH_SIZE)
                if number >= 0:
                    times[name].append(seconds)
    return times


def median(values: list[float]) -> float:
    """The middle value."""
    return sorted(values)[len(values) // 2]


def per_step(network: Callable[[], LightningModule], width: int, rounds: int, steps: int) -> str:
    """The table of mean times of a step at the default log_every_n_steps."""
    alone: Callable[[], list[Callback]] = lambda: [GradientNormMonitor()]  # noqa: E731
    times = interleaved_fits(runs(network, {ALONE: alone, AGAIN: alone, EVERYTHING: everything}), width, rounds, steps)
    rows = [[name, f"{1e6 * median(times[name]):.0f}", ratio_to_alone(times, name)] for name in times]
    return table(rows, ["`log_every_n_steps=50`", "a step, us", "against the first row: median (quartiles)"])


def ratio_to_alone(times: Mapping[str, list[float]], name: str) -> str:
    """Median and quartiles with three decimals, since the budget is two hundredths."""
    ratio = Ratio.of(times[name], times[ALONE])
    return f"{ratio.median:.3f} ({ratio.lower:.3f}-{ratio.upper:.3f})"


def per_logging_step(network: Callable[[], LightningModule], width: int, rounds: int, steps: int) -> str:
    """The table of times of a single logging step: fits that log every step, against one that never does."""
    makers: dict[str, Callable[[], list[Callback]]] = {ALONE: lambda: [GradientNormMonitor()]}
    makers |= {option: partial(_with_option, option) for option in OPTIONS}
    makers[EVERYTHING] = everything
    candidates = runs(network, makers, log_every_n_steps=1)
    candidates |= runs(network, {"never": makers[ALONE]}, log_every_n_steps=10 * steps)
    times = interleaved_fits(candidates, width, rounds, steps)
    rows = []
    for name in makers:
        added = [1e6 * (a - b) for a, b in zip(times[name], times["never"], strict=True)]
        more = [1e6 * (a - b) for a, b in zip(times[name], times[ALONE], strict=True)]
        in_steps = [(a - b) / c for a, b, c in zip(times[name], times["never"], times["never"], strict=True)]
        rows.append([name, f"{median(added):.0f}", f"{median(more):.0f}", f"{median(in_steps):.2f}"])
    headers = ["one logging step", "added to a step that does not log, us", "more than the first row, us", "added, in steps"]
    return table(rows, headers)


def _with_option(option: str) -> list[Callback]:
    return [GradientNormMonitor(**{option: True})]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=WARM_UP + 100, help="of a fit; the first ones do not count")
    parser.add_argument("--widths", type=int, nargs="+", default=list(NETWORKS), choices=NETWORKS, help="of the networks")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--output", help="file in benchmarks/results to write")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    note = (
        f"Fits interleaved in one process, CSVLogger, AdamW, batches of {BATCH_SIZE}. Budget of a step with everything on: "
        f"{BUDGET} times that of GradientNormMonitor() alone. Made by `python -m benchmarks.monitor`.\n"
    )
    parts = [f"# What GradientNormMonitor logs on request, CPU\n\n{machine('cpu')}\n", note]
    for width in arguments.widths:
        name, layers = NETWORKS[width]
        network = partial(Network, width, layers)
        parts.append(f"### {name}\n\n{per_step(network, width, arguments.rounds, arguments.steps)}\n")
        parts.append(per_logging_step(network, width, arguments.rounds, min(arguments.steps, 2 * WARM_UP)) + "\n")
    publish("\n".join(parts).rstrip(), arguments.output)


if __name__ == "__main__":
    main()
