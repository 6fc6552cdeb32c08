"""The state of a gradient callback: kept between fits, brought by checkpoints, copied, pickled, sent back by launched processes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.engine.engine import StepEngine
from clip_callbacks.engine.resume import DAMAGED, State, bad_step_counts, check_histories, reading
from clip_callbacks.trainer.launched_processes import ResultReturningCallback
from clip_callbacks.trainer.lightning_callback import LightningCallback
from clip_callbacks.trainer.run_identity import RunIdentity

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class StatefulCallback(ResultReturningCallback, LightningCallback):
    """A callback whose state is with the engine in a fit, and with itself between fits and when a checkpoint has brought one."""

    def __init__(self) -> None:
        super().__init__()
        self._saved: dict[str, Any] = {}
        self._is_loaded = False
        self._run_identity = RunIdentity()
        self._last_report: StepRecord | None = None
        self._last_skipped_steps = 0

    @property
    def last_report(self) -> StepRecord | None:
        """What the last optimizer step's pass found and did; None before the first."""
        return self._engine.last_report if self._engine else self._last_report

    @property
    def skipped_steps(self) -> int:
        """How many optimizer steps of this run were skipped for non-finite gradients so far, over all optimizers."""
        if self._is_loaded and (counted := bad_step_counts([self._saved])):
            return sum(counters.get("skipped", 0) for counters in counted["counters"].values())
        return self._engine.skipped_steps if self._engine else self._last_skipped_steps

    # --- for subclasses

    @property
    @abstractmethod
    def _engine(self) -> StepEngine | None:
        """The engine of the fit, if there is one."""

    @abstractmethod
    def _state_of(self, engine: StepEngine) -> dict[str, Any]:
        """The state in the middle of a fit."""

    def _empty_state(self) -> dict[str, Any]:
        """The state before the first fit."""
        return {}

    def _check_state(self, state: State) -> None:
        """Read a state for trial.

        Raises:
            LookupError, TypeError, ValueError: If it is damaged.
        """

    def _carry_over(self, others: Sequence[State]) -> list[str]:
        """Go on with what other callbacks know, where the checkpoint has nothing of this one.

        Args:
            others: The states of all gradient callbacks in the checkpoint.

        Returns:
            What begins anew, in words.
        """
        return [self.state_key] if self._empty_state() and not self._saved else []

    # --- between fits

    def _begin_run(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin a new run, unless a checkpoint has brought a state, or the Trainer goes on with the last one."""
        if not self._run_identity.is_continued_by(trainer, module):
            self._last_report, self._last_skipped_steps = None, 0
            if not self._is_loaded:
                self._saved = {}
        self._run_identity = RunIdentity(trainer, module)

    def _save_results(self) -> None:
        """Keep what is known at the end of a fit."""
        self._last_skipped_steps = self.skipped_steps  # settles what is pending
        self._last_report = self.last_report
        self._save()
        self._is_loaded = False  # in the middle of a fit: the state is that of this fit

    def _save(self) -> None:
        """Keep the state as it is now, unless a checkpoint has brought another one."""
        if not self._is_loaded:
            self._saved = self.state_dict()

    def _clear_saved(self) -> None:
        """Leave the state to the parts: the engine has been made."""
        self._saved, self._is_loaded = {}, False

    # --- checkpoints, copies, processes

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped."""
        engine = self._engine
        if engine is None or self._is_loaded:
            return self._saved or {"history": {}, **self._empty_state()}
        engine.collect_pending()
        return self._state_of(engine)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is not one of this callback, or is damaged.
        """
        if "history" not in state_dict:
            rank_zero_warn(
                f"The checkpoint's state of {self.state_key} is left out, and {type(self).__name__} begins anew: it belongs to "
                f"another callback of this name, with the keys {sorted(map(str, state_dict))}.",
                stacklevel=2,
            )
            return
        missing = sorted(self._empty_state().keys() - state_dict.keys())
        if missing:
            got = f"got keys {sorted(state_dict)} without {missing}"
            raise ValueError(f"the checkpoint's state must be one of {type(self).__name__}, {got}. {DAMAGED}")
        with reading(type(self).__name__):
            check_histories(state_dict)
            self._check_state(state_dict)
        self._saved = dict(state_dict)
        self._is_loaded = True

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy with the state as it is now."""
        return {**super().__getstate__(), **self._results_so_far(), "_is_loaded": self._is_loaded, "_run_identity": RunIdentity()}

    def _results(self) -> dict[str, Any]:
        return {**self._results_so_far(), "_is_loaded": False, "state_key": self.state_key}

    def _results_so_far(self) -> dict[str, Any]:
        saved = self._saved if self._engine is None else self.state_dict()
        return {"_saved": saved, "_last_skipped_steps": self.skipped_steps, "_last_report": self.last_report}
