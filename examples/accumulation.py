"""What does backward add up, and what is the gradient of a window of micro-batches?

    python examples/accumulation.py            # tables, and logs/accumulation/logits.png, in some twenty seconds
    python examples/accumulation.py --quick    # with a tenth of the steps

First: a second backward adds to the first one's gradients. So N micro-batches are averaged (loss / N), and equal one large batch.
Second: ten micro-batches in windows of four leave a short window of two. A step is taken on it too, and Lightning divides it by
four: its gradient comes out at half its size. AccumulationRescaling() makes it the mean of the two. Third: the first problem for
10,000 steps of SGD, clipped to max_norm 1 and not: each clipped step moves the logits by less, and they drift less far down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lightning.pytorch import LightningModule
from scaffold import BLUE, GREEN, GREY, ORANGE, command_line, quiet_trainer, save, sheet, start
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clip_callbacks import AccumulationRescaling, ClipRule, GradientClipping, ParameterTable, clip_step

MICRO_BATCHES, WINDOW = 10, 4


def problem() -> tuple[nn.Parameter, nn.Parameter, Callable[[], Tensor]]:
    """Return weights, biases, and a function without arguments that computes the logits."""
    w, b = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0]]).repeat(5, 1)), nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    return w, b, lambda: torch.ones(5) @ w + b


def loss(logits: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, torch.zeros(3))


def added_gradients(backwards: int) -> tuple[list[list[float]], list[float]]:
    """Return the rows of w.grad, and b.grad, after a number of backward passes."""
    w, b, logits = problem()
    for _ in range(backwards):
        loss(logits()).backward()
    return w.grad.tolist(), b.grad.tolist()


def drift(steps: int, max_norm: float | None) -> Tensor:
    """Return the three logits before each step and after the last one, shape ``(steps + 1, 3)``."""
    w, b, logits = problem()
    optimizer = torch.optim.SGD([w, b], lr=0.0009)
    table, state, seen = ParameterTable.of([w, b]), None, []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = logits()
        loss(outputs).backward()
        seen.append(outputs.detach())
        _, state = clip_step(table, state, rules=[ClipRule(max_norm)])
        optimizer.step()
    return torch.stack([*seen, logits().detach()])


class Line(LightningModule):
    """A model that records the gradient of each step; its weights do not change, so that steps can be compared."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.taken = nn.Linear(4, 1).double(), []

    def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def note_gradient(self, *_: object) -> None:
        self.taken.append(self.net.weight.grad.clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.0)
        optimizer.register_step_post_hook(self.note_gradient)  # SGD leaves gradients as they are
        return optimizer


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8 * MICRO_BATCHES, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True))


def window_gradients(*callbacks: AccumulationRescaling) -> list[Tensor]:
    """Return the gradient of each window of an epoch in Lightning."""
    module = Line()
    trainer = quiet_trainer(*callbacks, GradientClipping(None), max_epochs=1, accumulate_grad_batches=WINDOW)
    trainer.fit(module, DataLoader(samples(), batch_size=8))
    return module.taken


def large_batch_gradients() -> list[Tensor]:
    """Return the gradient of each window as one batch."""
    gradients = []
    for batch in DataLoader(samples(), batch_size=8 * WINDOW):
        module = Line()
        module.training_step(batch).backward()
        gradients.append(module.net.weight.grad)
    return gradients


def picture(curves: dict[str, Tensor]):
    figure, (axis,) = sheet()
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        for which, color in zip(range(3), (BLUE, GREEN, ORANGE), strict=True):
            axis.plot(curve[:, which], style, color=color, label=f"logit {which + 1}, {name}")
    axis.axhline(0.0, color=GREY, linewidth=0.8)
    axis.set(xlabel="optimizer step (SGD, learning rate 0.0009)", ylabel="logit", title="Targets of 0 pull the logits down")
    axis.legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    arguments = start(command_line(__doc__, "accumulation"), argv)
    rows = [(n, *added_gradients(n)[0][0], *added_gradients(n)[1]) for n in (1, 2)]
    names = [f"{tensor}.grad[{i}]" for tensor in ("w", "b") for i in range(3)]
    print(tabulate(rows, ("backward passes", *names), floatfmt=".4f"), end="\n\n")

    large = large_batch_gradients()
    found = {"plain": window_gradients(), "AccumulationRescaling()": window_gradients(AccumulationRescaling())}
    rows = [(name, *(float(x.norm() / y.norm()) for x, y in zip(each, large, strict=True))) for name, each in found.items()]
    print(f"{MICRO_BATCHES} micro-batches in windows of {WINDOW}: gradient / gradient of one large batch")
    print(tabulate(rows, ("", "window of 4", "window of 4", "window of 2"), floatfmt=".4f"), end="\n\n")

    steps = 1_000 if arguments.quick else 10_000
    curves = {"max_norm 1": drift(steps, 1.0), "unclipped": drift(steps, None)}
    print(f"Logits after {steps} steps")
    print(tabulate([(name, *curve[-1].tolist()) for name, curve in curves.items()], floatfmt=".3f"))
    save(picture(curves), arguments.output / "logits.png")


if __name__ == "__main__":
    main()
