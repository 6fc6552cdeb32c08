"""Interleaved timing in one process: every round runs every candidate once, so that what disturbs the machine disturbs all."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from random import Random

import torch
from tabulate import tabulate

UNCOUNTED = 2
"""Rounds before those that count: caches are made."""

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Ratio:
    """Times of a candidate as ratios to the reference of the same round: median and quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, times: Sequence[float], references: Sequence[float]) -> Ratio:
        """Ratios round by round."""
        lower, median, upper = statistics.quantiles((a / b for a, b in zip(times, references, strict=True)), n=4)
        return cls(median, lower, upper)

    def __str__(self) -> str:
        """Median and quartiles."""
        return f"{self.median:.2f} ({self.lower:.2f}-{self.upper:.2f})"


def interleaved(
    candidates: Mapping[str, Callable[[], object]], prepare: Callable[[], object], *, rounds: int, synchronize: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, in a new order each time; the first rounds do not count.

    Args:
        candidates: What to time.
        prepare: Called before each candidate, not timed.
        rounds: How many.
        synchronize: Waits for the device.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-UNCOUNTED, rounds):
        order = list(candidates.items())
        Random(number).shuffle(order)  # what ran before, and what it left in the caches, is not always the same
        for name, run in order:
            prepare()
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def rounds_for(seconds: float, budget_s: float) -> int:
    """How many rounds fit into a time, between 11 and 400."""
    return max(11, min(400, int(budget_s / max(seconds, 1e-9))))


def machine(device: str) -> str:
    """What it ran on, in one line of Markdown."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {torch.get_num_threads()} threads"
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "lightning", "clip_callbacks", "smartclip", "pytorch_optimizer")
    )
    return f"{date.today().isoformat()}; {where}; Python {platform.python_version()}; {packages}."


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """A Markdown table."""
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def publish(text: str, file: str | None) -> None:
    """Print, and write into ``benchmarks/results`` if a file is named."""
    sys.stdout.write(text + "\n")
    if file:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / file).write_text(text + "\n")
