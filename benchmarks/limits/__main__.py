"""Compare the limits on six tasks: ``python -m benchmarks.limits``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.limits import invariance, language, normalizer_free, spikes, streams, temporal_order
from benchmarks.limits.common import Section
from benchmarks.timing import RESULTS, machine, publish

EXPERIMENTS: dict[str, tuple[str, Callable[[bool], Section]]] = {
    "a": ("streams", streams.section),
    "b": ("invariance", invariance.section),
    "c": ("temporal_order", temporal_order.section),
    "d": ("normalizer_free", normalizer_free.section),
    "e": ("language", language.section),
    "f": ("spikes", spikes.section),
}

TITLE = "# What the limits do to training"


def earlier(file: Path) -> dict[str, str]:
    """The sections of an earlier report, by letter."""
    if not file.exists():
        return {}
    return {part[1]: f"## {part.rstrip()}" for part in file.read_text().split("\n## ")[1:]}


def picture(output: str | None, name: str) -> Path | None:
    """Where an experiment's picture goes, beside the report."""
    if output is None:
        return None
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{Path(output).stem}_{name}.png"


def main() -> None:
    """Print the tables; with ``--output`` draw the pictures too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, for a smoke test: the figures mean nothing")
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="letters of the experiments, such as a,c")
    parser.add_argument("--output", help="file in benchmarks/results to write; sections that are not run stay as they are there")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(EXPERIMENTS):
        parser.error(f"--only must be letters of {', '.join(EXPERIMENTS)}, got {', '.join(sorted(unknown))}.")
    torch.set_num_threads(1)
    parts = earlier(RESULTS / arguments.output) if arguments.output else {}
    for letter in chosen:
        name, make = EXPERIMENTS[letter]
        start = time.perf_counter()
        parts[letter] = make(arguments.quick).text(picture(arguments.output, name))
        sys.stderr.write(f"{letter} {name}: {time.perf_counter() - start:.0f} s\n")
    note = "Seeds are fixed; small networks on one core. Made by `python -m benchmarks.limits`."
    publish("\n\n".join([TITLE, machine("cpu"), note, *(parts[letter] for letter in sorted(parts))]), arguments.output)


if __name__ == "__main__":
    main()
