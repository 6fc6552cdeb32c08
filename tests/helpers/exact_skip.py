"""Optimizers x implementations x kinds of poison x places x loops, and all that a batch may change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from tests.helpers.matrix import matrix
from tests.helpers.members import FORWARD_WRITES, IMPLEMENTATIONS, OPTIMIZERS, O
from tests.helpers.training import Regression, data, make_trainer

KINDS = ["nan", "inf", "-inf", "all", "loss"]
PLACES = {"first": {0}, "later": {4}, "two in a row": {2, 3}}
BATCHES = 8


LOOPS = ("automatic", "manual")
LAYERS = ["batch norm", "cumulative batch norm", "instance norm", "assigned centre", "weight that forward moves"]
"""Not all kinds of what a forward pass writes: those are crossed with loops and places in test_exact_skip_of_programs.py."""


@dataclass(frozen=True)
class Cell:
    optimizer: str
    implementation: str
    kind: str
    place: str
    loop: str
    layer: str = "batch norm"


def exists(optimizer: str, implementation: str, kind: str, place: str, loop: str, layer: str) -> bool:
    if optimizer == "SparseAdam" and layer == "weight that forward moves":
        return False  # it holds sparse weights only: one that moves and that no optimizer holds is named, not restored
    return implementation in OPTIMIZERS[optimizer].implementations


every_cell = matrix(
    exists,
    optimizer=list(OPTIMIZERS),
    implementation=IMPLEMENTATIONS,
    kind=KINDS,
    place=list(PLACES),
    loop=LOOPS,
    layer=LAYERS,
)


class Subject(Regression):
    """A network that its forward pass writes to, poisoned in one entry, in all, or in the loss; the batch says whether."""

    def __init__(self, cell: Cell) -> None:
        member, layer = OPTIMIZERS[cell.optimizer], FORWARD_WRITES[cell.layer]
        sparse = cell.optimizer == "SparseAdam"
        net = nn.EmbeddingBag(6, 1, sparse=True) if sparse else nn.Sequential(nn.Linear(4, 8), layer(8), nn.Linear(8, 1))
        super().__init__(member.make, net, lr=0.02, **member.options, **member.implementations[cell.implementation])
        self.cell, self.automatic_optimization = cell, cell.loop == "automatic"
        self.norm = layer(4).requires_grad_(False) if sparse else nn.Identity()

    def forward_loss(self, batch: Any) -> torch.Tensor:
        inputs, targets, _ = batch
        if self.cell.optimizer == "SparseAdam":
            self.norm(inputs)
            inputs = (inputs.nan_to_num(1.0).abs() * 3).clamp(max=5).long()
        return nn.functional.mse_loss(self.net(inputs), targets)

    def loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        poisoned = bool(batch[2])
        if poisoned:  # what made the gradients bad has gone through the network: its batch statistics are bad too
            batch = (batch[0] * math.inf if self.cell.kind == "loss" else batch[0] * 1e3, *batch[1:])
        loss = self.forward_loss(batch)
        return loss * math.nan if poisoned and self.cell.kind == "loss" else loss

    def poison(self, batch: Any) -> None:
        if bool(batch[2]) and self.cell.kind != "loss":
            parameter = self.trainer.optimizers[0].param_groups[0]["params"][-1]
            gradient = parameter.grad.coalesce() if parameter.grad.is_sparse else parameter.grad
            values = gradient.values() if gradient.is_sparse else gradient
            bad = math.nan if self.cell.kind == "all" else float(self.cell.kind)
            values.fill_(bad) if self.cell.kind == "all" else values.view(-1)[0].fill_(bad)
            parameter.grad = gradient

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
        self.batch = batch
        if self.automatic_optimization:
            return self.loss(batch, batch_idx)
        optimizer = self.optimizers()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        if self.cell.optimizer == "LBFGS":
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()
        return None

    def on_after_backward(self) -> None:
        self.poison(self.batch)

    def configure_optimizers(self) -> Any:
        member = OPTIMIZERS[self.cell.optimizer]
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad and member.takes(parameter)]
        optimizer = self.make_optimizer(parameters, **self.options)
        if not self.automatic_optimization:
            return optimizer
        schedule = O.lr_scheduler.ExponentialLR(optimizer, 0.7)
        if member.cycles_momentum:
            schedule = O.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 2}}


def everything(module: Subject, fit: Any) -> dict[str, Any]:
    """All that a batch may change, flat."""
    optimizer = fit.optimizers[0]
    flat: dict[str, Any] = {f"module.{key}": value for key, value in module.state_dict().items()}
    for number, state in enumerate(optimizer.state.values()):
        flat |= {f"state.{number}.{key}": value for key, value in state.items()}
    for number, group in enumerate(optimizer.param_groups):
        flat |= {f"group.{number}.{key}": value for key, value in group.items() if key != "params"}
    for config in fit.lr_scheduler_configs:
        flat |= {f"schedule.{key}": value for key, value in config.scheduler.state_dict().items() if not callable(value)}
    return flat


def train(tmp_path: Any, cell: Cell, poisoned: set[int], left_out: set[int], *callbacks: Callback) -> dict[str, Any]:
    batches = [(*batch, torch.tensor(number in poisoned)) for number, batch in enumerate(data(BATCHES, batch_size=6))]
    kept = [batch for number, batch in enumerate(batches) if number not in left_out]
    torch.manual_seed(0)
    module = Subject(cell)
    fit = make_trainer(tmp_path, *callbacks)
    fit.fit(module, DataLoader(kept, batch_size=None))
    return everything(module, fit)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    return sorted(left.keys() ^ right.keys()) + [key for key in left.keys() & right.keys() if not same(left[key], right[key])]


class Recorded(Regression):
    """Keeps the learning rate and momentum after every batch."""

    def __init__(self, schedule, interval="step", frequency=1, poison=(), net=None, **options):
        super().__init__(O.SGD, net, momentum=0.9, lr=0.1, **options)
        self.schedule, self.interval, self.frequency, self.poison = schedule, interval, frequency, set(poison)
        self.rates = []

    def loss(self, batch, batch_idx):
        loss = super().loss(batch, batch_idx)
        return loss * math.nan if self.trainer.fit_loop.epoch_loop.total_batch_idx in self.poison else loss

    def on_train_batch_end(self, *_):
        if self.trainer.fit_loop.epoch_loop.total_batch_idx not in self.poison:
            group = self.trainer.optimizers[0].param_groups[0]
            self.rates.append((group["lr"], group.get("momentum")))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        config = {"scheduler": self.schedule(optimizer), "interval": self.interval, "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": config | {"monitor": "train_loss"}}
