"""The end of one optimizer step.

Trap: step hooks of torch cannot tell the end of a step from its middle. They run once for the ``step`` of each class that calls
its parent's ``step``, and a wrapper that is no ``Optimizer`` has none. ``LightningOptimizer.step`` instead calls its
``_on_after_step`` exactly once, right before it returns, in automatic and manual optimization, with a GradScaler or without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def call_after_step(trainer: Trainer, optimizer: Optimizer, call: Callable[[], None]) -> Callable[[], None]:
    """Call a function once, at the end of the optimizer step under way.

    Args:
        trainer: The Trainer.
        optimizer: One of its optimizers, in the middle of its step.
        call: The function to call. Its exceptions propagate out of the step.

    Returns:
        A function that cancels the call. It does nothing once the step is over.
    """
    stepping = next(each for each in trainer.strategy._lightning_optimizers if each.optimizer is optimizer)
    before = stepping._on_after_step

    def after() -> None:
        cancel()
        before()
        call()

    def cancel() -> None:
        # in manual optimization Lightning assigns the attribute again at the end of each training_step: do not overwrite that value
        if stepping._on_after_step is after:
            stepping._on_after_step = before

    stepping._on_after_step = after
    return cancel
