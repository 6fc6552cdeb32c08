"""What limits, scopes, several rules and shadows cost on one set of gradients: ``python -m benchmarks.rules``."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import rivals
from benchmarks.gradient_sets import SETS, Holder
from benchmarks.timing import Ratio, interleaved, machine, publish, rounds_for, table
from clip_callbacks import (
    BlockNorms,
    ClipRule,
    EmaLimit,
    FixedLimit,
    Limit,
    LinearLimit,
    ParameterTable,
    QuantileLimit,
    RatioLimit,
    RobustZScoreLimit,
    TightestLimit,
    WarmupLimit,
    ZScoreLimit,
    clip_step,
)
from clip_callbacks.core.limits import label
from clip_callbacks.core.rules import ClipState

LIMITS: tuple[Limit, ...] = (
    FixedLimit(1.0),
    LinearLimit(2.0, 1.0, 1000),
    QuantileLimit(),
    ZScoreLimit(),
    RobustZScoreLimit(),
    EmaLimit(),
    TightestLimit(ZScoreLimit(), 1.0),
    WarmupLimit(ZScoreLimit(), steps=100, warmup_limit=1.0),
    RatioLimit(),
)

REPEATED_GRADIENTS = (
    "Every step has the same gradients: fixed limits, EmaLimit and RatioLimit clip them, which costs a write, the others do not."
)

Rules = Sequence[ClipRule]


class Stepping:
    """``clip_step`` with the state that it returned last."""

    def __init__(self, held: ParameterTable, rules: Rules, shadows: Rules = ()) -> None:
        self._held, self._rules, self._shadows = held, rules, shadows
        self._state: ClipState | None = None

    def __call__(self) -> None:
        """One step."""
        _, self._state = clip_step(self._held, self._state, rules=self._rules, shadow=self._shadows)


class Operations(TorchDispatchMode):
    """Counts what is dispatched, and what of it takes lists of gradients."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self._entries = entries
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one."""
        self.counts["all"] += 1
        first = args[0] if args else None
        tensors = first if isinstance(first, (list, tuple)) else [first]
        held = sum(tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor))
        self.counts["of gradients"] += 2 * held >= self._entries
        return function(*args, **(kwargs or {}))


def timed(holder: Holder, runs: dict[str, Callable[[], object]], budget_s: float) -> dict[str, list[float]]:
    """Seconds of each candidate, round by round."""
    first = interleaved(runs, holder.refill, rounds=1, synchronize=bool)
    rounds = rounds_for(2 * sum(times[0] for times in first.values()), budget_s)
    return interleaved(runs, holder.refill, rounds=rounds, synchronize=bool)


def scopes(holder: Holder, held: ParameterTable, budget_s: float) -> str:
    """Each limit: per parameter against global, and both against torch's clip."""
    rows = []
    for limit in LIMITS:
        runs: dict[str, Callable[[], object]] = {
            "torch": rivals.torch_clip(holder, 1e9),
            "global": Stepping(held, [ClipRule(limit)]),
            "parameter": Stepping(held, [ClipRule(limit, "parameter")]),
        }
        times = timed(holder, runs, budget_s)
        against = [Ratio.of(times[name], times["torch"]) for name in ("global", "parameter")]
        rows.append([label(limit), *against, Ratio.of(times["parameter"], times["global"])])
    return table(rows, ["limit", "global / torch's clip", "per parameter / torch's clip", "per parameter / global"])


