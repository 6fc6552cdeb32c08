"""What the gradient callbacks of one Trainer have in common: they share one engine, which the first of them drives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.engine.callback_state import StatefulCallback
from clip_callbacks.engine.components import Parts, assemble
from clip_callbacks.engine.engine import StepEngine
from clip_callbacks.engine.learning_rate_search import LearningRateSearch
from clip_callbacks.engine.resume import Resumption, State, is_gradient_callback_state, warn_of
from clip_callbacks.trainer.checks import CallbackFacts, Kind, check_trainer

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer


class GradientCallback(StatefulCallback):
    """A callback of this package, for Trainers of ``lightning.pytorch`` and of ``pytorch_lightning``.

    It holds options and, between fits, the state of the last one. For each fit it makes parts, which the engine of the fit owns.
    """

    _kind: ClassVar[Kind]
    state_key: str = ""
    """An attribute and no property: Lightning asks for it in every hook of every callback."""

    def __init__(self) -> None:
        super().__init__()
        self._driver: GradientCallback | None = None
        self._driven: tuple[GradientCallback, ...] = ()
        self._own_engine: StepEngine | None = None
        self._search: LearningRateSearch | None = None
        self._part: Any = None
        self._unclaimed_states: tuple[State, ...] = ()
        self._batch: tuple[Trainer, LightningModule, Any, int] | None = None
        # until it is set up, the instance: a Trainer given two of a class then leaves it to us to say what is wrong
        self._set_state_key(f"{self._stable_key}@{id(self)}")

    # --- for subclasses

    @property
    def _stable_key(self) -> str:
        return type(self).__qualname__

    def _set_state_key(self, key: str) -> None:
        """Set ``state_key``, unless a subclass has a property of its own, as Lightning's documentation shows."""
        vars(self)["state_key"] = key

    def _facts(self) -> CallbackFacts:
        """What the checks need to know of this callback."""
        return CallbackFacts(self._kind, self._stable_key)

    @abstractmethod
    def _make_parts(self, trainer: Trainer, module: LightningModule, saved: dict[str, Any]) -> Parts:
        """Make what takes part in one fit, the main part of it as ``self._part``.

        Args:
            trainer: The Trainer.
            module: The module to train.
            saved: What :meth:`state_dict` returned, in a checkpoint; empty at the beginning of a run.
        """

    def _parts_state(self) -> dict[str, Any]:
        """The state of the parts of this fit."""
        state: dict[str, Any] = self._part.state_dict()
        return state

    # --- the engine

    @property
    def _engine(self) -> StepEngine | None:
        """The engine of the fit, if there is one."""
        return self._driver._own_engine if self._driver else None

    def _bring_parts(self, driver: GradientCallback, trainer: Trainer, module: LightningModule, saved: dict[str, Any]) -> Parts:
        """Bring this callback's parts to a fit."""
        self._driver = driver
        return self._make_parts(trainer, module, saved)

    def _release_parts(self) -> None:
        """Keep the state of a fit that is over, and let go of its parts."""
        self._save_results()
        self._driver = self._part = self._batch = None

    def _reset(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin a new run, unless a checkpoint has brought a state, or the Trainer goes on with the last one."""
        self._discard_engine()  # of a fit that nobody has ended
        self._driver = self._batch = None
        self._unclaimed_states = ()
        self._begin_run(trainer, module)

    def _make_engine(self, trainer: Trainer, module: LightningModule) -> None:
        """Make the engine of a fit, for all callbacks; the first of them drives it."""
        self._driven = tuple(gradient_callbacks(trainer))
        facts = [callback._facts() for callback in self._driven]
        resumption = self._resume(trainer, module, facts)
        saved = [resumption.fitted(callback._saved) if resumption else {} for callback in self._driven]
        pairs = zip(self._driven, saved, strict=True)
        components = assemble(trainer, module, [callback._bring_parts(self, trainer, module, state) for callback, state in pairs])
        self._own_engine = StepEngine(trainer, module, components, facts)
        for callback in self._driven:
            callback._clear_saved()
        self._unclaimed_states = ()
        if resumption:
            for part in (components.clipper, components.guard):
                resumption.misfits.add(part.misfits())
            warn_of(resumption.misfits)

    def _resume(self, trainer: Trainer, module: LightningModule, facts: Sequence[CallbackFacts]) -> Resumption | None:
        """Find what makes saved states fit the optimizers of now, if there are any; callbacks take up what others know."""
        known = [callback._saved for callback in self._driven if callback._saved] + list(self._unclaimed_states)
        if not known:
            return None
        anew = [what for callback in self._driven for what in callback._carry_over(known)]
        if not any(callback._saved.get("history") for callback in self._driven):
            histories = [state["history"] for state in self._unclaimed_states if state["history"]]
            self._saved = {**self._empty_state(), **self._saved, "history": histories[0] if histories else {}}
        names = {
            index: TensorTable.of_optimizer(optimizer, module.named_parameters(), reduce=lambda _: None).names
            for index, optimizer in enumerate(trainer.optimizers)
        }
        norm_type = next((fact.norm_type for fact in facts if fact.norm_type is not None), 2.0)
        resumption = Resumption(known, names, norm_type)
        if resumption.is_known:
            resumption.misfits.anew += anew
        return resumption

    def _apply_loaded_states(self, trainer: Trainer, module: LightningModule, *, is_new: bool = False) -> bool:
        """Make the engine anew if a checkpoint has brought states in the middle of a fit; whether one has.

        Args:
            trainer: The Trainer.
            module: The module in training.
            is_new: Whether what no state has come for begins anew, since all that is there is from before the checkpoint.
        """
        for callback in self._driven:
            if callback._is_loaded:
                break
        else:
            return False
        for callback in self._driven:
            if is_new and not callback._is_loaded:
                callback._saved = {}
            else:
                callback._save()
        if self._own_engine:
            self._own_engine.detach()
        self._make_engine(trainer, module)
        return True

    def _start_fit(self, trainer: Trainer) -> None:
        """Have the engine take hold of where metrics go."""
        if self._own_engine:
            self._own_engine.start_fit(self._later_callbacks(trainer))

    def _begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Keep what a skipped step would have to put back."""
        if self._own_engine:
            self._own_engine.begin_batch(batch, batch_idx)

    def _apply_loaded_states_in_batch(self) -> None:
        """Take up a state that comes when a batch has begun, and begin it again: its step counts from there."""
        if self._batch is None:
            return
        trainer, module, batch, batch_idx = self._batch
        if not self._apply_loaded_states(trainer, module):
            return
        self._start_fit(trainer)
        for callback in self._driven:
            if callback._batch is not None:
                callback._begin_batch(batch, batch_idx)

    def _copy_for_search(self) -> GradientCallback | None:
        """A copy for a search for the learning rate; None if it has no use there."""
        return copy(self)

    def _detach_engine(self) -> None:
        """Take the hooks of a fit off: its state comes back with a checkpoint."""
        if self._own_engine:
            self._own_engine.detach()

    def _detach_search(self) -> None:
        """Leave searches for the learning rate alone from now on."""
        search, self._search = self._search, None
        if search:
            search.detach()

    def _end_fit(self) -> None:
        """End a fit, for all callbacks."""
        try:
            for callback in self._driven:
                callback._release_parts()
        finally:
            self._discard_engine()

    def _discard_engine(self) -> None:
        """Let go of the engine, if this callback drives one."""
        engine, self._own_engine, self._driven = self._own_engine, None, ()
        if engine:
            engine.detach()

    def _later_callbacks(self, trainer: Trainer) -> list[Callback]:
        """The callbacks of others that come after this one."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks[callbacks.index(self) :] if not isinstance(callback, GradientCallback)]

    # --- Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be done right before anything is trained."""
        self._set_state_key(self._stable_key)
        self._detach_search()  # of a fit that nobody has ended
        if stage == "fit":
            callbacks = gradient_callbacks(trainer)
            check_trainer(trainer, pl_module, [callback._facts() for callback in callbacks])
            self._reset(trainer, pl_module)
            self._return_results_of(trainer)
            if callbacks[0] is self:
                self._search = LearningRateSearch(trainer, pl_module, callbacks)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the engine; the first callback does it for all."""
        if gradient_callbacks(trainer)[0] is self:
            self._make_engine(trainer, pl_module)
            if self._own_engine:
                self._own_engine.lay_out_charts()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take hold of where metrics go; where the strategy loads checkpoints late, take up what they brought."""
        self._apply_loaded_states(trainer, pl_module, is_new=trainer.strategy.restore_checkpoint_after_setup)
        self._start_fit(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep what a skipped step would have to put back."""
        if self._apply_loaded_states(trainer, pl_module):  # Lightning's searches restore in the middle of a fit
            self._start_fit(trainer)
        self._batch = (trainer, pl_module, batch, batch_idx)
        self._begin_batch(batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss until the step, and weight it."""
        self._batch = None
        if self._own_engine:
            self._own_engine.before_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop a bad micro-batch, if the guard is told to."""
        if self._own_engine:
            self._own_engine.after_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Run the pass: the gradients are ready, the optimizer has not moved."""
        if self._own_engine:
            self._own_engine.before_step(optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Publish what the batch's optimizer steps reported."""
        self._batch = None
        if self._own_engine:
            self._own_engine.end_batch(outputs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the metrics of the epoch."""
        if self._own_engine:
            self._own_engine.end_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum up."""
        if self._own_engine:
            self._own_engine.end_fit()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers and their parameters; what a checkpoint needs stays."""
        self._detach_search()
        if self._own_engine:
            self._end_fit()
        if stage == "fit":  # Lightning's searches before a fit restore a state and leave it here
            self._is_loaded = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Learn what is pending, before a checkpoint is made of it; leave no hook on an optimizer."""
        self._detach_search()
        if self._own_engine:
            self._own_engine.collect_after_error()
            self._end_fit()

    def _state_of(self, engine: StepEngine) -> dict[str, Any]:
        """The state of the parts, and with the driver's the histories of the optimizers."""
        history = engine.history_state() if self._driver is self else {}
        return {"history": history, **self._parts_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned; in the middle of a batch, at once.

        Raises:
            ValueError: If the state is not one of this callback, or is damaged.
        """
        super().load_state_dict(state_dict)
        if self._driver:
            self._driver._apply_loaded_states_in_batch()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take note of the states of callbacks that are no longer there; another run's checkpoint ends the last one."""
        if self._engine is None and not self._is_loaded:
            self._saved = {}
        if gradient_callbacks(trainer)[0] is self:
            keys = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
            left = [state for key, state in checkpoint.get("callbacks", {}).items() if key not in keys]
            self._unclaimed_states = tuple(filter(is_gradient_callback_state, left))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the engine and its parts: they belong to one Trainer's fit."""
        own = {"_driver": None, "_driven": (), "_own_engine": None, "_part": None, "_search": None, "_batch": None}
        return super().__getstate__() | own


def gradient_callbacks(trainer: Trainer) -> list[GradientCallback]:
    """The gradient callbacks of a Trainer, in its order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, GradientCallback)]  # type: ignore[attr-defined]
