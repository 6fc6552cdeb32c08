"""What statistics, weight norms, update ratios and thresholds cost in a Trainer: ``python -m benchmarks.monitor``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule

from benchmarks.lockstep import BLOCK, WARM_UP, means_of_blocks, seconds_per_step
from benchmarks.timing import Ratio, machine, publish, table
from benchmarks.trainer import Candidate, Network, fits, silence
from clip_callbacks import GradientNormMonitor, NonFiniteGuard, RobustZScoreLimit

BUDGET = 1.02
"""Largest ratio of the time of a step with everything on to that of GradientNormMonitor() alone, at the default interval."""

ALONE, AGAIN, EVERYTHING = "GradientNormMonitor()", "the same once more: the floor", "everything, and a guard with thresholds"
OPTIONS = ("log_statistics", "log_weight_norm", "log_update_ratio")

NETWORKS = {
    16: ("50 tensors of 16 x 16 and 16", 25),
    512: ("10 tensors of 512 x 512 and 512", 5),
    1024: ("16 tensors of 1024 x 1024 and 1024", 8),
}
"""Name and number of layers of each network, by its width."""

BATCH_SIZE = 64


def everything() -> list[Callback]:
    """All options that read gradients or weights once more, and a guard that compares each step with recent ones."""
    guard = NonFiniteGuard(skip_above=RobustZScoreLimit(6.0), loss_above=RobustZScoreLimit(4.0, scale="linear"))
    return [guard, GradientNormMonitor(**dict.fromkeys(OPTIONS, True))]


def times_of(
    network: Callable[[], LightningModule], callbacks: Mapping[str, Callable[[], list[Callback]]], steps: int, **options: Any
) -> dict[str, list[float]]:
    """Seconds of each step of fits in lockstep.

    Args:
        network: Function that makes the module.
        callbacks: For each fit, a function that makes its callbacks.
        steps: Steps of each fit.
        options: Options of the Trainers.
    """

    def candidate(make: Callable[[], list[Callback]]) -> Callable[[], Candidate]:
        return lambda: (network(), make(), {})

    with fits({name: candidate(make) for name, make in callbacks.items()}, **options) as running:
        return seconds_per_step(running, steps)


def ratios(network: Callable[[], LightningModule], steps: int) -> dict[str, Ratio]:
    """The time of a step with everything on, and of a second fit of the same as the first, over GradientNormMonitor() alone."""
    times = times_of(network, {ALONE: alone, AGAIN: alone, EVERYTHING: everything}, steps)
    blocks = {name: means_of_blocks(each) for name, each in times.items()}
    return {name: Ratio.of(each, blocks[ALONE]) for name, each in blocks.items()}


def per_step(network: Callable[[], LightningModule], steps: int) -> str:
    """The table of mean times of a step at the default log_every_n_steps."""
    # three decimals, since the budget is two hundredths
    rows = [[name, f"{ratio.median:.3f} ({ratio.lower:.3f}-{ratio.upper:.3f})"] for name, ratio in ratios(network, steps).items()]
    return table(rows, ["`log_every_n_steps=50`", "a step against the first row: median (quartiles)"])


def per_logging_step(network: Callable[[], LightningModule], steps: int) -> str:
    """The table of times of a single logging step: fits that log at every step, against one that never does."""
    makers: dict[str, Callable[[], list[Callback]]] = {ALONE: alone}
    makers |= {option: partial(_with_option, option) for option in OPTIONS}
    makers[EVERYTHING] = everything
    times = times_of(network, makers, steps, log_every_n_steps=1)
    # not in lockstep with the others: it has other options
    never = median(times_of(network, {"never": alone}, steps, log_every_n_steps=10 * steps)["never"])
    medians = {name: median(each) for name, each in times.items()}
    rows = [
        [name, f"{1e6 * (time - never):.0f}", f"{1e6 * (time - medians[ALONE]):.0f}", f"{time / never - 1:.2f}"]
        for name, time in medians.items()
    ]
    headers = ["one logging step", "added to a step that does not log, us", "more than the first row, us", "added, in steps"]
    return table(rows, headers)


def alone() -> list[Callback]:
    """The monitor without options."""
    return [GradientNormMonitor()]


def _with_option(option: str) -> list[Callback]:
    return [GradientNormMonitor(**{option: True})]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=WARM_UP + 10 * BLOCK, help="of a fit; the first ones do not count")
    parser.add_argument("--widths", type=int, nargs="+", default=list(NETWORKS), choices=NETWORKS, help="of the networks")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", help="file in benchmarks/results to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    silence()
    note = (
        f"Fits in lockstep in one process, CSVLogger, AdamW, batches of {BATCH_SIZE}. Budget of a step with everything on: "
        f"{BUDGET} times that of GradientNormMonitor() alone. Made by `python -m benchmarks.monitor`.\n"
    )
    parts = [f"# What GradientNormMonitor logs on request, CPU\n\n{machine('cpu')}\n", note]
    for width in arguments.widths:
        name, layers = NETWORKS[width]
        network = partial(Network, width, layers, batch_size=BATCH_SIZE)
        parts.append(f"### {name}\n\n{per_step(network, arguments.steps)}\n")
        parts.append(per_logging_step(network, min(arguments.steps, 2 * WARM_UP)) + "\n")
    publish("\n".join(parts).rstrip(), arguments.output)


if __name__ == "__main__":
    main()
