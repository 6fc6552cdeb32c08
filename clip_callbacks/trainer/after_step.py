"""The end of one optimizer step, whatever it calls inside.

torch's step hooks run once for the ``step`` of each class that calls its parent's, and a wrapper that is no ``Optimizer`` has
none: they cannot tell the end from the middle. Lightning's own optimizer says so once, at the very end, in automatic and in
manual optimization, and with a GradScaler in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def at_end_of_step(trainer: Trainer, optimizer: Optimizer, call: Callable[[], None]) -> Callable[[], None]:
    """Have something called once, when the step that is under way is over.

    Args:
        trainer: The Trainer.
        optimizer: One of its optimizers, within its step.
        call: What is called; what it raises comes out of the step.

    Returns:
        What takes it back; it does nothing once the step is over.
    """
    stepping = next(each for each in trainer.strategy._lightning_optimizers if each.optimizer is optimizer)
    before = stepping._on_after_step

    def after() -> None:
        take_back()
        before()
        call()

    def take_back() -> None:
        if stepping._on_after_step is after:
            stepping._on_after_step = before

    stepping._on_after_step = after
    return take_back
