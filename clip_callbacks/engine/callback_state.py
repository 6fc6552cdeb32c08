"""The state of a gradient callback between fits, in checkpoints, in copies, and on the way back from launched processes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from clip_callbacks.core.step_report import StepReport
from clip_callbacks.engine.engine import StepEngine
from clip_callbacks.engine.resume import State, bad_step_counts, check_histories, reading
from clip_callbacks.trainer.launched_processes import ResultReturningCallback
from clip_callbacks.trainer.lightning_callback import LightningCallback
from clip_callbacks.trainer.run_identity import RunIdentity

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class StatefulCallback(ResultReturningCallback, LightningCallback):
    """A callback whose state is held by the engine during a fit, and by itself between fits and after a checkpoint is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self._saved: dict[str, Any] = {}
        self._is_loaded = False
        self._run_identity = RunIdentity()
        self._last_report: StepReport | None = None
        self._last_skipped_steps = 0

    @property
    def last_report(self) -> StepReport | None:
        """The report of the last optimizer step; None before the first."""
        if self._engine is None:
            return self._last_report
        record = self._engine.last_report
        return None if record is None else StepReport(record)

    @property
    def skipped_steps(self) -> int:
        """The number of optimizer steps of this run skipped for non-finite gradients so far, over all optimizers."""
        # after a checkpoint is loaded and before its engine is made, the checkpoint's counts are the newest
        if self._is_loaded and (counted := bad_step_counts([self._saved])):
            return sum(counters.get("skipped", 0) for counters in counted["counters"].values())
        return self._engine.skipped_steps if self._engine else self._last_skipped_steps

    # --- for subclasses

    @property
    @abstractmethod
    def _engine(self) -> StepEngine | None:
        """The engine of the fit; None between fits."""

    @abstractmethod
    def _state_of(self, engine: StepEngine) -> dict[str, Any]:
        """Return the state in mid-fit."""

    def _empty_state(self) -> dict[str, Any]:
        """Return the state before the first fit."""
        return {}

    def _check_state(self, state: State) -> None:
        """Check that a state can be read.

        Raises:
            LookupError, TypeError, ValueError: If it is damaged.
        """

    def _carry_over(self, others: Sequence[State]) -> list[str]:
        """Take over state from other callbacks, if the checkpoint has none of this one.

        Args:
            others: The states of all gradient callbacks in the checkpoint.

        Returns:
            Descriptions of the states that start empty, for a warning.
        """
        return [self.state_key] if self._empty_state() and not self._saved else []

    # --- between fits

    def _begin_run(self, trainer: Trainer, module: LightningModule) -> None:
        """Reset the state, unless a checkpoint was loaded or the Trainer continues the last run."""
        if not self._run_identity.is_continued_by(trainer, module):
            self._last_report, self._last_skipped_steps = None, 0
            if not self._is_loaded:
                self._saved = {}
        self._run_identity = RunIdentity(trainer, module)

    def _save_results(self) -> None:
        """Save the state and the results at the end of a fit."""
        self._last_skipped_steps = self.skipped_steps  # first: it collects pending reports
        self._last_report = self.last_report
        self._save()
        self._is_loaded = False  # by a search in mid-fit; the state is that of this fit

    def _save(self) -> None:
        """Save the present state, unless a checkpoint has loaded another one."""
        if not self._is_loaded:
            self._saved = self.state_dict()

    def _clear_saved(self) -> None:
        """Clear the saved state: from now on the engine's parts hold it."""
        self._saved, self._is_loaded = {}, False

    # --- checkpoints, copies, processes

    def state_dict(self) -> dict[str, Any]:
        """Return the state with which a resumed run continues as if it had not stopped."""
        engine = self._engine
        if engine is None or self._is_loaded:
            return self._saved or {"history": {}, **self._empty_state()}
        engine.collect_pending()
        return self._state_of(engine)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from :meth:`state_dict`.

        Raises:
            ValueError: If the state is damaged.
        """
        # a callback of another package may have the same class name, and Lightning matches states by that name alone
        if "history" not in state_dict:
            rank_zero_warn(
                f"The checkpoint's state of {self.state_key} is ignored, and {type(self).__name__} starts from an empty state: it "
                "belongs to "
                f"another callback of this name, with the keys {sorted(map(str, state_dict))}.",
                stacklevel=2,
            )
            return
        # what an earlier version did not save begins empty
        state_dict = {**state_dict, **{key: value for key, value in self._empty_state().items() if key not in state_dict}}
        with reading(type(self).__name__):
            check_histories(state_dict)
            self._check_state(state_dict)
        self._saved = state_dict
        self._is_loaded = True

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy with the present state, without the engine."""
        own = {"_is_loaded": self._is_loaded, "_run_identity": RunIdentity()}  # weak references cannot be pickled
        return {**super().__getstate__(), **self._results_so_far(), **own}

    def _results(self) -> dict[str, Any]:
        # with the key, which setup has set in the launched process only
        return {**self._results_so_far(), "_is_loaded": False, "state_key": self.state_key}

    def _results_so_far(self) -> dict[str, Any]:
        saved = self._saved
        if self._engine is not None:
            saved = self.state_dict()
        return {"_saved": saved, "_last_skipped_steps": self.skipped_steps, "_last_report": self.last_report}
