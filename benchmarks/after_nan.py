"""What one bad step leaves behind in adaptive limits that pip installs, and in ours: ``python -m benchmarks.after_nan``."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from importlib.metadata import version

import smartclip
import torch
from autoclip.torch.quantile import QuantileClip
from torch import nn
from zclip import ZClip

from benchmarks.timing import machine, publish, table
from clip_callbacks import ClipRule, EmaLimit, Limit, ParameterTable, QuantileLimit, RobustZScoreLimit, ZScoreLimit, clip_step
from clip_callbacks.core.limits import label
from clip_callbacks.core.rules import ClipState

BAD_AT, AFTER = 50, 200
EVERY, SPIKE = 20, 20.0
Step = Callable[[], object]


def norms() -> list[float]:
    """Lognormal norms, every 20th a spike once limits have warmed up."""
    draw = random.Random(0)
    each = [math.exp(0.5 * draw.gauss(0, 1)) for _ in range(BAD_AT + AFTER)]
    return [norm * SPIKE if step % EVERY == 0 and step > BAD_AT else norm for step, norm in enumerate(each)]


def ours(limit: Limit) -> Callable[[nn.Module], Step]:
    """``clip_step`` with a limit."""

    def make(module: nn.Module) -> Step:
        held, rules = ParameterTable(module.named_parameters()), [ClipRule(limit)]
        state: list[ClipState | None] = [None]

        def step() -> None:
            state[0] = clip_step(held, state[0], rules=rules)[1]

        return step

    return make


def zclip(module: nn.Module) -> Step:
    """``zclip``."""
    clipper = ZClip(max_grad_norm=None)
    return lambda: clipper.step(module)


def autoclip(module: nn.Module) -> Step:
    """``autoclip``."""
    return QuantileClip(module.parameters(), quantile=0.1, global_threshold=True).step


def smart(kind: type) -> Callable[[nn.Module], Step]:
    """``smartclip``."""

    def make(module: nn.Module) -> Step:
        clipper = kind()
        return lambda: smartclip.apply(module, clipper)

    return make


def gradients(make: Callable[[nn.Module], Step], bad: float | None) -> list[float]:
    """The gradients after clipping, of the good steps from the bad one on."""
    module, found = nn.Linear(1, 1, bias=False), []
    step = make(module)
    for number, norm in enumerate(norms()):
        for value in [bad, norm] if number == BAD_AT and bad is not None else [norm]:
            module.weight.grad = torch.tensor([[value]])
            step()
        assert module.weight.grad is not None
        found.append(module.weight.grad.item())
    return found[BAD_AT:]


def row(name: str, make: Callable[[nn.Module], Step]) -> list[object]:
    """How the steps after a bad one compare with those of a run without it."""
    raw, clean = norms()[BAD_AT:], gradients(make, None)
    cells: list[object] = [name, sum(after < 0.9 * before for before, after in zip(raw, clean, strict=True) if before > SPIKE / 4)]
    for bad in (math.nan, math.inf):
        after = gradients(make, bad)
        same = sum(a == b for a, b in zip(after, clean, strict=True))
        finite = sum(map(math.isfinite, after))
        cut = sum(a < 0.9 * before for before, a in zip(raw, after, strict=True) if before > SPIKE / 4)
        cells += [f"{same} of {AFTER}", f"{finite} of {AFTER}", cut]
    return cells


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", help="file in benchmarks/results to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    peers: dict[str, Callable[[nn.Module], Step]] = {
        f"zclip {version('zclip')}: ZClip": zclip,
        f"autoclip {version('autoclip')}: QuantileClip(0.1)": autoclip,
        f"smartclip {version('smartclip')}: AutoClip": smart(smartclip.AutoClip),
        f"smartclip {version('smartclip')}: ZScoreClip": smart(smartclip.ZScoreClip),
    }
    limits = {label(limit): ours(limit) for limit in (ZScoreLimit(), QuantileLimit(0.1), RobustZScoreLimit(), EmaLimit(warmup=25))}
    columns = [f"{what} after {bad}" for bad in ("NaN", "inf") for what in ("same gradients", "finite", "spikes cut")]
    body = table([row(name, make) for name, make in (peers | limits).items()], ["limit", "spikes cut, no bad step", *columns])
    text = (
        f"# One bad step among {BAD_AT + AFTER} good ones\n\n{machine('cpu')}\n\nThe {AFTER} steps after a bad one at step "
        f"{BAD_AT}, compared with a run without it. Norms are lognormal, every {EVERY}th is {SPIKE:g} times as large. "
        f"Made by `python -m benchmarks.after_nan`.\n\n{body}"
    )
    publish(text, arguments.output)


if __name__ == "__main__":
    main()
