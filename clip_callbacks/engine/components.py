"""The parts that take part in a fit: made by gradient callbacks, or by default where no callback brings one."""

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
    """The parts that one gradient callback brings to a fit.

    Args:
        clipper: The part that clips.
        guard: The part that decides on bad steps.
        default_guard: The part that decides on bad steps if no other callback brings a guard.
        rescaler: The part that turns the sums of accumulation windows into means.
        monitor: The part that observes the steps.
        norm_type: The order of norms that the callback requires; None if it takes any.
        shows: If True, the progress bar shows the norm.
        summary: If True, a summary is logged at the end of the fit; if False, none is; None leaves it to other callbacks.
        histories: States of the optimizers' histories from the callback's checkpoint, by the number of the optimizer.
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
    """All parts that take part in a fit.

    Args:
        clipper: The part that clips.
        guard: The part that decides on bad steps.
        rescaler: The part that turns the sums of accumulation windows into means.
        monitors: The parts that observe the steps.
        norm_type: The order of all norms.
        shows: If True, the progress bar shows the norm.
        summary: If True, a summary is logged at the end of the fit: a callback wants it, and no other one declines it.
        histories: States of the optimizers' histories from a checkpoint, by the number of the optimizer.
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
    """Combine the parts of all gradient callbacks of a Trainer.

    Args:
        trainer: The Trainer.
        module: The module to train.
        parts: The parts of each callback, in the Trainer's order.
    """
    each = list(parts)
    return Components(
        clipper=_first([one.clipper for one in each], Unclipped()),
        # a guard that the user has asked for comes before the one that GradientClipping brings
        guard=_first([one.guard for one in each] + [one.default_guard for one in each], Unguarded()),
        rescaler=_first([one.rescaler for one in each], NoRescaling(trainer, module)),
        monitors=tuple(one.monitor for one in each if one.monitor is not None),
        norm_type=_first([one.norm_type for one in each], 2.0),
        shows=any(one.shows for one in each),
        # None has no say; True and False together mean False
        summary={True} == {one.summary for one in each} - {None},
        histories={int(index): history for one in each for index, history in one.histories.items()},
    )


def _first(found: list[Any], default: Any) -> Any:
    """Return the first element that is not None."""
    return next((one for one in found if one is not None), default)
