"""Lightning goes by two names, ``lightning.pytorch`` and ``pytorch_lightning``: the same code twice, strangers to each other.

Neither is imported by this package. A program has imported the one that it uses, or both, before anything is asked here; to
import the other one beside it would take time, and change where the first one's messages and deprecation warnings go.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeGuard, TypeVar

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import (
        EarlyStopping,
        GradientAccumulationScheduler,
        ModelCheckpoint,
        ModelSummary,
        StochasticWeightAveraging,
    )
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
    from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
    from lightning.pytorch.tuner.lr_finder import _LRCallback

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""The two names."""

Kind = TypeVar("Kind")


def class_in(package: str, path: str) -> type[Any] | None:
    """A class of one Lightning; None if that has not been imported, or is of a version without the class.

    Args:
        package: One of the two names.
        path: The place of the class below the package, such as ``strategies.FSDPStrategy``.
    """
    if sys.modules.get(package) is None:
        return None
    place, _, name = f"{package}.{path}".rpartition(".")
    found: type[Any] | None = getattr(import_module(place), name, None)
    return found


@dataclass(frozen=True)
class Twins(Generic[Kind]):
    """A class of Lightning's under both names.

    Args:
        path: Its place below the package.
    """

    path: str

    @property
    def classes(self) -> tuple[type[Kind], ...]:
        """Those of the packages that have been imported."""
        found = [class_in(package, self.path) for package in PACKAGES]
        return tuple(kind for kind in found if kind is not None)


CALLBACK: Twins[Callback] = Twins("Callback")
DATALOADER_ITER_FETCHER: Twins[_DataLoaderIterDataFetcher] = Twins("loops.fetchers._DataLoaderIterDataFetcher")
DEEPSPEED: Twins[DeepSpeedStrategy] = Twins("strategies.DeepSpeedStrategy")
EARLY_STOPPING: Twins[EarlyStopping] = Twins("callbacks.EarlyStopping")
FSDP: Twins[FSDPStrategy] = Twins("strategies.FSDPStrategy")
GRADIENT_ACCUMULATION_SCHEDULER: Twins[GradientAccumulationScheduler] = Twins("callbacks.GradientAccumulationScheduler")
LEARNING_RATE_SEARCH: Twins[_LRCallback] = Twins("tuner.lr_finder._LRCallback")
MODEL_CHECKPOINT: Twins[ModelCheckpoint] = Twins("callbacks.ModelCheckpoint")
MODEL_PARALLEL: Twins[ModelParallelStrategy] = Twins("strategies.ModelParallelStrategy")
MODEL_SUMMARY: Twins[ModelSummary] = Twins("callbacks.ModelSummary")
MODULE: Twins[LightningModule] = Twins("LightningModule")
OPTIMIZABLE: Twins[Any] = Twins("core.optimizer.Optimizable")  # a protocol
STOCHASTIC_WEIGHT_AVERAGING: Twins[StochasticWeightAveraging] = Twins("callbacks.StochasticWeightAveraging")
TENSORBOARD: Twins[TensorBoardLogger] = Twins("loggers.TensorBoardLogger")
TRAINER: Twins[Trainer] = Twins("Trainer")
WANDB: Twins[WandbLogger] = Twins("loggers.WandbLogger")
WEIGHT_AVERAGING: Twins[Any] = Twins("callbacks.WeightAveraging")  # since Lightning 2.6


def is_of(thing: object, kind: Twins[Kind]) -> TypeGuard[Kind]:
    """Whether a thing is of a class of either Lightning.

    Example::

        >>> import lightning.pytorch, pytorch_lightning
        >>> is_of(pytorch_lightning.LightningModule(), MODULE), is_of(lightning.pytorch.LightningModule(), MODULE)
        (True, True)
    """
    return isinstance(thing, kind.classes)


def overrides(thing: object, hook: str, kind: Twins[Any] = MODULE) -> bool:
    """Whether a module, or a thing of another kind, has a hook of its own."""
    method = getattr(thing, hook)
    function = getattr(method, "__func__", method)  # what hangs on an instance may be any callable
    return all(function is not getattr(base, hook) for base in kind.classes)


def package_of(trainer: Trainer) -> str:
    """The name of the Lightning that a Trainer is of."""
    for package in PACKAGES:
        kind = class_in(package, TRAINER.path)
        if kind is not None and isinstance(trainer, kind):
            return package
    return PACKAGES[0]
