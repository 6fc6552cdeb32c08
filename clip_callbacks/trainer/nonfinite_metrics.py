"""Metrics that the module logs itself and that a bad step has made non-finite for the rest of the epoch.

Trap: ``self.log("train_loss", loss, on_epoch=True)`` adds the loss to a running mean as soon as it is called. A skipped step does
not undo that: the mean of the epoch stays NaN, and EarlyStopping, whose ``check_finite`` is True by default, ends the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torchmetrics import Metric

from clip_callbacks.core.nonfinite import all_finite
from clip_callbacks.trainer.compat import EARLY_STOPPING, MODEL_CHECKPOINT, is_instance

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def describe_nonfinite_metrics(trainer: Trainer) -> list[str]:
    """Return a sentence for each metric that is non-finite for the rest of the epoch, if a callback or schedule reacts to it."""
    names_of: dict[str, set[str]] = {}
    for result in trainer.fit_loop.epoch_loop._results.values():
        meta = result.meta
        if meta.on_epoch and not _is_finite(result.value):
            names_of[meta.name] = {meta.name, meta.forked_name(on_step=False)}  # "loss", and "loss_epoch" if on_step=True too
    reactions = {name: list(_reactions(trainer, names)) for name, names in names_of.items()}
    return [
        f"{name}, as the module logs it, is non-finite until the epoch ends: then {' and '.join(each)}. "
        "Log the loss only where it is finite."
        for name, each in reactions.items()
        if each
    ]


def _is_finite(value: Tensor | Metric) -> bool:
    """Return whether an accumulated value is finite. A torchmetrics metric only must not hold NaN: some begin at infinity."""
    if isinstance(value, Tensor):
        return all_finite([value])
    tensors: list[Any] = []
    for state in value.metric_state.values():
        tensors += state if isinstance(state, list) else [state]
    return not any(bool(tensor.isnan().any()) for tensor in tensors if tensor.is_floating_point())


def _reactions(trainer: Trainer, names: set[str]) -> Iterator[str]:
    """Describe what callbacks and schedules do at the end of the epoch about a non-finite metric."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        kind = type(callback).__name__
        if is_instance(callback, EARLY_STOPPING) and callback.monitor in names and callback.check_finite:
            yield f"{kind} stops the run (check_finite=True)"
        elif is_instance(callback, MODEL_CHECKPOINT) and callback.monitor in names:
            yield f"{kind} ranks the epoch as the worst one"
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.monitor in names:
            yield f"{type(config.scheduler).__name__} counts an epoch without improvement"
