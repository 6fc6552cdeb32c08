"""What the checks ask of a package."""

from __future__ import annotations

import copy
import importlib
import pickle
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.clients.probes import NaNBatch

EPOCHS = 2


class Client(ABC):
    """A package, used as its users use it: a small model of its own on data made here. Each fit begins from the same seed."""

    clip: ClassVar[float] = 0.1
    """A ``max_norm`` that most steps exceed."""
    poisoned_step: ClassVar[int] = 1
    """The optimizer step whose batch is made NaN."""
    resumes_exactly: ClassVar[bool] = True
    """A fit of theirs that is resumed after an epoch ends with the weights of one that was not interrupted."""

    @abstractmethod
    def fit(self, folder: Path, callbacks: list[Any], *, clip: float | None = None) -> Any:
        """A model trained for ``EPOCHS`` epochs with these callbacks; ``clip`` is the package's own ``gradient_clip_val``."""

    @abstractmethod
    def save_and_load(self, model: Any, folder: Path) -> Any:
        """A fitted model, saved and loaded in the package's own way."""

    def module(self, model: Any) -> nn.Module:
        """The network of a model."""
        assert isinstance(model, nn.Module)
        return model

    def trained(self, model: Any, callbacks: list[Any]) -> list[Any]:
        """The callbacks that took part in a fit: those that were given, unless the package copies them."""
        return callbacks

    def nan_batch(self) -> Any:
        """A callback that makes one batch of a fit NaN, or, where a package raises at one by itself, one gradient."""
        return NaNBatch(self.poisoned_step, floats_of)

    def weights(self, model: Any) -> dict[str, Tensor]:
        """Parameters by name."""
        return {name: parameter.detach().clone() for name, parameter in self.module(model).named_parameters()}

    @staticmethod
    def trainer_options(folder: Path, callbacks: list[Any], clip: float | None) -> dict[str, Any]:
        """What is passed to a Trainer, directly or through the package."""
        return {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": EPOCHS,
            "callbacks": callbacks,
            "gradient_clip_val": clip,
            "default_root_dir": str(folder),
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        }


def client_of(name: str) -> Client:
    client: Client = importlib.import_module(f"tests.clients.packages.{name}").Package()
    return client


def floats_of(batch: Any) -> list[Tensor]:
    """Floating-point tensors in dictionaries, sequences and objects with attributes."""
    if isinstance(batch, Tensor):
        return [batch] if batch.is_floating_point() else []
    if isinstance(batch, dict):
        return [found for value in batch.values() for found in floats_of(value)]
    if isinstance(batch, (list, tuple)):
        return [found for value in batch for found in floats_of(value)]
    names = [*getattr(type(batch), "__slots__", ()), *getattr(batch, "__dict__", {})]
    return [found for name in names for found in floats_of(getattr(batch, name, None))]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """The same names with the same bits."""
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


COPIES = {"pickle": lambda model: pickle.loads(pickle.dumps(model)), "deepcopy": copy.deepcopy}


def weights_of_copy(client: Client, model: Any, way: str) -> dict[str, Tensor] | None:
    """Of a copied model; None where a package's models cannot be copied, or leave their weights behind."""
    try:
        return client.weights(COPIES[way](model))
    except Exception:  # any that another package may raise
        return None
