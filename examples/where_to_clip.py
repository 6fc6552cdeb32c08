"""Where does the clip belong? Between backward and step.

    python examples/where_to_clip.py    # two tables, in a second; --quick is the same

Four layers of one weight, 0.5, each followed by a sigmoid; input 0.1, target 1, squared error, SGD with a learning rate of 1. The
first table is one step in Lightning under GradientClipping(0.01208): the gradient as backward left it, as the optimizer got it,
the weight after the step, and the gradient then: it is still there, hence zero_grad. The second one puts clip_grad_norm_
elsewhere in a plain loop: before backward there is nothing to clip, after the step it is too late.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from scaffold import command_line, quiet_trainer, start
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from clip_callbacks import GradientClipping, clip_grad_norm_

MAX_NORM = 0.01208
Place = Literal["nowhere", "before backward", "between backward and step", "after the step"]
PLACES: tuple[Place, ...] = ("nowhere", "before backward", "between backward and step", "after the step")


class FourLayers(LightningModule):
    """A network that records the gradients of its step at three moments."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(4))
        for layer in self.layers:
            nn.init.constant_(layer.weight, 0.5)
        self.seen: dict[str, list[float]] = {}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sigmoid(layer(x))
        return x

    def loss(self) -> Tensor:
        return nn.functional.mse_loss(self(torch.tensor([[0.1]])), torch.tensor([[1.0]]))

    def gradients(self) -> list[float]:
        return [layer.weight.grad.item() for layer in self.layers]

    def weights(self) -> list[float]:
        return [layer.weight.item() for layer in self.layers]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss()

    def on_after_backward(self) -> None:
        self.seen["gradient"] = self.gradients()

    def see_clipped(self, *_: object) -> None:
        self.seen["after clip"] = self.gradients()

    def on_train_batch_end(self, outputs: object, batch: Tensor, batch_idx: int) -> None:
        self.seen["weight after the step"] = self.weights()
        self.seen["gradient then"] = self.gradients()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        optimizer.register_step_post_hook(self.see_clipped)  # SGD leaves gradients as they are
        return optimizer


def one_step() -> tuple[dict[str, list[float]], float]:
    """Return the gradients that the four layers recorded, and total_norm."""
    module, clipping = FourLayers(), GradientClipping(MAX_NORM)
    quiet_trainer(clipping, max_steps=1).fit(module, DataLoader([0]))
    assert clipping.last_report
    return module.seen, clipping.last_report.total_norm.item()


def weights_with_clip_at(place: Place) -> list[float]:
    """Return the weights after a step of a plain loop."""
    module = FourLayers()
    optimizer = module.configure_optimizers()
    optimizer.zero_grad()
    loss = module.loss()
    if place == "before backward":
        clip_grad_norm_(module.parameters(), MAX_NORM)
    loss.backward()
    if place == "between backward and step":
        clip_grad_norm_(module.parameters(), MAX_NORM)
    optimizer.step()
    if place == "after the step":
        clip_grad_norm_(module.parameters(), MAX_NORM)
    return module.weights()


def main(argv: Sequence[str] | None = None) -> None:
    start(command_line(__doc__, "where_to_clip"), argv)
    seen, total_norm = one_step()
    print(f"GradientClipping({MAX_NORM}), total_norm {total_norm:.4f}")
    print(tabulate({"layer": [1, 2, 3, 4], **seen}, headers="keys", floatfmt=".9g"), end="\n\n")
    rows = [(place, *weights_with_clip_at(place)) for place in PLACES]
    print(tabulate(rows, ("clip_grad_norm_", *(f"weight {i} after the step" for i in range(1, 5))), floatfmt=".9g"))


if __name__ == "__main__":
    main()
