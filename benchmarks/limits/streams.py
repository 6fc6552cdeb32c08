"""Detection and false alarms of each limit on synthetic norms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.limits.common import Section, colour, panels, percent
from benchmarks.timing import table
from clip_callbacks import ClipRule, EmaLimit, ParameterTable, QuantileLimit, RobustZScoreLimit, ZScoreLimit, clip_step
from clip_callbacks.core.limits import BlockNorms, Limit

ADAPTIVE: dict[str, Limit] = {
    "QuantileLimit(0.1)": QuantileLimit(0.1),
    "QuantileLimit(0.99)": QuantileLimit(0.99),
    'ZScoreLimit(), "reciprocal"': ZScoreLimit(),
    'ZScoreLimit(), "mean"': ZScoreLimit(clip_to="mean"),
    'ZScoreLimit(), "threshold"': ZScoreLimit(clip_to="threshold"),
    "RobustZScoreLimit()": RobustZScoreLimit(),
    "RobustZScoreLimit(3.0)": RobustZScoreLimit(3.0),
    "EmaLimit()": EmaLimit(max_norm=math.inf),  # blocks here are unrelated streams: no common norm
}


def upper_tail(z: float) -> float:
    """Share of a normal distribution that lies more than z standard deviations above its mean."""
    return 0.5 * math.erfc(z / math.sqrt(2.0))


ORACLE = "FixedLimit at the true 99 %"
NOMINAL = {
    ORACLE: 0.01,
    "QuantileLimit(0.1)": 0.9,
    "QuantileLimit(0.99)": 0.01,
    **{f'ZScoreLimit(), "{target}"': upper_tail(2.5) for target in ("reciprocal", "mean", "threshold")},
    "RobustZScoreLimit()": upper_tail(2.5),
    "RobustZScoreLimit(3.0)": upper_tail(3.0),
}
"""Share of ordinary norms that each promises to clip, of normal ones where it needs a distribution."""

KINDS = ("Gaussian", "lognormal", "Student-t", "decay", "growth")
SPIKES = (1.0, 10.0, 30.0)
"""How many times as large a spike is as it would have been; 1 is none."""
RARE = 0.01
JUMP = 5.0
CALM = 0.1
BURSTS = 0.1
"""Share of steps whose gradients are not finite, five at a time."""

SHOWN = (
    "Nearly every limit finds nearly all spikes of these heights; QuantileLimit(0.99) misses some where they are as "
    "frequent as what it lets pass. RobustZScoreLimit clips about as many ordinary norms as it promises, unless tails are "
    "heavier than lognormal, and follows a lasting jump well within its window. ZScoreLimit clips several times as many as "
    'promised; with "mean" and "reciprocal" it hardly lets go of the old level.'
)


@dataclass(frozen=True)
class Sizes:
    """How much to run: streams of a kind, steps of each, and those of them that do not count."""

    streams: int
    steps: int
    unseen: int


FULL, QUICK = Sizes(64, 3000, 1200), Sizes(4, 300, 150)


def ordinary(kind: str, sizes: Sizes, dice: torch.Generator) -> Tensor:
    """Streams of norms without spikes, shape ``(steps, streams)``."""
    normal = torch.randn(sizes.steps, sizes.streams, generator=dice, dtype=torch.float64)
    if kind == "Gaussian":
        return (1.0 + 0.1 * normal).clamp(min=0.01)
    if kind == "Student-t":
        square = torch.randn(3, sizes.steps, sizes.streams, generator=dice, dtype=torch.float64).square().mean(0)
        return (1.0 + 0.2 * normal / square.sqrt()).abs()
    drift = {"lognormal": 0.0, "decay": -3.0, "growth": 3.0}[kind]
    return (0.5 * normal + drift * torch.linspace(0.0, 1.0, sizes.steps, dtype=torch.float64)[:, None]).exp()


def clipped(limit: Limit, norms: Tensor, *, are_losses: bool = False) -> Tensor:
    """Which norms, or losses, of each stream are above a limit, bool, shape ``(steps, streams)``; streams are blocks."""
    state, found = limit.init(norms.shape[1]), []
    for now in norms:
        limits, state = limit.step(BlockNorms(now, are_losses=are_losses), state)
        found.append(now > limits)
    return torch.stack(found)


@dataclass(frozen=True)
class Rates:
    """Of one limit on one kind of norms.

    Args:
        calm: Share of norms that are clipped where there are no spikes.
        among: Share of ordinary norms that are clipped among spikes, by their height.
        detected: Share of spikes that are clipped, by their height.
    """

    calm: float
    among: dict[float, float]
    detected: dict[float, float]

    @classmethod
    def of(cls, found: Tensor, spikes: Tensor) -> Rates:
        """Count; both of shape ``(heights, steps, streams)``."""
        pairs = list(zip(SPIKES, found, spikes, strict=True))[1:]
        among = {height: _share(hit, ~spike) for height, hit, spike in pairs}
        return cls(_share(found[0], ~spikes[0]), among, {height: _share(hit, spike) for height, hit, spike in pairs})


def _share(hits: Tensor, of: Tensor) -> float:
    return float(hits[of].double().mean())


def rates(sizes: Sizes) -> dict[str, dict[str, Rates]]:
    """Of each limit, on each kind of norms."""
    dice = torch.Generator().manual_seed(0)
    pure = [ordinary(kind, sizes, dice) for kind in KINDS]
    is_spike = torch.rand(len(KINDS), len(SPIKES), sizes.steps, sizes.streams, generator=dice) < RARE
    is_spike[:, 0] = False
    heights = torch.tensor(SPIKES, dtype=torch.float64)[:, None, None]
    norms = torch.stack([torch.where(which, each * heights, each) for each, which in zip(pure, is_spike, strict=True)])
    seen = slice(sizes.unseen, None)
    bounds = torch.stack([each[seen].quantile(0.99) for each in pure])[:, None, None, None]
    found = {ORACLE: norms > bounds}
    blocks = norms.permute(2, 0, 1, 3).flatten(1)  # every kind, height and stream a block
    for name, limit in ADAPTIVE.items():
        found[name] = clipped(limit, blocks).unflatten(1, (len(KINDS), len(SPIKES), -1)).permute(1, 2, 0, 3)
    return {
        name: {kind: Rates.of(each[i, :, seen], is_spike[i, :, seen]) for i, kind in enumerate(KINDS)}
        for name, each in found.items()
    }


def after_jump(sizes: Sizes) -> dict[str, Tensor]:
    """Share of streams that each limit clips, over steps; half-way lognormal norms become five times as large."""
    half = sizes.steps // 2
    norms = (
        0.5 * torch.randn(sizes.steps, 8 * sizes.streams, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ).exp()
    bound = norms.quantile(0.99, 1).mean()
    norms[half:] *= JUMP
    found = {ORACLE: norms > bound} | {name: clipped(limit, norms) for name, limit in ADAPTIVE.items()}
    return {name: each.double().mean(1) for name, each in found.items()}


def settled(shares: Tensor) -> str:
    """How many steps after the jump until a limit clips less than one stream in ten, for good or bad."""
    half = len(shares) // 2
    before = float(shares[half // 2 : half].mean())
    calm = (shares[half:] < CALM).nonzero().flatten()
    after = f"{int(calm[0])}" if len(calm) else f"more than {half}"
    return "more before, too" if before >= CALM else after


def ignores_bursts(limit: Limit) -> bool:
    """Whether a limit is, to the bit, as if steps whose gradients are not finite had never been."""
    dice = torch.Generator().manual_seed(2)
    norms = torch.randn(300, 4, generator=dice).exp()
    burst = (torch.rand(60, 1, generator=dice) < BURSTS).expand(60, 5).flatten()
    poisoned = norms.clone()
    poisoned[burst, 0] = math.nan
    kept = norms[~burst]
    without = _limits(limit, kept, torch.ones(len(kept), dtype=torch.bool))
    return all(map(torch.equal, _limits(limit, poisoned, ~burst), without))


def _limits(limit: Limit, norms: Tensor, counts: Tensor) -> list[Tensor]:
    """What a limit says in ``clip_step`` on the steps that count."""
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(norms.shape[1])]
    tensors, rules, state, found = ParameterTable(parameters), [ClipRule(limit, "parameter")], None, []
    for now, counted in zip(norms, counts.tolist(), strict=True):
        for parameter, norm in zip(parameters, now, strict=True):
            parameter.grad = norm.reshape(1).clone()
        report, state = clip_step(tensors, state, rules=rules)
        if counted:
            found.append(report.limits)
    return found


def _table_of_alarms(found: dict[str, dict[str, Rates]]) -> str:
    rows = [
        [name, percent(NOMINAL[name]) if name in NOMINAL else "-", *(percent(each[kind].calm) for kind in KINDS)]
        for name, each in found.items()
    ]
    return table(rows, ["clipped, no spikes", "promised", *KINDS])


def _table_of_spikes(found: dict[str, dict[str, Rates]]) -> str:
    """How many spikes are clipped, those of either height."""
    rows = [[name, *(" / ".join(map(percent, each[kind].detected.values())) for kind in KINDS)] for name, each in found.items()]
    heights = " / ".join(f"x{height:g}" for height in SPIKES[1:])
    return table(rows, [f"spikes clipped, {heights}", *KINDS])


def _table_of_others(found: dict[str, dict[str, Rates]]) -> str:
    """How many of the other norms are clipped."""
    rows = [[name, *(percent(each[kind].among[SPIKES[-1]]) for kind in KINDS)] for name, each in found.items()]
    return table(rows, [f"clipped of the others, among spikes x{SPIKES[-1]:g}", *KINDS])


def _table_of_jump(shares: dict[str, Tensor]) -> str:
    rows = []
    for name, each in shares.items():
        half = len(each) // 2
        before, after = float(each[half // 2 : half].mean()), float(each[half : half + 10].mean())
        same = "-" if name == ORACLE else "yes" if ignores_bursts(ADAPTIVE[name]) else "no"
        rows.append([name, percent(before), percent(after), settled(each), same])
    headers = ["step change", "clipped before", "in the next 10 steps", "steps until below 10 %", "NaN bursts leave no trace"]
    return table(rows, headers)


def _draw(found: dict[str, dict[str, Rates]], shares: dict[str, Tensor]) -> Figure:
    figure, (alarms, jump) = panels(1, 2, width=6.5, height=4.6)
    _draw_alarms(alarms, found)
    _draw_jump(jump, shares)
    return figure


def _draw_alarms(axis: Axes, found: dict[str, dict[str, Rates]]) -> None:
    names = list(found)[::-1]
    for kind, marker in zip(KINDS, "osD<>", strict=True):
        alarms = [100 * max(found[name][kind].calm, 1e-5) for name in names]
        axis.scatter(alarms, range(len(names)), marker=marker, s=28, label=kind, alpha=0.8)
    places = [i for i, name in enumerate(names) if name in NOMINAL]
    axis.scatter([100 * NOMINAL[names[i]] for i in places], places, marker="|", s=320, color="black", label="promised")
    axis.set(xscale="log", xlabel="norms clipped without any spike (%; none: 0.001)", yticks=range(len(names)), yticklabels=names)
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=6, handletextpad=0.2, columnspacing=1.0)


def _draw_jump(axis: Axes, shares: dict[str, Tensor]) -> None:
    width = 15
    for name, each in shares.items():
        if name not in {ORACLE, "RobustZScoreLimit(3.0)"}:
            smooth = each.unfold(0, width, 1).mean(1)
            style = {'"mean"': "--", '"threshold"': ":", "QuantileLimit(0.99)": "--"}.get(name.rpartition(" ")[2], "-")
            steps = torch.arange(len(smooth)) + width // 2 - len(each) // 2
            axis.plot(steps, 100 * smooth, style, color=colour(name), label=name)
    axis.set(xlim=(-60, 600), ylim=(-2, 102), xlabel="steps since the norms became five times as large")
    axis.set_ylabel(f"streams clipped (%, mean of {width} steps)")
    axis.legend(fontsize=8, loc="center right")


def section(quick: bool) -> Section:
    """Run it."""
    sizes = QUICK if quick else FULL
    found, shares = rates(sizes), after_jump(sizes)
    return Section(
        "(a) Detection and false alarms on synthetic norms",
        f"{sizes.streams} streams of each kind and height, {sizes.steps} steps each, of which the first {sizes.unseen} do not "
        "count: Gaussian (mean 1, standard deviation 0.1), lognormal (standard deviation 0.5 of the logarithm), the size of 1 + "
        "0.2 t with 3 degrees of freedom, and lognormal that falls or grows e^3-fold. At a random 1 % of steps a norm is "
        "multiplied by 10 or 30. EmaLimit is without its common norm in the warm-up, since streams are no network; it and "
        "QuantileLimit(0.1) clip most steps by design. NaN bursts go through `clip_step`.",
        [_table_of_alarms(found), _table_of_spikes(found), _table_of_others(found), _table_of_jump(shares)],
        SHOWN,
        lambda: _draw(found, shares),
    )
