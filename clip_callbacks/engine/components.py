"""What takes part in a fit: the parts that gradient callbacks make, and what stands in for those that are not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clip_callbacks.accumulation.rescaler import NoRescaling
from clip_callbacks.clipping.clipper import Unclipped
from clip_callbacks.guard.unguarded import Unguarded
from clip_callbacks.publishing.monitor import Monitor

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


@dataclass(frozen=True)
class Parts:
    """What one gradient callback brings to a fit.

    Args:
        clipper: What clips.
        guard: What decides on bad steps.
        default_guard: What decides on them if no other callback brings a guard.
        rescaler: What makes windows means.
        monitor: The part that observes the steps.
        norm_type: The order of norms that it asks for; None takes any.
        shows: Whether the progress bar shows the norm.
        summary: Whether the fit is summed up in the end; None leaves it to others.
        histories: The histories of optimizers that its checkpoint knows, by their numbers.
    """

    clipper: Unclipped | None = None
    guard: Unguarded | None = None
    default_guard: Unguarded | None = None
    rescaler: NoRescaling | None = None
    monitor: Monitor | None = None
    norm_type: float | None = None
    shows: bool = False
    summary: bool | None = None
    histories: Mapping[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Components:
    """All that takes part in a fit.

    Args:
        clipper: What clips.
        guard: What decides on bad steps.
        rescaler: What makes windows means.
        monitors: The parts that observe the steps.
        norm_type: The order of all norms.
        shows: Whether the progress bar shows the norm.
        summary: Whether the fit is summed up in the end: a callback wants it, and none is against it.
        histories: What a checkpoint knows of the optimizers' histories, by their numbers.
    """

    clipper: Unclipped
    guard: Unguarded
    rescaler: NoRescaling
    monitors: tuple[Monitor, ...]
    norm_type: float
    shows: bool
    summary: bool
    histories: Mapping[int, Any]


def assemble(trainer: Trainer, module: LightningModule, parts: Iterable[Parts]) -> Components:
    """Bring together what the gradient callbacks of one Trainer bring.

    Args:
        trainer: The Trainer.
        module: The module to train.
        parts: What each callback brings, in the Trainer's order.
    """
    each = list(parts)
    return Components(
        clipper=_first([one.clipper for one in each], Unclipped()),
        guard=_first([one.guard for one in each] + [one.default_guard for one in each], Unguarded()),
        rescaler=_first([one.rescaler for one in each], NoRescaling(trainer, module)),
        monitors=tuple(one.monitor for one in each if one.monitor is not None),
        norm_type=_first([one.norm_type for one in each], 2.0),
        shows=any(one.shows for one in each),
        summary={True} == {one.summary for one in each} - {None},
        histories={int(index): history for one in each for index, history in one.histories.items()},
    )


def _first(found: list[Any], default: Any) -> Any:
    """The first that is there."""
    return next((one for one in found if one is not None), default)
