"""Classes of Lightning, found in whichever Lightning the program has imported.

Trap: Lightning goes by two names, ``lightning.pytorch`` and ``pytorch_lightning``: two copies of the same code whose classes are
unrelated, so that ``isinstance`` with a class of one is False for objects of the other. This package imports neither: that would
take seconds, and the import of a second Lightning changes where messages and deprecation warnings of the first one go. The program
has imported the one that it uses, or both, before anything is asked here.
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
"""The two names of Lightning."""

Kind = TypeVar("Kind")


def class_in(package: str, path: str) -> type[Any] | None:
    """Return a class of one Lightning; None if that is not imported, or its version has no such class.

    Args:
        package: One of :data:`PACKAGES`.
        path: The path of the class below the package, such as ``"strategies.FSDPStrategy"``.
    """
    if sys.modules.get(package) is None:
        return None
    place, _, name = f"{package}.{path}".rpartition(".")
    found: type[Any] | None = getattr(import_module(place), name, None)
    return found


@dataclass(frozen=True)
class LightningClass(Generic[Kind]):
    """A class of Lightning, in each of the two packages.

    Args:
        path: The path of the class below the package.
    """

    path: str

    @property
    def classes(self) -> tuple[type[Kind], ...]:
        """The class in each of the packages that are imported."""
        found = [class_in(package, self.path) for package in PACKAGES]
        return tuple(kind for kind in found if kind is not None)


CALLBACK: LightningClass[Callback] = LightningClass("Callback")
DATALOADER_ITER_FETCHER: LightningClass[_DataLoaderIterDataFetcher] = LightningClass("loops.fetchers._DataLoaderIterDataFetcher")
DEEPSPEED: LightningClass[DeepSpeedStrategy] = LightningClass("strategies.DeepSpeedStrategy")
EARLY_STOPPING: LightningClass[EarlyStopping] = LightningClass("callbacks.EarlyStopping")
FSDP: LightningClass[FSDPStrategy] = LightningClass("strategies.FSDPStrategy")
GRADIENT_ACCUMULATION_SCHEDULER: LightningClass[GradientAccumulationScheduler] = LightningClass(
    "callbacks.GradientAccumulationScheduler"
)
LEARNING_RATE_SEARCH: LightningClass[_LRCallback] = LightningClass("tuner.lr_finder._LRCallback")
MODEL_CHECKPOINT: LightningClass[ModelCheckpoint] = LightningClass("callbacks.ModelCheckpoint")
MODEL_PARALLEL: LightningClass[ModelParallelStrategy] = LightningClass("strategies.ModelParallelStrategy")
MODEL_SUMMARY: LightningClass[ModelSummary] = LightningClass("callbacks.ModelSummary")
MODULE: LightningClass[LightningModule] = LightningClass("LightningModule")
OPTIMIZABLE: LightningClass[Any] = LightningClass("core.optimizer.Optimizable")  # a protocol
STOCHASTIC_WEIGHT_AVERAGING: LightningClass[StochasticWeightAveraging] = LightningClass("callbacks.StochasticWeightAveraging")
TENSORBOARD: LightningClass[TensorBoardLogger] = LightningClass("loggers.TensorBoardLogger")
TRAINER: LightningClass[Trainer] = LightningClass("Trainer")
WANDB: LightningClass[WandbLogger] = LightningClass("loggers.WandbLogger")
WEIGHT_AVERAGING: LightningClass[Any] = LightningClass("callbacks.WeightAveraging")  # since Lightning 2.6


def is_instance(thing: object, kind: LightningClass[Kind]) -> TypeGuard[Kind]:
    """Return whether an object is an instance of a class of either Lightning.

    Example::

        >>> import lightning.pytorch, pytorch_lightning
        >>> is_instance(pytorch_lightning.LightningModule(), MODULE), is_instance(lightning.pytorch.LightningModule(), MODULE)
        (True, True)
    """
    return isinstance(thing, kind.classes)


def overrides(thing: object, hook: str, kind: LightningClass[Any] = MODULE) -> bool:
    """Return whether an object has a hook of its own, in its class or on the instance.

    Args:
        thing: A module, or an object of another kind.
        hook: The name of the hook.
        kind: The class of Lightning that defines the hook.
    """
    method = getattr(thing, hook)
    function = getattr(method, "__func__", method)  # an attribute of the instance may be any callable
    return all(function is not getattr(base, hook) for base in kind.classes)


def package_of(trainer: Trainer) -> str:
    """Return the name of the Lightning that a Trainer belongs to."""
    for package in PACKAGES:
        kind = class_in(package, TRAINER.path)
        if kind is not None and isinstance(trainer, kind):
            return package
    return PACKAGES[0]
