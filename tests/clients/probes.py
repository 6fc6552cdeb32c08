"""Callbacks of both Lightnings that the checks add, and a resume for packages that pass no checkpoint on."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback
from pytorch_lightning import Callback as OtherCallback
from torch import Tensor


class SaveAfterFirstEpoch(Callback, OtherCallback):
    """A checkpoint of a run that goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


class BatchCount(Callback, OtherCallback):
    """How many batches a fit has trained on: fewer in one that was resumed."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1


class NaNBatch(Callback, OtherCallback):
    """The batch of one optimizer step is NaN while it is used; data that a package keeps in memory are whole afterwards."""

    def __init__(self, step: int, floats_of: Callable[[Any], list[Tensor]]) -> None:
        self.step, self.floats_of = step, floats_of
        self.kept: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.kept = [(tensor, tensor.clone()) for tensor in self.floats_of(batch)]
            assert self.kept
            for tensor, _ in self.kept:
                tensor.fill_(math.nan)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for tensor, before in self.kept:
            tensor.copy_(before)
        self.kept = []


@contextmanager
def resumed_from(path: Path) -> Iterator[None]:
    """Every fit takes up this checkpoint."""
    with ExitStack() as stack:
        for name in ("lightning.pytorch", "pytorch_lightning"):
            if name in sys.modules:
                trainer = sys.modules[name].Trainer
                stack.enter_context(mock.patch.object(trainer, "fit", _resuming(trainer.fit, path)))
        yield


def _resuming(fit: Any, path: Path) -> Any:
    @functools.wraps(fit)
    def resuming(self: Any, *arguments: Any, **options: Any) -> Any:
        # hyperparameters of other packages hold what only a trusted checkpoint may
        return fit(self, *arguments, **(options | {"ckpt_path": str(path), "weights_only": False}))

    return resuming
