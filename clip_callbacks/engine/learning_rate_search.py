"""Gradient callbacks in Lightning's search for the learning rate, which trains without the Trainer's callbacks.

The search sets ``trainer.callbacks`` to one callback of its own and restores the list in the end (``tuner/lr_finder.py``); hooks of
the module are called as in any fit. Therefore the module's ``on_train_start`` is extended for the fit. In a search it adds copies
of the gradient callbacks to the list, so that the search trains with clipped gradients and the run's own states do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from clip_callbacks.trainer.compat import LEARNING_RATE_SEARCH, is_instance
from clip_callbacks.trainer.extended_method import ExtendedMethod
from clip_callbacks.trainer.lightning_callback import LightningCallback
from clip_callbacks.trainer.messages import is_silent, log_message

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer


class SearchParticipant(Protocol):
    """A gradient callback that takes part in searches."""

    def _copy_for_search(self) -> Any:
        """Return a copy for a search; None if the callback is not needed there."""
        ...

    def _detach_engine(self) -> None:
        """Remove the hooks of the fit; after the search a checkpoint restores its state."""
        ...


class LearningRateSearch:
    """Adds gradient callbacks to searches for the learning rate, before a fit and in mid-fit.

    Args:
        trainer: The Trainer.
        module: The module to train.
        callbacks: The gradient callbacks of the Trainer, the driver first.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, callbacks: Sequence[SearchParticipant]) -> None:
        self._trainer = trainer
        self._module = module
        self._callbacks = callbacks
        self._is_silent = is_silent(trainer)  # asked now: in a search the progress bar and other callbacks are gone
        self._method = ExtendedMethod(module, "on_train_start", self._add_copies)

    def _add_copies(self) -> None:
        """Add copies of the callbacks if the training that starts is a search.

        Lightning has saved a checkpoint before the search and restores it afterwards, with the states of the callbacks.
        """
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        if not any(is_instance(callback, LEARNING_RATE_SEARCH) for callback in callbacks):
            return
        copies = [copy for callback in self._callbacks if (copy := callback._copy_for_search()) is not None]
        # the run's own engine would count and restore steps of the search
        for callback in self._callbacks:
            callback._detach_engine()
        if copies:
            self._trainer.callbacks = [*callbacks, self._search_end(copies[0]), *copies]  # type: ignore[attr-defined]
            # these hooks of callbacks have been called already
            copies[0]._make_engine(self._trainer, self._module)
            copies[0].on_train_start(self._trainer, self._module)

    def _search_end(self, driver: Any) -> _SearchEnd:
        return _SearchEnd(driver, self.detach, logs_skipped_steps=not self._is_silent)

    def detach(self) -> None:
        """Restore the module's own hook."""
        self._method.detach()


class _SearchEnd(LightningCallback):
    """Ends the fit of the copies in a search. It comes before them in the list, so that they log no summary.

    Args:
        driver: The first of the copies.
        detach: Function to call if the search raises: Lightning calls ``on_exception`` only of callbacks in the list of the search.
        logs_skipped_steps: If True, the number of steps skipped in the search is logged.
    """

    def __init__(self, driver: Any, detach: Callable[[], None], *, logs_skipped_steps: bool) -> None:
        super().__init__()
        self._driver = driver
        self._detach = detach
        self._logs_skipped_steps = logs_skipped_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing: the search begins after setup."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how many steps were skipped, and end the fit of the copies."""
        skipped, engine = 0, self._driver._engine
        if engine:
            skipped = engine.skipped_steps - self._driver._last_skipped_steps
        if skipped and self._logs_skipped_steps:
            steps = "1 bad step" if skipped == 1 else f"{skipped} bad steps"
            log_message(
                trainer,
                f"The search for the learning rate has skipped {steps}. If a loss was NaN, Lightning's running mean of the losses "
                "stays NaN, and it suggests no learning rate.",
            )
        self._driver._end_fit()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the fit of the copies, and restore the module's own hook."""
        self._driver._end_fit()
        self._detach()
