"""A step with nothing to clip for several orders of the norm and dtypes: ``python -m benchmarks.norms``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch

from benchmarks.gradient_sets import SETS, Holder
from benchmarks.timing import Ratio, interleaved, machine, publish, rounds_for, table
from clip_callbacks import ParameterTable, clip_step

ORDERS = (1.0, 2.0, 3.0, float("inf"), 0.5, 1.5, 2.5, 4.0, 10.0, 2.7)
READ = "bare read"


def bare_read(holder: Holder) -> Callable[[], object]:
    """The floor: the bytes of all gradients added up as integers, eight at a time."""
    flat = [gradient.view(-1).view(torch.uint8) for gradient in holder.gradients]
    words = [each[: len(each) // 8 * 8].view(torch.int64) for each in flat]
    return lambda: [each.sum() for each in words]


def candidates(holder: Holder, orders: list[float]) -> dict[str, Callable[[], object]]:
    """A bare read, and for each order this package's step and torch's clip."""
    named, parameters = ParameterTable(holder.named_parameters()), list(holder.parameters())

    def ours(order: float) -> Callable[[], object]:
        return lambda: clip_step(named, max_norm=1e30, norm_type=order)

    def theirs(order: float) -> Callable[[], object]:
        return lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e30, order)

    return {
        READ: bare_read(holder),
        **{f"ours {order:g}": ours(order) for order in orders},
        **{f"torch {order:g}": theirs(order) for order in orders},
    }


def rows(name: str, dtype: torch.dtype, orders: list[float], budget_s: float) -> Iterator[list[object]]:
    """Lines of the table, one for each order."""
    holder = Holder(SETS[name], "cpu", dtype)
    runs = candidates(holder, orders)
    first = interleaved(runs, holder.refill, rounds=1, synchronize=lambda: None)
    rounds = rounds_for(sum(times[0] for times in first.values()), budget_s)
    times = interleaved(runs, holder.refill, rounds=rounds, synchronize=lambda: None)
    for order in orders:
        mine = times[f"ours {order:g}"]
        yield [
            f"{order:g}",
            *(Ratio.of(mine, times[reference]) for reference in (f"torch {order:g}", "ours 2", READ)),
            Ratio.of(times[f"torch {order:g}"], times[READ]),
        ]


def section(name: str, dtype: torch.dtype, orders: list[float], budget_s: float) -> str:
    """The table of one set of gradients in one dtype."""
    headers = [
        "order",
        "against torch's clip",
        "against ours of order 2",
        "against a bare read",
        "torch's clip against a bare read",
    ]
    return f"### {name}, {str(dtype).removeprefix('torch.')}\n\n{table(list(rows(name, dtype, orders, budget_s)), headers)}\n"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--orders", nargs="*", type=float, default=list(ORDERS))
    parser.add_argument("--budget-s", type=float, default=60.0, help="seconds for each table; at least 11 rounds")
    parser.add_argument("--sets", nargs="*", default=["GPT-2"], help="beginnings of the names of gradient sets")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--output", help="file in benchmarks/results to write")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    orders = sorted({2.0, *arguments.orders})
    note = (
        "A step with nothing to clip, as a ratio to torch's `clip_grad_norm_` of the same order, to a step of order 2, and to a "
        "bare read of the bytes (their sum as integers), of the same round. torch's clip also multiplies the gradients if there is "
        "nothing to clip. Made by `python -m benchmarks.norms`.\n"
    )
    sections = [
        section(name, getattr(torch, dtype), orders, arguments.budget_s)
        for name in SETS
        if name.startswith(tuple(arguments.sets))
        for dtype in arguments.dtypes
    ]
    publish("\n".join([f"# Orders of the norm\n\n{machine('cpu')}\n", note, *sections]).rstrip(), arguments.output)


if __name__ == "__main__":
    main()
