"""The identity of a training run: the Trainer and the module of a callback's last fit.

Trap: a second ``trainer.fit`` with the same module continues to count ``trainer.global_step``; with another module or another
Trainer it is a new run. Lightning does not tell callbacks which of the two it is. A Trainer in whose hooks another one fits
calls teardown and ``on_exception`` of a callback that both of them hold, as if its own fit were over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import ref

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class RunIdentity:
    """The Trainer and the module of a callback's last fit, by weak references.

    Args:
        trainer: The Trainer; None before the first fit.
        module: The module; None before the first fit.
    """

    def __init__(self, trainer: Trainer | None = None, module: LightningModule | None = None) -> None:
        self._trainer = None if trainer is None else ref(trainer)
        self._module = None if module is None else ref(module)

    def is_continued_by(self, trainer: Trainer, module: LightningModule) -> bool:
        """Return whether a fit continues the last one: the same module, in the same Trainer, which has taken steps."""
        if self._trainer is None or self._module is None or not trainer.global_step:
            return False
        return self._trainer() is trainer and self._module() is module


def is_running(trainer: Trainer) -> bool:
    """Return whether a Trainer is in a fit, or another of its runs, that has neither ended nor raised."""
    # a string's value, since which of two Lightnings the enumeration is of does not matter
    status: str = trainer.state.status
    return status == "running"
