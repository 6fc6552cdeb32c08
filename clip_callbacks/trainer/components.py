"""Who of a family does what in its pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from clip_callbacks.callbacks.accumulation import AccumulationRescaling
    from clip_callbacks.callbacks.clipping import GradientClipping
    from clip_callbacks.callbacks.guard import NonFiniteGuard
    from clip_callbacks.callbacks.monitor import GradientNormMonitor
    from clip_callbacks.engine.base import Member


@dataclass(frozen=True)
class Roles:
    """Who does what in a pass; without a guard of its own, a GradientClipping brings one."""

    clipping: GradientClipping | None
    guard: NonFiniteGuard | None
    rescaling: AccumulationRescaling | None
    monitors: tuple[GradientNormMonitor, ...]

    @classmethod
    def of(cls, members: Sequence[Member]) -> Roles:
        """Cast the members of one Trainer."""
        of_kind: dict[str, Member] = {member.kind: member for member in members}
        clipping = cast("GradientClipping | None", of_kind.get("clipping"))
        return cls(
            clipping,
            cast("NonFiniteGuard | None", of_kind.get("guard")) or (clipping.guard if clipping else None),
            cast("AccumulationRescaling | None", of_kind.get("rescaling")),
            tuple(cast("GradientNormMonitor", member) for member in members if member.kind == "monitor"),
        )
