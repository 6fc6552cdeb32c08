"""Whether a fit goes on with the run of the last one, as ``trainer.global_step`` does."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import ref

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class LastRun:
    """The Trainer and the module of a callback's last fit; it keeps neither of them alive.

    Args:
        trainer: The Trainer; None before the first fit.
        module: The module; None before the first fit.
    """

    def __init__(self, trainer: Trainer | None = None, module: LightningModule | None = None) -> None:
        self._trainer = None if trainer is None else ref(trainer)
        self._module = None if module is None else ref(module)

    def goes_on(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether a fit that is set up goes on counting steps: the same Trainer, which has taken some, has the same module."""
        if self._trainer is None or self._module is None or not trainer.global_step:
            return False
        return self._trainer() is trainer and self._module() is module
