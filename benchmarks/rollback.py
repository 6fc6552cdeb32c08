"""What the copy for ``NonFiniteGuard(rollback=Rollback())`` costs and takes: ``python -m benchmarks.rollback``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch

from benchmarks import rivals
from benchmarks.gradient_sets import SETS, Holder
from benchmarks.timing import Ratio, interleaved, machine, publish, rounds_for, table
from clip_callbacks.trainer.snapshot import Snapshot

EVERY = 100
"""Good steps between copies, by default."""
KEEP, RESTORE, STEP, READ = "the copy", "restoring it", "one fused AdamW step", "one read of the gradients"


class Run:
    """A network's weights, gradients and AdamW's two moments, and one copy of what a rollback needs."""

    def __init__(self, name: str, device: str) -> None:
        self.holder = Holder(SETS[name], device, torch.float32)
        self.optimizer = torch.optim.AdamW(self.holder.parameters(), lr=1e-6, fused=True)
        self.optimizer.step()
        self.memory = Snapshot()
        self.kept = self.memory.keep(self.tree)

    @property
    def tree(self) -> list[object]:
        """What is copied."""
        return [list(self.holder.parameters()), self.optimizer.state]

    def candidates(self) -> dict[str, Callable[[], object]]:
        """What is timed."""
        return {
            KEEP: lambda: self.memory.keep(self.tree),
            RESTORE: lambda: self.memory.restore(self.kept, self.tree),
            STEP: self.optimizer.step,
            READ: rivals.bare_read(self.holder),
        }


def section(name: str, device: str, budget_s: float) -> str:
    """The table of one set of tensors."""
    run = Run(name, device)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    candidates = run.candidates()
    first = interleaved(candidates, lambda: None, rounds=1, synchronize=synchronize)
    rounds = rounds_for(sum(times[0] for times in first.values()), budget_s)
    times = interleaved(candidates, lambda: None, rounds=rounds, synchronize=synchronize)
    rows = [
        [what, f"{1e3 * median(times[what]):.3g}", Ratio.of(times[what], times[STEP]), Ratio.of(times[what], times[READ])]
        for what in (KEEP, RESTORE, STEP, READ)
    ]
    share = Ratio.of([seconds / EVERY for seconds in times[KEEP]], times[STEP])
    headers = ["", "ms", "ratio to the step: median (quartiles)", "ratio to the read"]
    size = f"The copy holds {run.memory.nbytes / 2**20:,.1f} MiB: the weights, AdamW's two moments and step counters."
    cost = f"A copy each {EVERY} steps adds {share.median:.2%} to the step ({share.lower:.2%}-{share.upper:.2%})."
    return f"### {name}\n\n{size}\n\n{table(rows, headers)}\n\n{cost}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--budget-s", type=float, default=30.0, help="seconds for each set of tensors")
    parser.add_argument("--sets", nargs="*", default=["GPT-2"], help="beginnings of the names of sets of tensors")
    parser.add_argument("--output", help="file in benchmarks/results to write")
    arguments = parser.parse_args()
    names = [name for name in SETS if name.startswith(tuple(arguments.sets))]
    title = f"# The copy for a rollback, {arguments.device}, float32\n\n{machine(arguments.device)}\n"
    note = (
        "Interleaved in one process; ratios are of the same round. On a GPU the copy goes to pinned host memory; its time is until "
        "the device is through with it. Made by `python -m benchmarks.rollback`.\n"
    )
    publish("\n".join([title, note, *(section(name, arguments.device, arguments.budget_s) for name in names)]), arguments.output)


if __name__ == "__main__":
    main()
