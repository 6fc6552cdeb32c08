from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.ranks import Ranks

os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # of Lightning's own calls
collect_ignore = ["typed_script.py"]  # for mypy only: some of its lines are wrong
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"one_rank", "two_ranks", "four_ranks"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("ranks")


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed_everything(7, verbose=False)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    import clip_callbacks
    from clip_callbacks import rules

    doctest_namespace.update(vars(clip_callbacks) | {"torch": torch, "ClipRule": rules.ClipRule})


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
        if loss is not None and not self.trainer.barebones:
            self.log("train_loss", loss)
        return loss

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


@pytest.fixture
def trainer(tmp_path: Any) -> Callable[..., Trainer]:
    return lambda *callbacks, **options: make_trainer(tmp_path, *callbacks, **options)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture
def run(one_rank: Ranks, two_ranks: Ranks, four_ranks: Ranks) -> Callable[..., list[Any]]:
    """Run a function, by default a training, on as many ranks as a strategy of ``tests.parallel`` has."""
    from tests import parallel

    pools = {1: one_rank, 2: two_ranks, 4: four_ranks}

    def on_all(name: str, *args: Any, function: Callable[..., Any] = parallel.result, **kwargs: Any) -> list[Any]:
        return pools[parallel.STRATEGIES[name][0]].run(function, name, *args, **kwargs)

    return on_all


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
