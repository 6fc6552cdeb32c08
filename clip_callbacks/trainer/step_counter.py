"""The counter of optimizer steps that ``trainer.global_step`` reads.

Trap: ``global_step`` takes seven calls, which look up the module and the way it is optimized each time. Both stay the same in a
fit, and so does the counter: a checkpoint that is restored in mid-fit sets its numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class StepCounter(Protocol):
    """A count of optimizer steps.

    Attributes:
        completed: The number of steps of the run so far.
    """

    completed: int


def step_counter(trainer: Trainer, module: LightningModule) -> StepCounter:
    """Return the counter of a fit, whose ``completed`` is ``trainer.global_step``."""
    loop = trainer.fit_loop.epoch_loop
    if module.automatic_optimization:
        return loop.automatic_optimization.optim_progress.optimizer.step.total
    return loop.manual_optimization.optim_step_progress.total
