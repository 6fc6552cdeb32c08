"""Every budget, with its figure and whether it holds: ``python -m benchmarks``, in less than ten minutes on a quiet machine.

Each figure is made as in the benchmark that the table names, which shows more of it.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from benchmarks import importing, monitor, norms, rules, step, transactions
from benchmarks.gradient_sets import SETS, Holder
from benchmarks.growth import over_steps
from benchmarks.lockstep import Added
from benchmarks.timing import machine, publish, table
from benchmarks.trainer import (
    BARE,
    BY_HAND,
    CLIPPING,
    FAMILY,
    FLOOR,
    FUSED_BARE,
    FUSED_FAMILY,
    FUSED_OURS,
    FUSED_REFERENCE,
    NETWORKS,
    NOTHING_TO_CLIP,
    OURS,
    REFERENCE,
    Case,
    Network,
    measure,
    silence,
)

GPT2, RESNET, TINY, SMALL = SETS
TIGHT = (1.01, 1.02, 1.05)
"""Bounds that three digits are needed for."""

CASES = {NOTHING_TO_CLIP: "nothing to clip", CLIPPING: "clipping"}


QUICK_SHARE = 0.02
"""Share of the steps that a quick run takes."""


TRAINER_REASON = (
    "Beside one read and one product there are four hooks of Lightning and some eighty calls of Python, which find little in the "
    "caches after a forward and a backward pass. They weigh most where the gradients themselves fit in a large cache."
)
"""Why lines of the Trainer are missed."""

REASONS = {
    "clip_step on 50 tiny tensors": (
        "Half of it is Python: some fifty calls, and an object of Python for each gradient. How long those take relative to "
        "torch's kernels differs between machines by a factor of two."
    ),
    "a step with p = 1": (
        "torch has no vectorized kernel of order 1: absolute values are written to the cache and added up, two passes for one."
    ),
    "a step with p = 3": (
        "torch has no vectorized kernel of order 3: absolute values, a square, and a product that is added up, three passes for "
        "one. torch's own takes ten times as long."
    ),
    "GradientClipping in a Trainer": TRAINER_REASON,
    "all four callbacks in a Trainer": TRAINER_REASON,
    "monitor with every option": (
        "Half of it is the one logging step in fifty, which reads gradients and weights several times; half is Python, for the two "
        "thresholds and the loss of each window."
    ),
    "bfloat16": "Each piece is converted in the cache before it is read, since no kernel adds up bfloat16 in float32.",
    "scope parameter over scope global, 50 tiny": (
        "A factor for each tensor in place of one for all: some more small operations, ten microseconds each in a cold cache."
    ),
}
"""Why a line is missed, by how it begins."""


@dataclass(frozen=True)
class Budget:
    """One line: what is measured, its upper bound, the figure, and what a bare read of the gradients takes in the same unit."""

    work: str
    bound: float
    figure: float
    floor: float | None = None

    @property
    def row(self) -> list[str]:
        """The line as it is printed."""
        digits = 3 if self.bound in TIGHT else 2
        holds = "holds" if self.figure <= self.bound else "**missed**"
        floor = "" if self.floor is None else f"{self.floor:.2f}"
        return [self.work, f"{self.bound:g}", f"{self.figure:.{digits}f}", floor, holds]


def functions(budget_s: float, sets: Sequence[str]) -> Iterator[Budget]:
    """Time ``clip_step`` against torch's clip, and local scopes against the global one (benchmarks.step)."""
    bounds = {GPT2: (0.5, 1.0), TINY: (0.35, 0.55), SMALL: (0.3, 0.45)}
    names = {GPT2: "GPT-2 small's 148 gradients", RESNET: "ResNet-50's 161", TINY: "50 tiny tensors", SMALL: "400 small ones"}
    local = []
    for key in sets:
        name, holder = names[key], Holder(SETS[key], "cpu", torch.float32)
        for column, (case, factor) in enumerate(step.COLUMNS.items()):
            runs = step.ours(holder, factor * holder.total_norm)
            chosen = {run: runs[run] for run in (step.REFERENCE, step.FLOOR, step.OURS, step.LOCAL)}
            times = step.measure(holder, chosen, budget_s=budget_s)
            if key in bounds:
                floor = _ratio(times[step.FLOOR], times[step.REFERENCE])
                figure = _ratio(times[step.OURS], times[step.REFERENCE])
                yield Budget(f"clip_step on {name}, {case}, over torch's clip", bounds[key][column], figure, floor)
            figure, floor = _ratio(times[step.LOCAL], times[step.OURS]), _ratio(times[step.FLOOR], times[step.OURS])
            local.append(Budget(f"scope parameter over scope global, {name}, {case}", 1.1, figure, floor))
    yield from local


