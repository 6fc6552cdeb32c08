"""The cost of a step on sharded gradients: two processes over gloo, each tensor divided between them.

Ratios of rank 0 to torch's ``clip_grad_norm_`` on the same DTensors; interleaved, both ranks in step.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from benchmarks.gradient_sets import SETS
from benchmarks.timing import Ratio, interleaved, machine, publish, table
from clip_callbacks import ClipRule, ParameterTable, clip_step

REFERENCE = "torch clip_grad_norm_"
RANKS = 2


def candidates(parameters: list[nn.Parameter], max_norm: float) -> dict[str, Callable[[], object]]:
    """What to time."""
    held = ParameterTable(parameters)
    scopes = {scope: [ClipRule(max_norm, scope)] for scope in ("global", "parameter")}
    return {
        REFERENCE: lambda: torch.nn.utils.clip_grad_norm_(parameters, max_norm),
        "clip_step, global": lambda: clip_step(held, rules=scopes["global"]),
        "clip_step, per parameter": lambda: clip_step(held, rules=scopes["parameter"]),
    }


def work(rank: int, meeting_point: str, names: list[str], rounds: int, output: str | None) -> None:
    """One rank; the first one prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting_point}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    sections = []
    for name in names:
        parameters = [nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(0)])) for shape in SETS[name]]
        rows: dict[str, list[object]] = {}
        for max_norm in (1e9, 1e-3):

            def refill(parameters: list[nn.Parameter] = parameters) -> None:
                for parameter in parameters:
                    parameter.grad = torch.ones_like(parameter)

            times = interleaved(candidates(parameters, max_norm), refill, rounds=rounds, synchronize=dist.barrier)
            for candidate, each in times.items():
                rows.setdefault(candidate, []).extend([Ratio.of(each, times[REFERENCE]), f"{1e3 * median(each):.2f}"])
        columns = ["ratio: median (quartiles)", "nothing to clip", "ms", "clipping", "ms"]
        sections.append(f"### {name}\n\n{table([[candidate, *row] for candidate, row in rows.items()], columns)}\n")
    if rank == 0:
        title = f"# A step on sharded gradients, {RANKS} ranks, CPU\n\n{machine('cpu')} on each rank\n"
        note = "Each tensor divided between the ranks; one collective for `clip_step`. Made by `python -m benchmarks.ranks`.\n"
        publish("\n".join([title, note, *sections]).rstrip(), output)
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="*", default=list(SETS)[1:], help="beginnings of the names of gradient sets")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--output", help="file in benchmarks/results to write")
    arguments = parser.parse_args()
    names = [name for name in SETS if name.startswith(tuple(arguments.sets))]
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = str(Path(folder) / "meeting-point")
        # forked: torch need not be imported again
        torch.multiprocessing.start_processes(
            work, (meeting_point, names, arguments.rounds, arguments.output), nprocs=RANKS, start_method="fork"
        )


if __name__ == "__main__":
    main()
