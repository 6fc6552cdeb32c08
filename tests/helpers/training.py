"""Small networks, their data, and Trainers for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

TAKES_WEIGHTS_ONLY = "weights_only" in inspect.signature(Trainer.fit).parameters
"""Lightning before 2.6 loads all of a checkpoint, whatever it holds."""
SAFELY: dict[str, Any] = {"weights_only": True} if TAKES_WEIGHTS_ONLY else {}
TRUSTING: dict[str, Any] = {"weights_only": False} if TAKES_WEIGHTS_ONLY else {}


class Regression(LightningModule):
    """A small network; gradients grow with ``size`` of the targets."""

    def __init__(
        self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, net: nn.Module | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.make_optimizer, self.options = optimizer, {"lr": 0.05} | options
        self.seen: list[tuple[int, Tensor]] = []

    def loss(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = self.loss(batch, batch_idx)
        if loss is not None and self.is_read("train_loss"):
            self.log("train_loss", loss)
        return loss

    def is_read(self, name: str) -> bool:
        """Whether anybody reads a metric: to log a number takes a quarter of a small step, and most runs are of weights."""
        trainer = self.trainer
        if trainer.barebones:
            return False
        monitors = {config.monitor for config in trainer.lr_scheduler_configs}
        return bool(trainer.loggers or trainer.checkpoint_callbacks or trainer.progress_bar_callback) or name in monitors

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters(), **self.options)


class Poisoned(Regression):
    """The same, with a factor on the losses of chosen batches (counted over epochs)."""

    def __init__(self, factors: dict[int, float | None], **options: Any) -> None:
        super().__init__(**options)
        self.factors = factors

    def loss(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        factor = self.factors.get(number, 1.0)
        loss = super().loss(batch, batch_idx)
        return None if factor is None or loss is None else loss * factor


class Iterating(Poisoned):
    """The same, with a ``training_step`` that draws its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Tensor | None:
        batch, batch_idx, _ = next(dataloader_iter)
        return self.loss(batch, batch_idx)


class GradientTape(LightningModule):
    """Gradients are what ``feed`` says: loss = <weight, feed[batch]>."""

    def __init__(self, feed: Tensor, lr: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(feed.shape[1]))
        self.register_buffer("feed", feed)
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.weight * batch[0][0]).sum()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.feed))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def data(batches: int = 12, size: float = 10.0, batch_size: int = 4, features: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(batches * batch_size, features, generator=generator)
    # sizes differ from batch to batch, so that some steps are clipped and some are not
    scale = size * torch.rand(batches, generator=generator).repeat_interleave(batch_size)[:, None]
    return DataLoader(TensorDataset(inputs, scale * torch.randn(len(inputs), 1, generator=generator)), batch_size=batch_size)


def make_trainer(tmp_path: Any, *callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": tmp_path,
    }
    if options.get("barebones"):
        defaults = {key: defaults[key] for key in ("accelerator", "devices", "max_epochs", "default_root_dir")}
    return Trainer(callbacks=list(callbacks), **(defaults | options))


def numbers(state: Any) -> Any:
    """A state without its strings, which are no tensors to compare."""
    if isinstance(state, dict):
        return {key: numbers(value) for key, value in state.items() if not isinstance(value, str)}
    return [numbers(item) for item in state if not isinstance(item, str)] if isinstance(state, (list, tuple)) else state


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b), (a - b).abs().max()


class EitherWay(Regression):
    """Trained in automatic or in manual optimization, as ``automatic_optimization`` says."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None


class TwoNetworks(Regression):
    """A GAN's shape: each network's loss leaves gradients on the other one too, and its optimizer must not see them."""

    automatic_optimization = False

    def __init__(self, factors=()):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(4, 4), nn.Linear(4, 1)
        del self.net
        self.factors = dict(factors)
        self.held = []

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        fake = self.generator(batch[0])
        first.zero_grad()
        self.manual_backward(self.discriminator(fake).mean() * self.factors.get(batch_idx, 1.0))
        stale = [parameter.grad.clone() for parameter in self.discriminator.parameters()]
        first.step()
        self.held.append(all(torch.equal(p.grad, g) for p, g in zip(self.discriminator.parameters(), stale, strict=True)))
        second.zero_grad()
        self.manual_backward(-self.discriminator(fake.detach()).mean() * 100 + self.discriminator(batch[0]).mean() * 50)
        second.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.generator.parameters(), lr=0.01), torch.optim.SGD(self.discriminator.parameters(), lr=0.01)]


def scaled(**options):
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **options))]}


def limit_states(callback: Any, index: int = 0) -> list[dict[str, Tensor]]:
    """What the limits of a callback remember of one optimizer, as a checkpoint has it."""
    state = callback.state_dict()
    if "skip_above" in state:
        return [state["skip_above"][index]["state"]]
    return [held["state"] for held in (*state["limits"][index].values(), *state["shadows"][index].values())]


def leaves(state):
    if isinstance(state, dict):
        return [x for key in sorted(state, key=str) for x in leaves(state[key])]
    if isinstance(state, (list, tuple)):
        return [x for item in state for x in leaves(item)]
    return [] if state is None or isinstance(state, str) else [torch.as_tensor(state)]
