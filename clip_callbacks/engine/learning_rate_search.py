"""A search for the learning rate, for which Lightning takes all callbacks out of the Trainer: the gradient callbacks go in again.

The search trains with one callback of Lightning's own in ``trainer.callbacks``, and puts that list back in the end. Hooks of the
module are called there as ever. So the module's ``on_train_start`` is extended for the fit, and adds copies of the gradient
callbacks to the list of the search: the run itself learns nothing of the steps that it takes.
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


class Searching(Protocol):
    """A gradient callback, as far as a search is concerned."""

    def _copy_for_search(self) -> Any:
        """A copy for a search; None if it has no use there."""
        ...

    def _detach_engine(self) -> None:
        """Take the hooks of a fit off, until a checkpoint brings its state back."""
        ...


class LearningRateSearch:
    """Brings gradient callbacks into searches for the learning rate, before a fit and in the middle of one.

    Args:
        trainer: The Trainer.
        module: The module to train.
        callbacks: The gradient callbacks of the Trainer, the one first that drives the others.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, callbacks: Sequence[Searching]) -> None:
        self._trainer = trainer
        self._module = module
        self._callbacks = callbacks
        self._is_silent = is_silent(trainer)  # in a search the progress bar is gone, too
        self._hook = ExtendedMethod(module, "on_train_start", self._begin)

    def _begin(self) -> None:
        """Join in if what starts to train is a search: its state before it is in a checkpoint of Lightning's."""
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        if not any(is_instance(callback, LEARNING_RATE_SEARCH) for callback in callbacks):
            return
        copies = [copy for callback in self._callbacks if (copy := callback._copy_for_search()) is not None]
        for callback in self._callbacks:
            callback._detach_engine()
        if copies:
            self._trainer.callbacks = [*callbacks, self._end_of_search(copies[0]), *copies]  # type: ignore[attr-defined]
            copies[0]._make_engine(self._trainer, self._module)
            copies[0].on_train_start(self._trainer, self._module)

    def _end_of_search(self, driver: Any) -> _EndOfSearch:
        return _EndOfSearch(driver, self.detach, says_what_was_skipped=not self._is_silent)

    def detach(self) -> None:
        """Give the module its own hook back."""
        self._hook.detach()


class _EndOfSearch(LightningCallback):
    """Ends the part of the gradient callbacks in a search, before they would sum up as at the end of a fit.

    Args:
        driver: The first of them.
        give_up: A function to call if the search raises: Lightning tells those callbacks only that are in the search.
        says_what_was_skipped: Whether the Trainer may say anything.
    """

    def __init__(self, driver: Any, give_up: Callable[[], None], *, says_what_was_skipped: bool) -> None:
        super().__init__()
        self._driver = driver
        self._give_up = give_up
        self._says_what_was_skipped = says_what_was_skipped

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave it to the fit: the search begins later."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many steps were skipped, and let go of the module and its optimizers."""
        before, engine = self._driver._last_skipped_steps, self._driver._engine
        skipped = engine.skipped_steps - before if engine else 0
        if skipped and self._says_what_was_skipped:
            steps = "1 step that was" if skipped == 1 else f"{skipped} steps that were"
            log_message(
                trainer,
                f"The search for the learning rate has skipped {steps} not fit to be taken. After a loss that is NaN, Lightning's "
                "running mean of the losses stays NaN, and it suggests no learning rate.",
            )
        self._driver._end_fit()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook on the module."""
        self._driver._end_fit()
        self._give_up()
