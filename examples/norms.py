"""What is the norm of a gradient, and what does a threshold do to it?

    python examples/norms.py            # tables, and logs/norms/norms.png
    python examples/norms.py --quick    # the same with fewer random draws

The tables show total_norm and clip_coef = min(1, max_norm / (total_norm + 1e-6)) for one gradient under several norm types, for
gradients with one growing entry, and under several thresholds. Random gradients of every size then show that a larger norm_type
never gives a larger total_norm, and that clipping never enlarges a gradient: it cures exploding gradients and does nothing for
vanishing ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scaffold import BLUE, GREY, ORANGE, RED, command_line, save, sheet, start
from tabulate import tabulate
from torch import Tensor, nn

from clip_callbacks import StepReport, clip_grad_norm_, clip_step

GRADIENT = (125.0, 75.0, 45.0, 15.0, 5.0)
NORM_TYPES = (1.0, 2.0, 3.0, 4.0, math.inf)
Row = tuple[float, float, float, float]


def weight_with(gradient: Sequence[float] | Tensor) -> nn.Parameter:
    weight = nn.Parameter(torch.zeros(len(gradient)))
    weight.grad = torch.as_tensor(gradient, dtype=torch.float32).clone()
    return weight


def clip(gradient: Sequence[float] | Tensor, max_norm: float | None = 1.0, norm_type: float = 2.0) -> StepReport:
    """What a step with this gradient reports."""
    return clip_step([weight_with(gradient)], max_norm=max_norm, norm_type=norm_type)[0]


def row(label: float, gradient: Sequence[float], max_norm: float = 1.0, norm_type: float = 2.0) -> Row:
    """Return a label, total_norm and clip_coef of one gradient, and clip_coef computed from the printed norm in float64."""
    report, weight = clip(gradient, max_norm, norm_type), weight_with(gradient)
    assert clip_grad_norm_(weight, max_norm, norm_type) == report.total_norm  # the drop-in returns an equal norm
    total_norm = report.total_norm.item()
    return label, total_norm, report.clip_coef.item(), min(1.0, max_norm / (total_norm + 1e-6))


def by_norm_type() -> list[Row]:
    return [row(norm_type, GRADIENT, norm_type=norm_type) for norm_type in NORM_TYPES]


def by_entry() -> list[Row]:
    return [row(factor, (factor * GRADIENT[0], *GRADIENT[1:])) for factor in (1, 2, 3, 4)]


def by_threshold() -> list[Row]:
    return [row(max_norm, GRADIENT, max_norm) for max_norm in (1, 2, 3, 4)]


def random_gradients(draws: int) -> list[Tensor]:
    """Return gradients of 1 to 50 entries, of sizes from 1e-4 to 1e4."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 51, (draws,), generator=generator).tolist()
    sizes = (10 ** (8 * torch.rand(draws, generator=generator) - 4)).tolist()
    return [size * torch.randn(length, generator=generator) for length, size in zip(lengths, sizes, strict=True)]


def rising_norms(gradients: list[Tensor]) -> int:
    """Count the gradients for which a larger norm type gives a larger norm (beyond the rounding of float32)."""
    norms = torch.tensor([[clip(gradient, None, p).total_norm.item() for p in NORM_TYPES] for gradient in gradients])
    return int((norms[:, 1:] > norms[:, :-1] * (1 + 1e-6)).any(dim=1).sum())


def before_and_after(gradients: list[Tensor], max_norm: float) -> list[tuple[float, float]]:
    """Return total_norm and clipped_norm of each gradient."""
    reports = [clip(gradient, max_norm) for gradient in gradients]
    return [(report.total_norm.item(), report.clipped_norm.item()) for report in reports]


def picture(gradients: list[Tensor]):
    figure, (left, right) = sheet(columns=2)
    for norm_type, color in ((1.0, RED), (2.0, BLUE), (math.inf, GREY)):
        norms = [clip((entry, *GRADIENT[1:]), None, norm_type).total_norm.item() for entry in range(0, 501, 5)]
        left.plot(range(0, 501, 5), norms, color=color, label=f"norm_type = {norm_type:g}")
    left.set(xlabel="first entry a of the gradient", ylabel="total_norm", title="Norm of the gradient (a, 75, 45, 15, 5)")
    for max_norm, color in ((1.0, RED), (100.0, ORANGE)):
        pairs = before_and_after(gradients, max_norm)
        right.loglog(*zip(*pairs, strict=True), ".", markersize=4, color=color, alpha=0.6, label=f"max_norm = {max_norm:g}")
    ends = [min(before for before, _ in pairs), max(before for before, _ in pairs)]
    right.loglog(ends, ends, color=GREY, linewidth=0.8, linestyle="--", label="no clipping")
    right.set(xlabel="total_norm before clipping (log scale)", ylabel="norm after clipping (log scale)")
    right.set_title("Clipping never enlarges a gradient")
    for axis in (left, right):
        axis.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    arguments = start(command_line(__doc__, "norms"), argv)
    for label, rows in (("norm_type", by_norm_type()), ("first entry, times", by_entry()), ("max_norm", by_threshold())):
        headers = (label, "total_norm", "clip_coef (float32)", "clip_coef (float64)")
        print(tabulate(rows, headers, floatfmt=("g", ".17g", ".9g", ".17g")), end="\n\n")
    gradients = random_gradients(50 if arguments.quick else 1000)
    enlarged = sum(after > before for before, after in before_and_after(gradients, 1.0))
    print(f"Of {len(gradients)} random gradients, norms that rise with norm_type: {rising_norms(gradients)}; enlarged: {enlarged}")
    save(picture(gradients[:300]), arguments.output / "norms.png")


if __name__ == "__main__":
    main()
