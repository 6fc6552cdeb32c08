"""Which gradients are in the norm of a network with frozen layers?

    python examples/frozen.py            # a table, and logs/frozen/norms.png, in half a minute
    python examples/frozen.py --quick    # seconds

A transformer encoder reads handwritten digits (scikit-learn's, 8 × 8 pixels of 17 grays), with its embeddings and first two layers
frozen: in one run for good, by requires_grad_(False), in another by Lightning's BaseFinetuning, which adds them to the optimizer at
a later epoch. Frozen parameters have no gradient and enter no norm, whether or not the optimizer holds them. They enter the norm
from the epoch on in which they are unfrozen. Evaluation has no gradients and is never clipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BaseFinetuning
from scaffold import BLUE, GREEN, GREY, ORANGE, RED, command_line, quiet_trainer, save, sheet, start
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clip_callbacks import ClipRule, GradientClipping

PARTS = ("gray", "place", "encoder.layers.0", "encoder.layers.1", "encoder.layers.2", "encoder.layers.3", "head")
FROZEN = PARTS[:4]
Norms = dict[str, float]


class DigitReader(LightningModule):
    """An encoder over pixels, whose optimizer holds all parameters or only those that are not frozen."""

    def __init__(self, *, holds_frozen: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.gray, self.place = nn.Embedding(17, 16), nn.Embedding(64, 16)
        self.encoder, self.head = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(16, 10)
        self.holds_frozen = holds_frozen

    def frozen_parts(self) -> list[nn.Module]:
        return [self.get_submodule(part) for part in FROZEN]

    def loss(self, batch: list[Tensor]) -> Tensor:
        states = self.encoder(self.gray(batch[0]) + self.place.weight)
        return nn.functional.cross_entropy(self.head(states.mean(1)), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("validation_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        held = [parameter for parameter in self.parameters() if self.holds_frozen or parameter.requires_grad]
        return torch.optim.AdamW(held, lr=3e-3)


class Unfreezing(BaseFinetuning):
    """Freezes the parts with Lightning's BaseFinetuning, and unfreezes them at an epoch, at a tenth of the learning rate."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.frozen_parts())

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.frozen_parts(), optimizer)


class Steps(Callback):
    """Records the norm of each parameter, and of all, at every step."""

    def __init__(self, clipping: GradientClipping) -> None:
        self.clipping, self.norms, self.totals = clipping, [], []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        report = self.clipping.last_report
        names, norms = report.names[:-1], report.norms[:-1]  # the last block, "global", is that of the second rule
        self.norms.append(dict(zip(names, norms.tolist(), strict=True)))
        self.totals.append(report.total_norm.item())


def digits(batches: int) -> tuple[DataLoader[list[Tensor]], DataLoader[list[Tensor]]]:
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.as_tensor(images).long(), torch.as_tensor(labels))
    count = 64 * batches
    parts = torch.utils.data.Subset(data, range(count)), torch.utils.data.Subset(data, range(count, count + 64))
    return DataLoader(parts[0], batch_size=64, shuffle=True), DataLoader(parts[1], batch_size=64)


def train(*callbacks: Callback, holds_frozen: bool = True, batches: int = 4, epochs: int = 2) -> tuple[Steps, Trainer, DigitReader]:
    """Train with parts frozen by a callback, or by requires_grad_ if there is none."""
    seed_everything(0, verbose=False)
    module, clipping = DigitReader(holds_frozen=holds_frozen), GradientClipping(rules=[ClipRule(None, "parameter"), ClipRule(0.5)])
    if not callbacks:  # BaseFinetuning freezes parts itself
        nn.ModuleList(module.frozen_parts()).requires_grad_(requires_grad=False)
    steps = Steps(clipping)
    trainer = quiet_trainer(clipping, steps, *callbacks, max_epochs=epochs)
    trainer.fit(module, *digits(batches))
    return steps, trainer, module


def in_the_norm(norms: Norms) -> dict[str, str]:
    """Count, for each part of the network, the parameters that enter the norm."""
    counts = {part: len(list(DigitReader().get_submodule(part).parameters())) for part in PARTS}
    found = {part: sum(name.startswith(f"{part}.") and norm > 0 for name, norm in norms.items()) for part in PARTS}
    return {part: f"{found[part]} of {counts[part]}" for part in PARTS}


def part_norm(norms: Norms, part: str) -> float:
    return sum(norm**2 for name, norm in norms.items() if name.startswith(f"{part}.")) ** 0.5


def picture(steps: Steps, unfrozen_at: int):
    figure, (axis,) = sheet(size=(7.0, 4.0))
    groups = {"embeddings": PARTS[:2], "layers 0 and 1": PARTS[2:4], "layers 2 and 3": PARTS[4:6], "head": PARTS[6:]}
    for (name, parts), color in zip(groups.items(), (RED, ORANGE, BLUE, GREEN), strict=True):
        norms = [sum(part_norm(each, part) ** 2 for part in parts) ** 0.5 for each in steps.norms]
        axis.plot([norm or float("nan") for norm in norms], color=color, label=name)
    axis.plot(steps.totals, color="black", linewidth=0.8, label="all parameters: total_norm")
    axis.axvline(unfrozen_at - 0.5, color=GREY, linestyle="--", linewidth=0.8, label="unfreezing of embeddings, layers 0 and 1")
    axis.set(xlabel="optimizer step", ylabel="gradient norm before clipping (log scale)", yscale="log")
    axis.set_title("Frozen parts have no gradient norm")
    axis.legend(fontsize=8, ncols=2)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    arguments = start(command_line(__doc__, "frozen"), argv)
    batches, epochs = (4, 2) if arguments.quick else (24, 8)
    by_flag, _, _ = train(batches=4, epochs=1)
    not_held, _, _ = train(holds_frozen=False, batches=4, epochs=1)
    steps, trainer, module = train(Unfreezing(epochs // 2), holds_frozen=False, batches=batches, epochs=epochs)
    columns = {
        "part": PARTS,
        "requires_grad_(False), held by the optimizer": in_the_norm(by_flag.norms[0]).values(),
        "the same, not held": in_the_norm(not_held.norms[0]).values(),
        "BaseFinetuning, first step": in_the_norm(steps.norms[0]).values(),
        "last step": in_the_norm(steps.norms[-1]).values(),
    }
    print("Parameters with a share in total_norm")
    print(tabulate(columns, headers="keys"), end="\n\n")
    last = steps.clipping.last_report
    trainer.validate(module, digits(batches)[1], verbose=False)
    print(f"Steps clipped or looked at in evaluation: {int(steps.clipping.last_report != last)}")
    save(picture(steps, batches * (epochs // 2)), arguments.output / "norms.png")


if __name__ == "__main__":
    main()
