"""How long a report of a long log takes, and how much memory: the whole command, in a process of its own.

python -m benchmarks.report [--steps 1e6] [--output report_cpu.md]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.timing import machine, publish, table
from clip_callbacks.core.metric_names import BLOCK_NORM

BLOCKS = 10


def metrics(steps: int) -> pd.DataFrame:
    """What a run of so many steps, every one of them logged, has in its log."""
    dice = np.random.default_rng(0)
    total = np.exp(dice.normal(0.0, 0.7, steps))
    blocks = {f"grad_norm/layers.{number}": total * share for number, share in enumerate(dice.dirichlet(np.ones(BLOCKS)))}
    clipped = np.minimum(total, 2.0)
    return pd.DataFrame(
        {
            "step": np.arange(steps),
            "epoch": np.arange(steps) // 10_000,
            "train_loss": 1 + 3 / np.sqrt(1 + np.arange(steps) / 100) + dice.normal(0, 0.05, steps),
            "grad/total_norm": total,
            "grad/clipped_norm": clipped,
            "grad/clip_coef": clipped / total,
            "grad/max_norm": 2.0,
            "grad/clip_fraction": (total > 2.0).astype(float),  # noqa: PLR2004
            "grad/skipped_steps": np.cumsum(dice.random(steps) < 1e-4),  # noqa: PLR2004
            **blocks,
        }
    )


def write_csv(log: pd.DataFrame, folder: Path) -> Path:
    """As CSVLogger does: a row for the loss, a row for our metrics."""
    ours = log.drop(columns=["train_loss", "epoch"])
    pd.concat([log[["step", "epoch", "train_loss"]], ours]).sort_values("step", kind="stable").to_csv(
        folder / "metrics.csv", index=False
    )
    return folder / "metrics.csv"


def write_events(log: pd.DataFrame, folder: Path) -> Path:
    """As TensorBoardLogger does: an event for each metric of each step."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    path = folder / "events.out.tfevents.0.benchmark"
    with path.open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(file_version="brain.Event:2").SerializeToString())
        without = [column for column in log if column == "epoch" or column.startswith(BLOCK_NORM)]
        for row in log.drop(columns=without).to_dict("records"):
            step = int(row.pop("step"))
            for tag, value in row.items():
                summary = Summary(value=[Summary.Value(tag=str(tag), simple_value=value)])
                writer.write(Event(wall_time=1.7e9 + step, step=step, summary=summary).SerializeToString())
    return path


def measured(log: Path, folder: Path) -> tuple[float, float, float]:
    """Seconds, peak memory in GB, size of the page in MB."""
    page = folder / "report.html"
    start, peak = time.perf_counter(), 0.0
    with subprocess.Popen([sys.executable, "-m", "clip_callbacks.cli", "report", str(log), "-o", str(page)]) as process:
        while process.poll() is None:
            peak = max(peak, peak_memory(process.pid))
            time.sleep(0.05)
    assert process.returncode == 0
    return time.perf_counter() - start, peak / 1e9, page.stat().st_size / 1e6


def peak_memory(pid: int) -> float:
    """So far, in bytes, from Linux; what wait4 tells includes the memory of this process, which it was forked from."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0.0)


def main() -> None:
    """Write the logs, make the reports, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=float, default=1e6, help="steps of the run, all of them logged")
    parser.add_argument("--logs", nargs="+", default=["csv", "events"], choices=["csv", "events"], help="kinds of log")
    parser.add_argument("--output", help="a file under benchmarks/results to write the table to")
    arguments = parser.parse_args()
    steps, rows = int(arguments.steps), []
    metrics_of = {"csv": 7 + BLOCKS, "events": 7}
    for kind in arguments.logs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            log = {"csv": write_csv, "events": write_events}[kind](metrics(steps), folder)
            size = log.stat().st_size / 1e6
            seconds, memory, page = measured(log, folder)
            rows.append([kind, f"{steps:,}", metrics_of[kind], f"{size:.0f}", f"{seconds:.1f}", f"{memory:.2f}", f"{page:.2f}"])
    headings = ["log", "steps logged", "metrics a step", "MB", "seconds", "peak memory, GB", "page, MB"]
    text = f"# A report of a long log\n\n{table(rows, headings)}\n\nThe whole command, imports included. {machine('cpu')}"
    publish(text, arguments.output)


if __name__ == "__main__":
    main()
