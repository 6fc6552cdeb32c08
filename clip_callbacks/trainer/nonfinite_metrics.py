"""Metrics that the module logs itself: a skipped step takes its loss back nowhere but in the weights.

``self.log("train_loss", loss, on_epoch=True)`` adds the loss up as soon as it is called: from one NaN on the epoch's mean is NaN,
and EarlyStopping, with ``check_finite`` as it is by default, ends the run without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torchmetrics import Metric

from clip_callbacks.core.nonfinite import all_finite
from clip_callbacks.trainer.compat import EARLY_STOPPING, MODEL_CHECKPOINT, is_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def lost_metrics(trainer: Trainer) -> list[str]:
    """A sentence for each metric that is not finite for the rest of the epoch, and that somebody in the Trainer acts upon."""
    lost: dict[str, set[str]] = {}
    for result in trainer.fit_loop.epoch_loop._results.values():
        meta = result.meta
        if meta.on_epoch and not _is_finite(result.value):
            lost[meta.name] = {meta.name, meta.forked_name(on_step=False)}
    told = {name: list(_consequences(trainer, names)) for name, names in lost.items()}
    return [
        f"{name}, as the module logs it, is not finite any more until the epoch ends: then {' and '.join(deeds)}. "
        "Log the loss only where it is finite."
        for name, deeds in told.items()
        if deeds
    ]


def _is_finite(value: Tensor | Metric) -> bool:
    """Whether what is added up so far is; of a metric of torchmetrics, whether no NaN is in it: some begin with infinity."""
    if isinstance(value, Tensor):
        return all_finite([value])
    states: list[Any] = list(value.metric_state.values())
    tensors = [part for state in states for part in (state if isinstance(state, list) else [state])]
    return not any(bool(tensor.isnan().any()) for tensor in tensors if tensor.is_floating_point())


def _consequences(trainer: Trainer, names: set[str]) -> Iterator[str]:
    """What is done at the epoch's end about a metric that is not finite."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        kind = type(callback).__name__
        if is_of(callback, EARLY_STOPPING) and callback.monitor in names and callback.check_finite:
            yield f"{kind} stops the run (check_finite=True)"
        elif is_of(callback, MODEL_CHECKPOINT) and callback.monitor in names:
            yield f"{kind} takes the epoch for the worst one"
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.monitor in names:
            yield f"{type(config.scheduler).__name__} counts an epoch without progress"