def _ratio(times: list[float], references: list[float]) -> float:
    return median(a / b for a, b in zip(times, references, strict=True))


def trainers(share: float, networks: Sequence[Case]) -> Iterator[Budget]:
    """Time what callbacks add to a step of a real Trainer, over what gradient_clip_val adds (benchmarks.trainer)."""
    only = (BARE, FLOOR, REFERENCE, OURS, FAMILY, FUSED_BARE, FUSED_REFERENCE, FUSED_OURS, FUSED_FAMILY)
    for case in networks:
        for max_norm, bounds in {NOTHING_TO_CLIP: (0.8, 1.0), CLIPPING: (1.0, 1.15)}.items():
            times = measure(case, max_norm, steps=max(16, int(case.steps * share)), only=only)
            plain, fused = Added(times, BARE), Added(times, FUSED_BARE)
            floor = plain.ratio(FLOOR, REFERENCE)
            place = f"in a Trainer, {case.name}, {CASES[max_norm]}, over gradient_clip_val"
            yield Budget(f"GradientClipping {place}", bounds[0], plain.ratio(OURS, REFERENCE), floor)
            yield Budget(f"GradientClipping {place}, fused optimizer", bounds[0], fused.ratio(FUSED_OURS, FUSED_REFERENCE))
            yield Budget(f"all four callbacks {place}", bounds[1], plain.ratio(FAMILY, REFERENCE), floor)
            yield Budget(f"all four callbacks {place}, fused optimizer", bounds[1], fused.ratio(FUSED_FAMILY, FUSED_REFERENCE))
    times = measure(NETWORKS[0], NOTHING_TO_CLIP, steps=max(16, int(200 * share)), only=(BARE, FAMILY, BY_HAND))
    yield Budget(
        "all four callbacks in a Trainer over `grad_norm` + `log_dict` + isfinite loop + clip",
        0.05,
        Added(times, BARE).ratio(FAMILY, BY_HAND),
    )


def monitors(share: float) -> Iterator[Budget]:
    """Time a fit with every option of the monitor and both thresholds, over the monitor alone (benchmarks.monitor)."""
    network = partial(Network, 512, 5, batch_size=monitor.BATCH_SIZE)
    figure = monitor.ratios(network, max(16, int(450 * share)))[monitor.EVERYTHING].median
    yield Budget("monitor with every option and a guard with two adaptive thresholds, over the monitor alone", 1.02, figure)


def orders(budget_s: float, sets: Sequence[str]) -> Iterator[Budget]:
    """Time other orders of the norm than 2 over order 2, and half precision over torch's clip (benchmarks.norms)."""
    holder = Holder(SETS[sets[0]], "cpu", torch.float32)
    runs = norms.candidates(holder, [1.0, 2.0, 3.0, math.inf])
    times = step.measure(holder, {name: run for name, run in runs.items() if not name.startswith("torch")}, budget_s=budget_s)
    for order in ("1", "3", "inf"):
        figure, floor = (_ratio(times[name], times["ours 2"]) for name in (f"ours {order}", norms.READ))
        yield Budget(f"a step with p = {order} over one with p = 2, nothing to clip, {sets[0]}", 1.3, figure, floor)
    holder = Holder(SETS[sets[0]], "cpu", torch.bfloat16)
    times = step.measure(holder, norms.candidates(holder, [2.0]), budget_s=budget_s)
    figure, floor = (_ratio(times[name], times["torch 2"]) for name in ("ours 2", norms.READ))
    yield Budget(f"bfloat16, nothing to clip, over torch's clip of three digits, {sets[0]}", 1.0, figure, floor)


def good_steps(share: float) -> Iterator[Budget]:
    """Time good steps with all state guarded, over batch statistics only (benchmarks.transactions)."""
    for name, make in (("50 batch norms", transactions.residual), ("transformer", transactions.transformer)):
        switch, _ = transactions.run(make(), max(24, int(150 * share)))
        fewer, everything_ = (median(switch.calls[kind]) for kind in (False, True))
        # the difference is within the noise of a step: the beginning of a batch is timed by itself
        yield Budget(
            f"every buffer and param group guarded, over batch statistics only, {name}",
            1.01,
            1 + (everything_ - fewer) / median(switch.times[False]),
        )