def several(holder: Holder, held: ParameterTable, budget_s: float) -> str:
    """Two rules and shadows against one rule; operations too. Everything is clipped."""
    low = 0.1 * holder.total_norm / len(held) ** 0.5
    one, local = [ClipRule(0.5 * holder.total_norm)], [ClipRule(low, "parameter")]
    shadows = [ClipRule(limit) for limit in LIMITS[1:-1]]
    runs: dict[str, Callable[[], object]] = {
        "one rule, global": Stepping(held, one),
        "one rule, per parameter": Stepping(held, local),
        "two rules, global then per parameter": Stepping(held, [*one, *local]),
        f"one rule, global, and {len(shadows)} shadows": Stepping(held, one, shadows),
    }
    entries = sum(gradient.numel() for gradient in holder.gradients)
    counts = {}
    for name, run in runs.items():
        run()
        holder.refill()
        with Operations(entries) as operations:
            run()
        counts[name] = operations.counts
    times = timed(holder, runs, budget_s)
    first, second, *_ = runs
    rows = [
        [name, counts[name]["of gradients"], counts[name]["all"], *(Ratio.of(times[name], times[base]) for base in (first, second))]
        for name in runs
    ]
    return table(rows, ["clipping", "operations on the gradients", "all operations", f"time / {first}", f"time / {second}"])


def units(holder: Holder, held: ParameterTable, budget_s: float) -> str:
    """AGC: what others do, and the unit-wise rule, which clips nothing here and everything."""
    runs: dict[str, Callable[[], object]] = {
        "torch's clip, global": rivals.torch_clip(holder, 1e9),
        "fixed limit, per unit, nothing to clip": Stepping(held, [ClipRule(1e9, "unit")]),
        "RatioLimit, per unit, nothing to clip": Stepping(held, [ClipRule(RatioLimit(1e9), "unit")]),
        "RatioLimit, per unit, clipping": Stepping(held, [ClipRule(RatioLimit(), "unit")]),
        "smartclip AGC": rivals.smartclip_agc(holder),
        "pytorch_optimizer AGC": rivals.pytorch_optimizer_agc(holder),
    }
    times = timed(holder, runs, budget_s)
    reference = next(iter(runs))
    return table([[name, Ratio.of(times[name], times[reference])] for name in runs], ["AGC", f"time / {reference}"])


def over_steps(steps: int) -> dict[str, tuple[float, float]]:
    """Microseconds of each limit's own work, at its first steps and at its last ones."""
    times_of = {}
    few = min(1000, steps // 2)
    for limit in LIMITS:
        state, norms, times = limit.init(1), torch.rand(1024, 1) + 0.5, []
        blocks = [BlockNorms(row, weights=torch.ones(1)) for row in norms]
        for step in range(steps):
            start = time.perf_counter()
            _, state = limit.step(blocks[step % len(blocks)], state)
            if step < few or step >= steps - few:
                times.append(time.perf_counter() - start)
        times_of[label(limit)] = 1e6 * median(times[10:few]), 1e6 * median(times[few:])
    return times_of


def growth(steps: int) -> str:
    """The table of these times."""
    few = min(1000, steps // 2)
    rows = [[name, f"{early:.3g}", f"{late:.3g}", f"{late / early:.2f}"] for name, (early, late) in over_steps(steps).items()]
    return table(rows, ["limit, one block", f"first {few} steps, µs", f"last {few} of {steps:g}, µs", "ratio"])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", default=next(iter(SETS)), help="beginning of the name of a gradient set")
    parser.add_argument("--budget-s", type=float, default=10.0, help="seconds for each comparison")
    parser.add_argument("--steps", type=float, default=1e6, help="of the limits alone")
    parser.add_argument("--output", help="file in benchmarks/results to write")
    arguments = parser.parse_args()
    name = next(name for name in SETS if name.startswith(arguments.set))
    holder = Holder(SETS[name], "cpu", torch.float32)
    held = ParameterTable(holder.named_parameters())
    note = "Medians (quartiles) of ratios of the same round, interleaved in one process. Made by `python -m benchmarks.rules`."
    parts = [
        f"# What limits, scopes and rules cost, CPU\n\n{machine('cpu')}\n\n{note}\n\nGradients: {name}.",
        f"## Limits and scopes\n\n{REPEATED_GRADIENTS}\n\n{scopes(holder, held, arguments.budget_s)}",
        f"## Several rules\n\n{several(holder, held, arguments.budget_s)}",
        f"## Units\n\n{units(holder, held, arguments.budget_s)}",
        f"## Over steps\n\n{growth(int(arguments.steps))}",
    ]
    publish("\n\n".join(parts), arguments.output)


if __name__ == "__main__":
    main()
