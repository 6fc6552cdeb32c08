"""A callback that sets weights and random numbers, watches, and ends the fit where the bad optimizer would have stepped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.bundles.random_states import restore
from clip_callbacks.core.tensor_table import without_wrappers
from clip_callbacks.replay.errors import UnusableReplayError
from clip_callbacks.replay.module_recorder import Watch
from clip_callbacks.replay.ranges import Range
from clip_callbacks.replay.recorded_step import Recorded
from clip_callbacks.replay.result import MicroBatch, Outcome
from clip_callbacks.replay.starting_weights import StartingWeights, check_fit
from clip_callbacks.replay.stored_batches import set_tracker

AGAIN = "optimizers that stepped in the window before the bad step do so again, by hand: losses need not be the run's"


class EnoughError(BaseException):
    """Ends the fit before anything is stepped; no error, and not to be caught by modules."""


class Conductor(Callback):
    """Sets weights and random numbers, watches, and stops the fit where the bad optimizer would step.

    Args:
        module: Which is run.
        rows: The micro-batches.
        recorded: What the bundle says.
        weights: To begin with.
    """

    def __init__(
        self, module: LightningModule, rows: Sequence[dict[str, Any]], recorded: Recorded, weights: StartingWeights
    ) -> None:
        self._module, self._rows, self._recorded, self._weights = module, rows, recorded, weights
        self._watch: Watch | None = None
        self._before: list[Tensor | None] = []
        self.outcome = Outcome()

    def set_progress(self, trainer: Trainer) -> None:
        """Let the module see the step and the epoch of the bad step."""
        loop, recorded = trainer.fit_loop, self._recorded
        for tracker in (loop.epoch_progress.current, loop.epoch_progress.total):
            set_tracker(tracker, recorded.epoch)
        progress = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        progress.ready = progress.completed = recorded.step
        loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = recorded.step

    def close(self) -> None:
        """Take the hooks off, should an error have left them on."""
        if self._watch:
            self._watch.stop()
            self._watch = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No number of a batch is the last one's; give the module its weights, now that all its layers are there."""
        trainer.fit_loop.max_batches = math.inf
        count = len(trainer.optimizers)
        if not 0 <= self._recorded.optimizer < count:
            raise UnusableReplayError(f"The bad step is of optimizer {self._recorded.optimizer}, but the module has {count}.")
        if self._recorded.state:
            check_fit({name: shape for name, (_, shape) in self._recorded.state.items()}, pl_module, "bundle's weights")
        self._weights.load(pl_module)
        if not pl_module.automatic_optimization:
            self._load_optimizers(trainer)

    def _load_optimizers(self, trainer: Trainer) -> None:
        """Some of them may step before the bad one does."""
        try:
            for optimizer, state in zip(trainer.optimizers, self._weights.optimizers, strict=False):
                optimizer.load_state_dict(dict(state))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            self.outcome.notes.append(f"the optimizers' states do not fit: {type(error).__name__}: {error}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the random numbers where they were taken: here, before the module's own hook."""
        row = self._rows[len(self.outcome.micro_batches)]
        self.outcome.micro_batches.append(MicroBatch(batch_idx, row.get("loss")))
        self._before = [_held(parameter.grad) for parameter in self._parameters(trainer)]
        self._watch = Watch(pl_module)
        self._watch.start()
        try:
            notes = restore(row["rng"], pl_module)
        except Exception as error:  # a stranger's may be anything
            raise UnusableReplayError(f"The random numbers' states cannot be set: {type(error).__name__}: {error}") from None
        self.outcome.notes += [note for note in notes if note not in self.outcome.notes]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """See the loss."""
        assert self._watch
        micro = self.outcome.micro_batches[-1]
        micro.loss, micro.operations = loss.detach().cpu().clone(), self._watch.operations(loss)
        self._watch.is_backward = True

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The modules that run from now on do so for the first time."""
        assert self._watch
        self._watch.is_backward = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Stop if this is the step.

        In manual optimization one batch may see several steps of the optimizer, and the bad one need not be the first: finite
        ones are taken.
        """
        if trainer.optimizers.index(_bare(optimizer)) == self._recorded.optimizer:
            self._weigh(trainer)
            if self._is_over and (pl_module.automatic_optimization or self._has_failed):
                self._end()
        if AGAIN not in self.outcome.notes:
            self.outcome.notes.append(AGAIN)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop if there was no step: the window goes on, or its micro-batch was left out."""
        if not self.outcome.micro_batches[-1].gradients:
            self._weigh(trainer)
        if self._is_over:
            self._end()
        self._unwatch()

    @property
    def _is_over(self) -> bool:
        return len(self.outcome.micro_batches) == len(self._rows)

    @property
    def _has_failed(self) -> bool:
        limit = self._recorded.limit
        return self.outcome.is_nonfinite or (limit is not None and self.outcome.total_norm > limit)

    def _parameters(self, trainer: Trainer) -> list[Tensor]:
        groups = trainer.optimizers[self._recorded.optimizer].param_groups
        return [parameter for group in groups for parameter in group["params"]]

    def _weigh(self, trainer: Trainer) -> None:
        """Look at the gradients as they are now."""
        micro, scale = self.outcome.micro_batches[-1], _scale_left(trainer, trainer.optimizers[self._recorded.optimizer])
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        total, added = 0.0, 0.0
        for parameter, before in zip(self._parameters(trainer), self._before, strict=True):
            if (now := _held(parameter.grad)) is None:
                continue
            total += float((now / scale).square().sum())
            added += float(((now if before is None else now - before) / scale).square().sum())
            if span := Range.of(parameter.grad):
                micro.gradients[without_wrappers(names.get(id(parameter), "a parameter of no module"))] = span
        micro.norm, self.outcome.total_norm = math.sqrt(added), math.sqrt(total)

    def _unwatch(self) -> None:
        if self._watch:
            watch, self._watch = self._watch, None
            watch.stop()
            micro = self.outcome.micro_batches[-1]
            micro.calls, micro.notes = watch.calls, watch.notes

    def _end(self) -> None:
        self._unwatch()
        raise EnoughError


def _held(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.detach().cpu().to_dense().double()


def _bare(optimizer: Any) -> Optimizer:
    bare: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return bare


def _scale_left(trainer: Trainer, optimizer: Optimizer) -> float:
    """The loss scale that is still in the gradients."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or scaler._per_optimizer_states[id(optimizer)]["stage"].name != "READY":
        return 1.0
    return float(scaler.get_scale())
