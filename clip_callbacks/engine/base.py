"""What the gradient callbacks of one Trainer have in common: they share one engine, which the first of them drives."""

# mypy: disable-error-code="override"
# hooks are given one Lightning's Trainer or the other's, which a type checker takes for strangers

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.core.step_report import StepReport
from clip_callbacks.engine.components import Parts, assemble
from clip_callbacks.engine.engine import StepEngine
from clip_callbacks.engine.search import LearningRateSearch
from clip_callbacks.trainer.checks import CallbackFacts, Kind, check_trainer
from clip_callbacks.trainer.compat import OtherCallback


class GradientCallback(Callback, OtherCallback, ABC):  # type: ignore[misc]
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
        self._saved: dict[str, Any] = {}
        self._is_loaded = False
        self._last_report: StepReport | None = None
        self._last_skipped_steps = 0
        # until it is set up, the instance: a Trainer given two of a class then leaves it to us to say what is wrong
        self.state_key = f"{self._stable_key}@{id(self)}"

    @property
    def last_report(self) -> StepReport | None:
        """What the last optimizer step's pass found and did; None before the first."""
        return self._engine.last_report if self._engine else self._last_report

    @property
    def skipped_steps(self) -> int:
        """How many optimizer steps of this run were skipped for non-finite gradients so far, over all optimizers."""
        return self._engine.skipped_steps if self._engine else self._last_skipped_steps

    # --- for subclasses

    @property
    def _stable_key(self) -> str:
        return type(self).__qualname__

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

    def _empty_state(self) -> dict[str, Any]:
        """The state before the first fit."""
        return {}

    # --- the engine

    @property
    def _engine(self) -> StepEngine | None:
        """The engine of the fit, if there is one."""
        return self._driver._own_engine if self._driver else None

    def _join(self, driver: GradientCallback, trainer: Trainer, module: LightningModule) -> Parts:
        """Bring this callback's parts to a fit."""
        self._driver = driver
        return self._make_parts(trainer, module, self._saved)

    def _forget_saved(self) -> None:
        """Leave the state to the parts: the engine has been made."""
        self._saved, self._is_loaded = {}, False

    def _leave(self) -> None:
        """Keep the state of a fit that is over, and let go of its parts."""
        self._last_report, self._last_skipped_steps = self.last_report, self.skipped_steps
        self._save()
        self._driver = self._part = None

    def _save(self) -> None:
        """Keep the state as it is now, unless a checkpoint has brought another one."""
        if not self._is_loaded:
            self._saved = self.state_dict()

    def _restart(self) -> None:
        """Begin a new run, unless a checkpoint has brought a state: what an earlier fit left does not count."""
        self._drop_engine()  # of a fit that nobody has ended
        self._driver = None
        self._last_report, self._last_skipped_steps = None, 0
        if not self._is_loaded:
            self._saved = {}

    def _assemble(self, trainer: Trainer, module: LightningModule) -> None:
        """Make the engine of a fit, for all callbacks; the first of them drives it."""
        self._driven = tuple(gradient_callbacks(trainer))
        components = assemble(trainer, module, [callback._join(self, trainer, module) for callback in self._driven])
        self._own_engine = StepEngine(trainer, module, components, [callback._facts() for callback in self._driven])
        for callback in self._driven:
            callback._forget_saved()

    def _take_up_loaded(self, trainer: Trainer, module: LightningModule) -> bool:
        """Make the engine anew if a checkpoint has brought states in the middle of a fit; whether one has."""
        for callback in self._driven:
            if callback._is_loaded:
                break
        else:
            return False
        for callback in self._driven:
            callback._save()
        if self._own_engine:
            self._own_engine.detach()
        self._assemble(trainer, module)
        return True

    def _for_search(self) -> GradientCallback | None:
        """A copy for a search for the learning rate; None if it has no use there."""
        return copy(self)

    def _interrupt(self) -> None:
        """Take the hooks of a fit off: its state comes back with a checkpoint."""
        if self._own_engine:
            self._own_engine.detach()

    def _drop_search(self) -> None:
        """Leave searches for the learning rate alone from now on."""
        search, self._search = self._search, None
        if search:
            search.detach()

    def _end(self) -> None:
        """End a fit, for all callbacks."""
        try:
            for callback in self._driven:
                callback._leave()
        finally:
            self._drop_engine()

    def _drop_engine(self) -> None:
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
        self.state_key = self._stable_key
        self._drop_search()  # of a fit that nobody has ended
        if stage == "fit":
            callbacks = gradient_callbacks(trainer)
            check_trainer(trainer, pl_module, [callback._facts() for callback in callbacks])
            if callbacks[0] is self:
                self._search = LearningRateSearch(trainer, pl_module, callbacks)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the engine; the first callback does it for all."""
        callbacks = gradient_callbacks(trainer)
        if callbacks[0] is self:
            for callback in callbacks:
                callback._restart()
            self._assemble(trainer, pl_module)
            if self._own_engine:
                self._own_engine.lay_out_charts()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take hold of where metrics go; where the strategy loads checkpoints late, take up what they brought."""
        self._take_up_loaded(trainer, pl_module)
        if self._own_engine:
            self._own_engine.start_fit(self._later_callbacks(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep what a skipped step would have to put back."""
        if self._take_up_loaded(trainer, pl_module) and self._own_engine:  # Lightning's searches restore in the middle of a fit
            self._own_engine.start_fit(self._later_callbacks(trainer))
        if self._own_engine:
            self._own_engine.begin_batch(batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss until the step, and weight it."""
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
        self._drop_search()
        if self._own_engine:
            self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Learn what is pending, before a checkpoint is made of it; leave no hook on an optimizer."""
        self._drop_search()
        if self._own_engine:
            self._own_engine.collect_at_last()
            self._end()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped."""
        engine = self._engine
        if engine is None or self._is_loaded:
            return self._saved or {"history": {}, **self._empty_state()}
        engine.collect_pending()
        history = engine.history_state() if self._driver is self else {}
        return {"history": history, **self._parts_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is not one of this callback.
        """
        missing = sorted({"history", *self._empty_state()} - state_dict.keys())
        if missing:
            got = f"got keys {sorted(state_dict)} without {missing}"
            raise ValueError(f"the checkpoint's state must be one of {type(self).__name__}, {got}.")
        self._saved = dict(state_dict)
        self._is_loaded = True

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy with the state, but without the engine and its parts: they belong to one Trainer's fit."""
        state = {**self.__dict__, "_driver": None, "_driven": (), "_own_engine": None, "_part": None, "_last_report": None}
        state["_search"] = None
        if self._engine:
            state |= {"_saved": self.state_dict(), "_last_skipped_steps": self.skipped_steps}
        for name in ("log", "log_dict"):  # the module's: Lightning hangs them on every callback
            state.pop(name, None)
        return state


def gradient_callbacks(trainer: Trainer) -> list[GradientCallback]:
    """The gradient callbacks of a Trainer, in its order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, GradientCallback)]  # type: ignore[attr-defined]
