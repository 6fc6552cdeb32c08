"""Helpers of the worked examples: a command line, a Trainer that prints nothing, a figure to draw on.

This file is not an example itself; the examples beside it import it.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RED, BLUE, GREEN, ORANGE, GREY = "#d1495b", "#00798c", "#66a182", "#edae49", "#5b5b66"


def command_line(docstring: str, name: str) -> argparse.ArgumentParser:
    """Return a parser with ``--quick`` and ``--output``, the folder for pictures and logs."""
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="take a few seconds only, with fewer steps")
    parser.add_argument("--output", type=Path, default=Path("logs", name), metavar="FOLDER", help="default: %(default)s")
    return parser


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, make the output folder, and silence Lightning's messages about small runs."""
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in (".*does not have many workers.*", ".*is smaller than the logging interval.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message)
    torch.set_num_threads(1)  # the tensors are small: more threads would only wait for each other
    return arguments


def quiet_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """Return a Trainer on the CPU that prints nothing and, unless a logger is given, writes nothing."""
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **(silent | options))


def sheet(*, columns: int = 1, rows: int = 1, size: tuple[float, float] = (5.5, 3.8)) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, row by row, each of a ``size`` in inches."""
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def save(figure: Figure, file: Path) -> None:
    """Write a picture and print its path."""
    figure.savefig(file, dpi=110)
    print(f"Plot: {file}")
