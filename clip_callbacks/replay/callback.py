"""The callback of a replay: it prepares the module and the loops, records the pass, and stops the fit at the bad step."""

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
from clip_callbacks.replay.module_recorder import ModuleRecorder
from clip_callbacks.replay.ranges import ValueRange
from clip_callbacks.replay.recorded_step import RecordedStep
from clip_callbacks.replay.result import MicroBatchResult, WindowResult
from clip_callbacks.replay.starting_weights import StartingWeights, check_names_and_shapes
from clip_callbacks.replay.stored_batches import set_tracker
from clip_callbacks.trainer.grad_scaler import grad_scaler

STEPPED_BEFORE = (
    "optimizers that step earlier in the window of the bad step also step in the replay: losses may differ from those of the run"
)


class ReplayFinishedError(BaseException):
    """Ends the fit before the optimizer steps. A BaseException, so that no ``except Exception`` of the user's catches it."""


class ReplayCallback(Callback):
    """Sets weights and random numbers, records the pass, and stops the fit where the optimizer would take the bad step.

    Args:
        module: The module that is run.
        rows: The micro-batches of the bundle.
        recorded: The bad step as its bundle describes it.
        weights: The weights to begin with.
    """

    def __init__(
        self, module: LightningModule, rows: Sequence[dict[str, Any]], recorded: RecordedStep, weights: StartingWeights
    ) -> None:
        self._module, self._rows, self._recorded, self._weights = module, rows, recorded, weights
        self._recorder: ModuleRecorder | None = None
        self._gradients_before: list[Tensor | None] = []
        self._losses: list[float] = []
        self.result = WindowResult()

    def set_progress(self, trainer: Trainer) -> None:
        """Set the loops to the step and the epoch of the bad step, which the module may read."""
        loop, recorded = trainer.fit_loop, self._recorded
        for tracker in (loop.epoch_progress.current, loop.epoch_progress.total):
            set_tracker(tracker, recorded.epoch)
        progress = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        progress.ready = progress.completed = recorded.step
        loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = recorded.step

    def detach(self) -> None:
        """Remove the hooks from the module, and keep what they recorded."""
        if self._recorder:
            recorder, self._recorder = self._recorder, None
            recorder.detach()
            micro = self.result.micro_batches[-1]
            micro.calls, micro.notes = recorder.calls, recorder.notes

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the weights: by now configure_model has made all layers."""
        trainer.fit_loop.max_batches = math.inf  # the stored batches keep their numbers, which may exceed their count
        count = len(trainer.optimizers)
        if not 0 <= self._recorded.optimizer < count:
            raise UnusableReplayError(
                f"`optimizer` of the bundle must be the index of one of the module's {count}, got {self._recorded.optimizer}; "
                "give the configuration of the run to --config."
            )
        if self._recorded.state:
            shapes = {name: shape for name, (_, shape) in self._recorded.state.items()}
            check_names_and_shapes(shapes, pl_module, "bundle's weights")
        self._weights.load(pl_module)
        if not pl_module.automatic_optimization:
            self._load_optimizers(trainer)

    def _load_optimizers(self, trainer: Trainer) -> None:
        """Load the optimizers' states: in manual optimization some optimizers may step before the bad step."""
        try:
            for optimizer, state in zip(trainer.optimizers, self._weights.optimizers, strict=False):
                optimizer.load_state_dict(dict(state))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            self.result.notes.append(f"the states of the optimizers do not fit: {type(error).__name__}: {error}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the random numbers, which were stored at this point of the run, before the module's own hook."""
        row = self._rows[len(self.result.micro_batches)]
        self.result.micro_batches.append(MicroBatchResult(batch_idx, row.get("loss")))
        self._gradients_before = [_on_host(parameter.grad) for parameter in self._parameters(trainer)]
        self._recorder = ModuleRecorder(pl_module)
        self._recorder.attach()
        try:
            notes = restore(row["rng"], pl_module)
        except Exception as error:  # states in an untrusted bundle may be anything
            raise UnusableReplayError(
                f"`rng` in the bundle must hold the states of random number generators, got {type(error).__name__}: {error}"
            ) from None
        self.result.notes += [note for note in notes if note not in self.result.notes]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Record the loss."""
        assert self._recorder
        micro = self.result.micro_batches[-1]
        micro.loss, micro.operations = loss.detach().cpu().clone(), self._recorder.operations(loss)
        self._losses.append(float(micro.loss.sum()))
        self._recorder.is_backward = True

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the recorder that the next calls of modules belong to a forward pass again."""
        assert self._recorder
        self._recorder.is_backward = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Stop if this is the bad step.

        In manual optimization an optimizer may step several times on one batch; steps before the bad one are taken.
        """
        if trainer.optimizers.index(_unwrapped(optimizer)) == self._recorded.optimizer:
            self._record_gradients(trainer)
            if self._is_last_batch and (pl_module.automatic_optimization or self.result.fails(self._recorded.exceeded)):
                self._finish()
        self._losses.clear()
        if STEPPED_BEFORE not in self.result.notes:
            self.result.notes.append(STEPPED_BEFORE)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record a micro-batch without a step, because the window is not over or the run dropped the micro-batch."""
        if not self.result.micro_batches[-1].gradients:
            self._record_gradients(trainer)
        if self._is_last_batch:
            self._finish()
        self.detach()

    @property
    def _is_last_batch(self) -> bool:
        return len(self.result.micro_batches) == len(self._rows)

    def _parameters(self, trainer: Trainer) -> list[Tensor]:
        groups = trainer.optimizers[self._recorded.optimizer].param_groups
        return [parameter for group in groups for parameter in group["params"]]

    def _record_gradients(self, trainer: Trainer) -> None:
        """Record the ranges and the norm of the gradients, and the norm of what this micro-batch added to them."""
        micro, scale = self.result.micro_batches[-1], _loss_scale(trainer, trainer.optimizers[self._recorded.optimizer])
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        total, added = 0.0, 0.0
        for parameter, before in zip(self._parameters(trainer), self._gradients_before, strict=True):
            if (gradient := _on_host(parameter.grad)) is None:
                continue
            total += float((gradient / scale).square().sum())
            if before is not None:
                gradient = gradient - before
            added += float((gradient / scale).square().sum())
            if values := ValueRange.of(parameter.grad):
                micro.gradients[without_wrappers(names.get(id(parameter), "a parameter of no module"))] = values
        micro.norm, self.result.total_norm = math.sqrt(added), math.sqrt(total)
        self.result.loss = self._loss_of_window(trainer)

    def _loss_of_window(self, trainer: Trainer) -> float:
        total = math.fsum(self._losses)
        if self._module.automatic_optimization:  # Lightning has divided each loss by the number of micro-batches
            total *= trainer.accumulate_grad_batches / max(1, len(self._losses))
        if scaler := grad_scaler(trainer):
            total /= scaler.get_scale()
        return total

    def _finish(self) -> None:
        self.detach()
        raise ReplayFinishedError


def _on_host(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.detach().cpu().to_dense().double()


def _unwrapped(optimizer: Any) -> Optimizer:
    unwrapped: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return unwrapped


def _loss_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """Return the factor by which the gradients are scaled now; 1 if GradScaler has unscaled them already."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or scaler._per_optimizer_states[id(optimizer)]["stage"].name != "READY":
        return 1.0
    return float(scaler.get_scale())
