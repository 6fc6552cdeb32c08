"""The temporal-order task with a vanilla recurrent network: which was first?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.limits.common import Batch, Section, colour, panels
from benchmarks.timing import table
from clip_callbacks import ClipRule, ParameterTable, QuantileLimit, RobustZScoreLimit, clip_step
from clip_callbacks.core.limits import FixedLimit, Limit
from clip_callbacks.core.rules import ClipState

LIMITS: dict[str, Limit | None] = {
    "unclipped": None,
    "FixedLimit(1.0)": FixedLimit(1.0),
    "QuantileLimit(0.1)": QuantileLimit(0.1),
    "RobustZScoreLimit()": RobustZScoreLimit(),
}
RATES = (0.01, 0.03, 0.1)
SYMBOLS, ORDERS = 6, 4
"""Two symbols that matter and four that do not; four orders of two."""
HIDDEN, BATCH, CHECKS, SOLVED = 50, 20, 10, 0.01

SHOWN = (
    "At learning rates at which unclipped training fails as sequences grow, FixedLimit and QuantileLimit go on solving it. "
    "At the lowest rate clipping does not help. RobustZScoreLimit does not stand in for them: it cuts what is unusual, and "
    "here large gradients are the usual ones."
)


@dataclass(frozen=True)
class Sizes:
    """How much to run."""

    lengths: Sequence[int]
    seeds: int
    steps: int


FULL, QUICK = Sizes((20, 30, 40, 60), 5, 2500), Sizes((10, 20), 2, 20)


def sequences(count: int, length: int, dice: torch.Generator) -> Batch:
    """One-hot symbols, shape ``(length, count, SYMBOLS)``, and which order the two that matter had."""

    def between(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=dice)

    symbols = torch.randint(2, SYMBOLS, (length, count), generator=dice)
    first, second, each = between(0, 2), between(0, 2), torch.arange(count)
    symbols[between(length // 10, 2 * length // 10 + 1), each] = first
    symbols[between(4 * length // 10, 5 * length // 10 + 1), each] = second
    return nn.functional.one_hot(symbols, SYMBOLS).float(), 2 * first + second


def start(seed: int) -> Tensor:
    """All weights of one network in a row; the recurrent ones are a rotation, so that gradients do not fade at first."""
    dice = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=dice))[0]
    inward, outward = (0.1 * torch.randn(size * HIDDEN, generator=dice) for size in (SYMBOLS, ORDERS))
    return torch.cat([rotation.flatten(), inward, torch.zeros(HIDDEN), outward, torch.zeros(ORDERS)])


def scores(networks: Tensor, symbols: Tensor) -> Tensor:
    """What each network, a row of weights, says of each sequence, shape ``(networks, count, ORDERS)``."""
    count = symbols.shape[1]
    sizes = (HIDDEN * HIDDEN, SYMBOLS * HIDDEN, HIDDEN, HIDDEN * ORDERS, ORDERS)
    recurrent, inward, bias, outward, out_bias = networks.split(sizes, 1)
    recurrent = recurrent.unflatten(1, (HIDDEN, HIDDEN))
    seen = symbols.flatten(0, 1) @ inward.unflatten(1, (SYMBOLS, HIDDEN)) + bias[:, None]
    hidden = networks.new_zeros(len(networks), count, HIDDEN)
    for now in seen.split(count, 1):
        hidden = torch.baddbmm(now, hidden, recurrent).tanh()
    return torch.baddbmm(out_bias[:, None], hidden, outward.unflatten(1, (HIDDEN, ORDERS)))


@dataclass
class Crowd:
    """Networks of all seeds, learning rates and limits, trained at once on the same sequences.

    Each tensor holds the seeds of one limit and learning rate, a network in each row: the scope "unit" clips a network as a whole.
    """

    seeds: int

    def __post_init__(self) -> None:
        """Begin with the same weights everywhere."""
        names = {f"{i}.{j}.": (limit, rate) for i, limit in enumerate(LIMITS.values()) for j, rate in enumerate(RATES)}
        first = torch.stack([start(seed) for seed in range(self.seeds)])
        self.tensors = [nn.Parameter(first.clone()) for _ in names]
        self.table = ParameterTable(list(zip(names, self.tensors, strict=True)))
        self.rules = [ClipRule(limit, "unit", include=f"^{name}") for name, (limit, _) in names.items()]
        groups = [{"params": [each], "lr": rate} for each, (_, rate) in zip(self.tensors, names.values(), strict=True)]
        self.optimizer = torch.optim.SGD(groups)
        self.state: ClipState | None = None

    def learn(self, batch: Batch) -> None:
        """One step of each; a network whose own gradient is not finite stands still."""
        symbols, orders = batch
        found = scores(torch.cat([*self.tensors]), symbols)
        self.optimizer.zero_grad()
        (nn.functional.cross_entropy(found.flatten(0, 1), orders.repeat(len(found)), reduction="sum") / len(orders)).backward()
        for tensor in self.tensors:
            assert tensor.grad is not None
            tensor.grad[~tensor.grad.isfinite().all(1)] = 0.0
        _, self.state = clip_step(self.table, self.state, rules=self.rules)
        self.optimizer.step()

    @torch.no_grad()
    def errors(self, batch: Batch) -> Tensor:
        """Share of wrong answers, shape ``(limits, rates, seeds)``."""
        symbols, orders = batch
        wrong = scores(torch.cat([*self.tensors]), symbols).argmax(-1) != orders
        return wrong.double().mean(1).reshape(len(LIMITS), len(RATES), -1)


def solved(length: int, sizes: Sizes) -> Tensor:
    """Share of seeds that come below 1 % of errors on fresh sequences, shape ``(limits, rates)``."""
    dice, crowd = torch.Generator().manual_seed(length), Crowd(sizes.seeds)
    done = torch.zeros(len(LIMITS), len(RATES), sizes.seeds, dtype=torch.bool)
    for step in range(1, sizes.steps + 1):
        crowd.learn(sequences(BATCH, length, dice))
        if step % (sizes.steps // CHECKS) == 0:
            done |= crowd.errors(sequences(500, length, dice)) < SOLVED
    return done.double().mean(2)


def _draw(shares: Tensor, lengths: Sequence[int]) -> Figure:
    figure, axes = panels(1, len(RATES), width=4.5)
    width = 0.8 / len(LIMITS)
    for j, (axis, rate) in enumerate(zip(axes, RATES, strict=True)):
        for i, name in enumerate(LIMITS):
            places = torch.arange(len(lengths)) + (i - (len(LIMITS) - 1) / 2) * width
            axis.bar(places, 100 * shares[:, i, j], width, color=colour(name), label=name)
        axis.set(xlabel="length of the sequences (steps)", ylabel="seeds that solve it (%)", ylim=(0, 104))
        axis.set(xticks=range(len(lengths)), xticklabels=lengths, title=f"SGD, learning rate {rate:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(LIMITS))
    return figure


def section(quick: bool) -> Section:
    """Run it."""
    sizes = QUICK if quick else FULL
    shares = torch.stack([solved(length, sizes) for length in sizes.lengths])
    rows = [
        [f"{name}, {rate:g}", *(f"{100 * share:.0f} %" for share in shares[:, i, j].tolist())]
        for j, rate in enumerate(RATES)
        for i, name in enumerate(LIMITS)
    ]
    return Section(
        "(c) The temporal-order task with a vanilla recurrent network",
        "Of a sequence of four meaningless symbols two others are to be named in their order, as in Pascanu, Mikolov and Bengio "
        f"2013; {HIDDEN} tanh units that begin as a rotation, SGD on {sizes.steps} batches of {BATCH}, {sizes.seeds} seeds for "
        "each cell. A seed solves it when less than 1 % of 500 fresh sequences go wrong at any of ten checks.",
        [table(rows, ["seeds that solve it: limit, learning rate", *(f"length {length}" for length in sizes.lengths)])],
        SHOWN,
        lambda: _draw(shares, sizes.lengths),
    )