def over_time(share: float) -> Iterator[Budget]:
    """Time a late step over an early one (benchmarks.growth, benchmarks.rules)."""
    marks = [100, max(1000, int(3e4 * share))]
    (means,) = over_steps(marks).values()
    yield Budget(f"a step and its record, at step {marks[-1]:g} over step {marks[0]}", 1.1, means[-1] / means[0])
    steps = max(100, int(20_000 * share))
    limit, (early, late) = max(rules.over_steps(steps).items(), key=lambda item: item[1][1] / item[1][0])
    yield Budget(f"the limit that grows most: {limit}, at step {steps:g} over its first steps", 1.1, late / early)


def imports(rounds: int) -> Iterator[Budget]:
    """Time the import of the package beside its Lightning (benchmarks.importing)."""
    if not rounds:
        return
    # the first one writes bytecode
    pairs = [importing.seconds_of("lightning.pytorch", importing.PACKAGE) for _ in range(rounds + 1)][1:]
    yield Budget(
        "`import clip_callbacks` after `import lightning.pytorch`, both over the latter",
        1.05,
        median((a + b) / a for a, b in pairs),
    )


def counted() -> Iterator[Budget]:
    """Count the operations of a step."""
    for case, max_norm, bound in (("nothing to clip", 1e6, 6), ("clipping", 1e-6, 8)):
        holder = Holder([(10,)] * 100, "cpu", torch.float32)
        named = step.ParameterTable(holder.named_parameters())
        step.clip_step(named, max_norm=max_norm)
        holder.refill()
        with rules.Operations(1000) as operations:
            step.clip_step(named, max_norm=max_norm)
        yield Budget(f"operations dispatched for 100 dense tensors, {case}", bound, operations.counts["all"])


TESTS = {
    "host syncs: 0 on a fused optimizer, else at most 1; extra memory below 1 % of the gradients": ["tests/core/test_budget.py"],
    "collectives of a step: none under DDP, at most 1 where tensors are sharded": [
        "tests/distributed/test_logs_and_checkpoints.py",
        "-k",
        "test_collectives_of_a_step",
    ],
}
"""Budgets that are asserted by tests, and which."""


def asserted() -> Iterator[list[str]]:
    """Run these tests."""
    for work, chosen in TESTS.items():
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", *chosen], capture_output=True, text=True, check=False)
        outcome = (done.stdout.splitlines() or ["pytest did not start"])[-1].strip("= ")
        yield [work, "", outcome.partition(" in ")[0], "", "**missed**" if done.returncode else "holds"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps: to see that it runs; the figures say nothing")
    parser.add_argument("--output", help="file in benchmarks/results to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    silence()
    share = QUICK_SHARE if arguments.quick else 1.0
    rounds = 0 if arguments.quick else 4
    sets = (TINY,) if arguments.quick else tuple(SETS)
    networks = NETWORKS[:1] if arguments.quick else NETWORKS
    parts: tuple[Iterator[Budget], ...] = (
        counted(),
        functions(3.0 * share, sets),
        trainers(share, networks),
        orders(2.0 * share, sets),
        monitors(share),
        good_steps(share),
        over_time(share),
        imports(rounds),
    )
    rows, start = [], time.perf_counter()
    for part in parts:
        for budget in part:
            sys.stderr.write(f"{time.perf_counter() - start:4.0f} s  {'  '.join(budget.row)}\n")
            rows.append(budget.row)
    if not arguments.quick:
        rows += asserted()
    note = (
        "Ratios of times in one process, interleaved, medians; one thread. The floor is one bare read of the gradients "
        "(`torch._foreach_norm`, its result unused), in the unit of the figure. Made by `python -m benchmarks`, in "
        f"{(time.perf_counter() - start) / 60:.1f} minutes; the other modules of `benchmarks` show more of each line."
    )
    text = table(rows, ["work", "budget", "measured", "floor", ""])
    missed = [row[0] for row in rows if row[-1] != "holds"]
    reasons = [f"- {work}: {why}" for work, why in REASONS.items() if any(each.startswith(work) for each in missed)]
    text += "\n\n" + "\n".join(reasons)
    publish(f"# Budgets\n\nWhat a step may cost, and what it does cost.\n\n{machine('cpu')}\n\n{note}\n\n{text}", arguments.output)


if __name__ == "__main__":
    main()
