"""How the cost of a step grows with entries, tensors and steps: ``python -m benchmarks.growth``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import matplotlib as mpl
import torch
from torch import Tensor, nn

from benchmarks.timing import RESULTS, UNCOUNTED, interleaved, machine, publish, rounds_for, table
from clip_callbacks import ClipRule, ParameterTable, clip_step
from clip_callbacks.core.actions import Action
from clip_callbacks.core.rules import Plan
from clip_callbacks.core.step import apply_step, measure_step
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.stats.run_history import RunHistory

mpl.use("agg")
from matplotlib import pyplot as plt

TORCH, OURS, LOCAL, FLOOR = "torch clip_grad_norm_", "clip_step, global", "clip_step, per parameter", "one bare read"
Series = dict[str, list[float]]


def with_gradients(tensors: int, entries: int) -> list[nn.Parameter]:
    """Parameters whose own entries share one number, so that memory goes to the gradients."""
    parameters = [nn.Parameter(torch.zeros(1).expand(entries)) for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.ones(entries)
    return parameters


def seconds(parameters: list[nn.Parameter], budget_s: float) -> dict[str, float]:
    """Median seconds of a step with nothing to clip."""
    gradients: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    tensors = ParameterTable(parameters)
    whole, local = [ClipRule(1e9)], [ClipRule(1e9, "parameter")]
    runs: dict[str, Callable[[], object]] = {
        TORCH: lambda: nn.utils.clip_grad_norm_(parameters, 1e9),
        OURS: lambda: clip_step(tensors, rules=whole),
        LOCAL: lambda: clip_step(tensors, rules=local),
        FLOOR: lambda: torch._foreach_norm(gradients),
    }

    def fill() -> None:
        """Write the gradients again, as a backward pass does: it matters which core's cache holds them."""
        for gradient in gradients:
            gradient.fill_(1.0)

    first = interleaved(runs, fill, rounds=1, synchronize=bool)
    times = interleaved(runs, fill, rounds=rounds_for(sum(each[0] for each in first.values()), budget_s), synchronize=bool)
    return {name: median(each) for name, each in times.items()}


def over(sizes: Sequence[int], make: Callable[[int], list[nn.Parameter]], budget_s: float) -> Series:
    """Seconds for each size, by candidate."""
    series: Series = {}
    for size in sizes:
        for name, value in seconds(make(size), budget_s).items():
            series.setdefault(name, []).append(value)
    return series


@torch.no_grad()
def over_steps(marks: Sequence[int]) -> Series:
    """Mean seconds of a step with all that a run remembers of it, over the steps up to each mark since half of it."""
    parameters = with_gradients(50, 64)
    tensors, history = TensorTable.of(parameters), RunHistory()
    plan = Plan.of(tensors, [ClipRule(1e9)], ())
    state = plan.init()
    means, start, first = [], 0.0, 1
    begins, ends = {mark // 2 + 1 for mark in marks}, set(marks)
    for step in range(1 - UNCOUNTED, marks[-1] + 1):
        if step in begins:
            start, first = time.perf_counter(), step
        record, state = apply_step(measure_step(tensors, plan, state), state, Action.CLIP)
        history.add(record, is_new=True, is_healthy=True)
        if step in ends:
            means.append((time.perf_counter() - start) / (step - first + 1))
    return {"clip_step and the run's history": means}


def draw(panels: Sequence[tuple[str, Sequence[int], Series]], file: Path) -> None:
    """A log-log plot for each kind of growth."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained")
    for axis, (label, sizes, series) in zip(axes, panels, strict=True):
        for name, values in series.items():
            axis.loglog(sizes, [1e6 * value for value in values], marker="o", markersize=3, label=name)
        axis.set(xlabel=label, ylabel="time of a step (µs)")
        axis.grid(visible=True, which="major", alpha=0.3)
        axis.legend(fontsize=8)
    axes[-1].set_ylim(1, 1e4)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=float, default=1e9, help="entries of the largest gradient, 4 bytes each")
    parser.add_argument("--steps", type=float, default=1e6)
    parser.add_argument("--budget-s", type=float, default=5.0, help="seconds for each size")
    parser.add_argument("--output", help="file in benchmarks/results to write; the picture gets the same name")
    arguments = parser.parse_args()
    entries = [10**power for power in range(2, 10) if 10**power <= arguments.largest]
    tensors = [10, 30, 100, 300, 1000, 3000, 10_000]
    marks = [10**power for power in range(1, 7) if 10**power <= arguments.steps]
    panels = [
        ("entries, in 10 tensors", entries, over(entries, lambda size: with_gradients(10, size // 10), arguments.budget_s)),
        ("tensors of 100 entries", tensors, over(tensors, lambda size: with_gradients(size, 100), arguments.budget_s)),
        ("optimizer steps so far (50 tensors)", marks, over_steps(marks)),
    ]
    note = "Microseconds; nothing to clip. Made by `python -m benchmarks.growth`."
    parts = [f"# How the cost of a step grows, CPU\n\n{machine('cpu')}\n\n{note}"]
    for label, sizes, series in panels:
        rows = [[f"{size:g}", *(f"{1e6 * values[i]:.4g}" for values in series.values())] for i, size in enumerate(sizes)]
        parts.append(table(rows, [label, *series]))
    if arguments.output:
        picture = Path(arguments.output).with_suffix(".png").name
        RESULTS.mkdir(exist_ok=True)
        draw(panels, RESULTS / picture)
        parts.append(f"![Time of a step over entries, tensors and steps, log-log]({picture})")
    publish("\n\n".join(parts), arguments.output)


if __name__ == "__main__":
    main()
