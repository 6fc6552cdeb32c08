"""The base class of gradient callbacks. The callbacks of one Trainer share an engine, which the first of them drives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.engine.callback_state import StatefulCallback
from clip_callbacks.engine.components import Parts, assemble
from clip_callbacks.engine.engine import StepEngine
from clip_callbacks.engine.learning_rate_search import LearningRateSearch
from clip_callbacks.engine.resume import Resumption, State, is_gradient_callback_state, warn_about
from clip_callbacks.trainer.checks import CallbackFacts, Kind, check_trainer
from clip_callbacks.trainer.idle_hooks import BATCH_HOOKS, hide_hooks, show_hooks, without_hidden
from clip_callbacks.trainer.optimizer_context import parameter_names

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

IS_LOADED = attrgetter("_is_loaded")
"""Function that returns whether a callback was given a state to load. All are asked in each batch, without a frame for each."""


class GradientCallback(StatefulCallback):
    """A gradient callback, for Trainers of ``lightning.pytorch`` and of ``pytorch_lightning``.

    It holds options and, between fits, the state of the last fit. For each fit it makes parts, which the engine of the fit owns.
    The first gradient callback of the Trainer is the driver: only its hooks call the engine, so that each step is processed once.
    During the fit the others have no hooks of batches, unless their class overrides them.
    """

    _kind: ClassVar[Kind]
    state_key: str = ""
    """Key of the state in checkpoints. An attribute, not a property: Lightning reads it for every hook of every callback."""

    def __init__(self) -> None:
        super().__init__()
        self._driver: GradientCallback | None = None
        self._driven: tuple[GradientCallback, ...] = ()
        self._own_engine: StepEngine | None = None
        self._search: LearningRateSearch | None = None
        self._part: Any = None
        self._unclaimed_states: tuple[State, ...] = ()
        self._batch: tuple[Trainer, LightningModule, Any, int] | None = None
        # unique until setup: Trainer.__init__ refuses two callbacks with the same key, and check_trainer explains it better
        self._set_state_key(f"{self._stable_key}@{id(self)}")

    # --- for subclasses

    @property
    def _stable_key(self) -> str:
        return type(self).__qualname__

    def _set_state_key(self, key: str) -> None:
        """Set ``state_key``. A subclass may define a property, as Lightning's documentation shows, which takes precedence."""
        vars(self)["state_key"] = key

    def _facts(self) -> CallbackFacts:
        """Return the facts about this callback that the checks need."""
        return CallbackFacts(self._kind, self._stable_key)

    @abstractmethod
    def _make_parts(self, trainer: Trainer, module: LightningModule, saved: dict[str, Any]) -> Parts:
        """Make the parts for one fit, the main part of them as ``self._part``.

        Args:
            trainer: The Trainer.
            module: The module to train.
            saved: State from :meth:`state_dict`; empty at the beginning of a run.
        """

    def _parts_state(self) -> dict[str, Any]:
        """Return the state of this fit's parts."""
        state: dict[str, Any] = self._part.state_dict()
        return state

    # --- the engine

    @property
    def _engine(self) -> StepEngine | None:
        """The engine of the fit; None between fits."""
        return self._driver._own_engine if self._driver else None

    def _is_in_fit_of_another(self, trainer: Trainer) -> bool:
        """Return whether the callback takes part in a fit of another Trainer, in whose hooks this one runs."""
        engine = self._engine
        return engine is not None and engine.is_in_fit_of_another(trainer)

    def _bring_parts(self, driver: GradientCallback, trainer: Trainer, module: LightningModule, saved: dict[str, Any]) -> Parts:
        """Make this callback's parts for a fit that another callback may drive."""
        self._driver = driver
        return self._make_parts(trainer, module, saved)

    def _hide_hooks(self, engine: StepEngine) -> None:
        """Hide the hooks of batches that have nothing to do in the fit."""
        idle = set(BATCH_HOOKS)
        if self._driver is self:
            idle = {"on_before_zero_grad"}
            if not engine.ends_passes:
                idle.add("on_after_backward")
        hide_hooks(self, idle, GradientCallback)

    def _release_parts(self) -> None:
        """Save the state of a fit that is over, and release its parts."""
        self._save_results()
        self._driver = self._part = None

    def _reset(self, trainer: Trainer, module: LightningModule) -> None:
        """Reset this callback before a fit."""
        self._discard_engine()  # a fit may have raised without teardown
        show_hooks(self)
        self._driver = None
        self._unclaimed_states = ()
        self._begin_run(trainer, module)

    def _make_engine(self, trainer: Trainer, module: LightningModule) -> StepEngine:
        """Make the engine of a fit for all gradient callbacks, with this one as the driver."""
        self._driven = tuple(gradient_callbacks(trainer))
        facts = [callback._facts() for callback in self._driven]
        resumption = self._resume(trainer, module, facts)
        parts = []
        for callback in self._driven:
            saved = resumption.adapted(callback._saved) if resumption else {}
            parts.append(callback._bring_parts(self, trainer, module, saved))
        components = assemble(trainer, module, parts)
        engine = self._own_engine = StepEngine(trainer, module, components, facts)
        # only now: if the engine refuses an option, the loaded states are still there
        for callback in self._driven:
            callback._clear_saved()
            callback._hide_hooks(engine)
        self._unclaimed_states = ()
        if resumption:
            # attaching limits to their blocks has found further states that do not fit
            for part in (components.clipper, components.guard):
                resumption.mismatch.add(part.mismatch())
            warn_about(resumption.mismatch)
        return engine

    def _resume(self, trainer: Trainer, module: LightningModule, facts: Sequence[CallbackFacts]) -> Resumption | None:
        """Prepare the adaptation of saved states to the present optimizers; return None if there are no saved states."""
        known = [callback._saved for callback in self._driven if callback._saved] + list(self._unclaimed_states)
        if not known:
            return None
        reset = [name for callback in self._driven for name in callback._carry_over(known)]
        if not any(callback._saved.get("history") for callback in self._driven):
            # histories are in the state of the driver, and that of the checkpoint may no longer be in the Trainer
            histories = [state["history"] for state in self._unclaimed_states if state["history"]]
            history = histories[0] if histories else {}
            self._saved = {**self._empty_state(), **self._saved, "history": history}
        names = parameter_names(trainer, module)
        norm_type = next((fact.norm_type for fact in facts if fact.norm_type is not None), 2.0)
        resumption = Resumption(known, names, norm_type)
        if resumption.is_known:
            resumption.mismatch.missing += reset
        return resumption

    def _apply_loaded_states(self, trainer: Trainer, module: LightningModule, *, is_new: bool = False) -> bool:
        """Make a new engine if a checkpoint was loaded in mid-fit.

        Args:
            trainer: The Trainer.
            module: The module in training.
            is_new: If True, callbacks without a loaded state start from an empty one; if False, they keep their present state.

        Returns:
            True if a checkpoint was loaded.
        """
        if not any(map(IS_LOADED, self._driven)):
            return False
        for callback in self._driven:
            if is_new and not callback._is_loaded:
                callback._saved = {}
            else:
                callback._save()
        self._detach_engine()
        self._make_engine(trainer, module)
        return True

    def _start_fit(self, trainer: Trainer) -> None:
        """Start the fit in the engine, if this callback is the driver."""
        if self._own_engine:
            self._own_engine.start_fit(self._later_callbacks(trainer))

    def _apply_loaded_states_in_batch(self) -> None:
        """Apply a state that is loaded after the hooks of a batch's start, and begin the batch again.

        A later callback or the module may restore a checkpoint in its ``on_train_batch_start``.
        """
        if self._batch is None:
            return
        trainer, module, batch, batch_idx = self._batch
        if self._apply_loaded_states(trainer, module):
            self._start_fit(trainer)
            assert self._own_engine is not None
            self._own_engine.begin_batch(batch, batch_idx)

    def _copy_for_search(self) -> GradientCallback | None:
        """Return a copy for a search for the learning rate; None if the callback is not needed there."""
        return copy(self)

    def _detach_engine(self) -> None:
        """Remove the hooks of the fit. The engine stays until a checkpoint restores its state."""
        if self._own_engine:
            self._own_engine.detach()

    def _detach_search(self) -> None:
        """Stop taking part in searches for the learning rate."""
        search, self._search = self._search, None
        if search:
            search.detach()

    def _end_fit(self) -> None:
        """End the fit for all gradient callbacks."""
        try:
            for callback in self._driven:
                callback._release_parts()
        finally:
            self._discard_engine()

    def _discard_engine(self) -> None:
        """Detach and drop the engine, if this callback drives one."""
        engine, driven = self._own_engine, self._driven
        self._own_engine, self._driven, self._batch = None, (), None  # first, in case that detaching raises
        for callback in driven:
            show_hooks(callback)
        if engine:
            engine.detach()

    def _later_callbacks(self, trainer: Trainer) -> list[Callback]:
        """Return the callbacks of other packages that come after this one."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks[callbacks.index(self) :] if not isinstance(callback, GradientCallback)]

    # --- Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the Trainer, and reset the callback for a fit.

        Raises:
            ValueError: If the Trainer is refused, or the callback is in the middle of a fit of another one.
        """
        if self._is_in_fit_of_another(trainer):
            if stage == "fit":
                raise ValueError(
                    f"`callbacks` must hold a {type(self).__name__} of this Trainer's own, got one that takes part in a fit of "
                    "another Trainer, which would go on without it. Give this Trainer copy.deepcopy(callback)."
                )
            return
        self._set_state_key(self._stable_key)
        self._detach_search()  # a fit may have raised without teardown
        if stage == "fit":
            callbacks = gradient_callbacks(trainer)
            check_trainer(trainer, pl_module, [callback._facts() for callback in callbacks])
            self._reset(trainer, pl_module)
            self._return_results_of(trainer)
            if callbacks[0] is self:
                self._search = LearningRateSearch(trainer, pl_module, callbacks)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the engine: the first gradient callback makes it for all."""
        if gradient_callbacks(trainer)[0] is self:
            # optimizers exist now, and the module's own on_train_start has not run yet
            self._make_engine(trainer, pl_module).lay_out_charts()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the fit; apply the checkpoint if the strategy has loaded it after ``on_fit_start``."""
        # FSDP, ModelParallel and DeepSpeed load a checkpoint only once the parameters are sharded
        self._apply_loaded_states(trainer, pl_module, is_new=trainer.strategy.restore_checkpoint_after_setup)
        self._start_fit(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save the state that a skipped step restores."""
        # LearningRateFinder and BatchSizeFinder restore their checkpoint in mid-fit
        if self._apply_loaded_states(trainer, pl_module):
            self._start_fit(trainer)
        if self._own_engine:
            self._batch = (trainer, pl_module, batch, batch_idx)
            self._own_engine.begin_batch(batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Weight the loss, and keep it until the step."""
        self._batch = None
        if self._own_engine:
            self._own_engine.before_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop a bad micro-batch if the guard has ``level="microbatch"``."""
        if self._own_engine:
            self._own_engine.after_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Process the gradients: they are complete, and the optimizer has not stepped yet."""
        if self._own_engine:
            self._own_engine.before_step(optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Publish the metrics of the batch's optimizer steps."""
        self._batch = None
        if self._own_engine:
            self._own_engine.end_batch(outputs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the metrics of the epoch."""
        if self._own_engine:
            self._own_engine.end_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the summary of the run."""
        if self._own_engine:
            self._own_engine.end_fit()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the optimizers and their parameters; keep the state for checkpoints."""
        if self._is_in_fit_of_another(trainer):
            return
        self._detach_search()
        if self._own_engine:
            self._end_fit()
        if stage == "fit":  # a search before a fit has restored a state that no fit has used
            self._is_loaded = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Collect pending reports for a checkpoint of the exception, and remove all hooks."""
        if self._is_in_fit_of_another(trainer):
            return
        self._detach_search()
        if self._own_engine:
            # OnExceptionCheckpoint saves in its own on_exception, and Lightning calls no teardown after an exception
            self._own_engine.collect_after_error()
            self._end_fit()

    def _state_of(self, engine: StepEngine) -> dict[str, Any]:
        """Return the state of the parts; the driver's state also holds the histories of the optimizers."""
        history = engine.history_state() if self._driver is self else {}
        return {"history": history, **self._parts_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from :meth:`state_dict`; in mid-batch it takes effect at once.

        Raises:
            ValueError: If the state is damaged.
        """
        super().load_state_dict(state_dict)
        if self._driver:
            self._driver._apply_loaded_states_in_batch()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record the states of gradient callbacks that are no longer in the Trainer."""
        if self._engine is None and not self._is_loaded:
            # the state of another run; Lightning calls load_state_dict next if the checkpoint has one of this callback
            self._saved = {}
        if gradient_callbacks(trainer)[0] is self:
            keys = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
            unclaimed = [state for key, state in checkpoint.get("callbacks", {}).items() if key not in keys]
            self._unclaimed_states = tuple(filter(is_gradient_callback_state, unclaimed))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the engine and its parts, which belong to one fit."""
        own = {"_driver": None, "_driven": (), "_own_engine": None, "_part": None, "_search": None, "_batch": None}
        return without_hidden(super().__getstate__()) | own


def gradient_callbacks(trainer: Trainer) -> list[GradientCallback]:
    """Return the gradient callbacks of a Trainer, in its order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, GradientCallback)]  # type: ignore[attr-defined]
