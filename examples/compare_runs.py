"""A table and a picture of runs logged with CSVLogger: what did clipping do?

python examples/compare_runs.py logs/char_rnn/csv/unclipped logs/char_rnn/csv/clipped --picture logs/char_rnn/runs.png
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from rich.console import Console
from rich.table import Table

mpl.use("agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter

COLORS = ["#d1495b", "#00798c", "#edae49", "#66a182"]


@dataclass
class Run:
    """One run's log: a row each time that something was logged."""

    name: str
    log: pd.DataFrame

    @classmethod
    def read(cls, folder: Path) -> Run:
        return cls(folder.name, pd.read_csv(folder / "metrics.csv"))

    def series(self, key: str) -> pd.Series:
        """Values of a metric over steps, NaN among them where the run broke."""
        if key not in self.log:
            return pd.Series(dtype=float)
        rows = self.log[self.log[key].notna()] if key.startswith("grad/") else self.log[self.log["epoch"].notna()]
        return rows.set_index("step")[key]

    def training(self) -> pd.Series:
        rows = self.log[self.log["epoch"].notna() & self.log["val_bits"].isna() | self.log["train_bits"].notna()]
        return rows[~rows["step"].duplicated()].set_index("step")["train_bits"]

    def final(self, key: str) -> float:
        """The last value logged; of training, the mean of the last ten."""
        if key == "train_bits":
            return float(self.training().tail(10).mean(skipna=False))
        return float(self.log.loc[self.log[key].last_valid_index(), key]) if self.log[key].notna().any() else float("nan")


def table(runs: list[Run]) -> Table:
    grid = Table(title="Loss in bits per character (guessing among 128 symbols costs 7) and total_norm")
    for heading in ("run", "train\nloss", "val\nloss", "norm\np50", "norm\np90", "norm\np99", "steps\nclipped", "steps\nskipped"):
        grid.add_column(heading, justify="left" if heading == "run" else "right")
    for run in runs:
        norms = run.series("grad/total_norm")
        clipped = run.series("grad/clip_fraction")
        skipped = run.series("grad/skipped_steps")
        grid.add_row(
            run.name,
            *(number(run.final(key)) for key in ("train_bits", "val_bits")),
            *(number(norms.quantile(share)) for share in (0.5, 0.9, 0.99)),
            f"{clipped.mean():.1%}" if len(clipped) else "-",
            f"{skipped.max():.0f}" if len(skipped) else "-",
        )
    return grid


def number(value: float) -> str:
    return "NaN" if pd.isna(value) else f"{value:.3g}"


def picture(runs: list[Run], path: Path) -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 7), sharex=True, layout="constrained")
    for run, color in zip(runs, COLORS, strict=False):
        loss = run.training()
        top.plot(loss.index, loss.rolling(5, min_periods=1).mean(), color=color, label=run.name)
        norms = run.series("grad/total_norm")
        bottom.plot(norms.index, norms, color=color, label=run.name, linewidth=0.9)
        broken = loss.index[loss.isna()]
        if len(broken):
            last = loss.dropna().index.max()
            for axes in (top, bottom):
                axes.axvline(last, color=color, linestyle=":")
            top.annotate(
                f"{run.name}: loss is NaN from step {broken[0]}", (last, 0.92), xycoords=("data", "axes fraction"),
                xytext=(8, 0), textcoords="offset points", color=color,
            )  # fmt: skip
        limit = run.series("grad/max_norm")
        if len(limit):
            bottom.axhline(limit.iloc[-1], color="black", linestyle="--", linewidth=1, label=f"max_norm {limit.iloc[-1]:g}")
    top.axhline(7, color="gray", linestyle="--", linewidth=1, label="guessing")
    top.set(yscale="log", yticks=[2, 3, 5, 7, 10, 20, 50], ylabel="training loss (bits per character)")
    top.set_title("Character RNN on the source of Python's standard library")
    top.yaxis.set_major_formatter(ScalarFormatter())
    top.yaxis.set_minor_formatter(NullFormatter())
    bottom.set(ylabel="total_norm before clipping", xlabel="optimizer step", yscale="log")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold a metrics.csv")
    parser.add_argument("--picture", type=Path, help="where to write the picture (PNG)")
    arguments = parser.parse_args()
    runs = [Run.read(folder) for folder in arguments.folders]
    Console().print(table(runs))
    if arguments.picture:
        picture(runs, arguments.picture)
        print(f"Picture: {arguments.picture}")


if __name__ == "__main__":
    main()
