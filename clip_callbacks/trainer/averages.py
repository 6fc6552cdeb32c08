"""Running averages of the weights that other callbacks of the Trainer hold."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeAlias

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

Place: TypeAlias = tuple[int, str]
"""A callback's number and its attribute."""


def live_averages(trainer: Trainer) -> dict[Place, dict[str, Any]]:
    """The tensors of every ``AveragedModel`` that a callback holds, as WeightAveraging does, and of SWA's once it has begun."""
    found: dict[Place, dict[str, Any]] = {}
    for number, callback in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
        models = {name: value for name, value in vars(callback).items() if isinstance(value, AveragedModel)}
        found |= {(number, name): _tensors(model) for name, model in models.items()}
        if isinstance(callback, StochasticWeightAveraging) and callback.n_averaged is not None:
            assert callback._average_model is not None
            found[number, "_average_model"] = {"n_averaged": callback.n_averaged, **_tensors(callback._average_model)}
    return found


def begin_anew(trainer: Trainer, module: LightningModule, places: Collection[Place]) -> None:
    """Let SWA begin with the weights as they are now where it has begun since a copy was made: it has averaged what is gone."""
    for number, _ in places:
        callback = trainer.callbacks[number]  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            assert callback.n_averaged is not None
            assert callback._average_model is not None
            callback.n_averaged.zero_()
            callback.update_parameters(callback._average_model, module, callback.n_averaged, callback._avg_fn)


def _tensors(model: nn.Module) -> dict[str, Any]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
