"""The stored window through a real Trainer.fit, up to the moment at which the bad optimizer would have stepped."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.random_states import restore
from clip_callbacks.replay.anomaly import Anomaly
from clip_callbacks.replay.ranges import Range
from clip_callbacks.replay.rebuild import Rebuilt
from clip_callbacks.replay.recorded import Recorded
from clip_callbacks.replay.silence import silenced
from clip_callbacks.replay.snapshot import Snapshot
from clip_callbacks.replay.starting_weights import StartingWeights, check_fit, without_wrappers
from clip_callbacks.replay.unusable import UnusableReplayError
from clip_callbacks.replay.watch import Call, Watch

_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
"""What a Trainer makes of the numbers in a batch."""
AGAIN = "optimizers that stepped in the window before the bad step do so again, by hand: losses need not be the run's"


@dataclass
class MicroBatch:
    """What one micro-batch did.

    Args:
        batch_idx: Its number in the epoch.
        recorded: The loss of the run, as its backward got it; None if there was none.
        loss: The loss now.
        calls: Of modules.
        gradients: Of parameters, after it, by name: what the window has added up so far.
        norm: Of what it has added.
        operations: Of autograd, between the modules and the loss.
        notes: What is not seen, or not as it was.
    """

    batch_idx: int
    recorded: Tensor | None
    loss: Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    gradients: dict[str, Range] = field(default_factory=dict)
    norm: float = math.nan
    operations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def bad_gradients(self) -> dict[str, Range]:
        """Those that are not finite."""
        return {name: span for name, span in self.gradients.items() if not span.is_finite}

    @property
    def has_finite_loss(self) -> bool:
        """Whether it has; without a loss too."""
        return self.loss is None or bool(self.loss.isfinite().all())

    @property
    def is_bad(self) -> bool:
        """Whether its loss, or any gradient after it, is not finite."""
        return not self.has_finite_loss or bool(self.bad_gradients)

    @property
    def has_same_loss(self) -> bool | None:
        """Whether the loss is that of the run, bit for bit; None if nothing is known."""
        if self.loss is None or self.recorded is None:
            return None
        left, right = self.loss.reshape(()), self.recorded.reshape(())
        return left.dtype == right.dtype and bool(torch.equal(left, right) or (left.isnan() & right.isnan()))


@dataclass
class Outcome:
    """What a run of the window did.

    Args:
        micro_batches: Each, in order.
        total_norm: Of the gradients that the bad optimizer would have stepped with.
        notes: What is not as it was.
    """

    micro_batches: list[MicroBatch] = field(default_factory=list)
    total_norm: float = math.nan
    notes: list[str] = field(default_factory=list)

    @property
    def is_nonfinite(self) -> bool:
        """Whether any loss or gradient is."""
        return any(micro.is_bad for micro in self.micro_batches)

    @property
    def guilty(self) -> int:
        """The place of the first bad micro-batch, or, if all are finite, of the one that has added most."""
        places = range(len(self.micro_batches))
        bad = next((place for place in places if self.micro_batches[place].is_bad), None)
        return bad if bad is not None else max(places, key=lambda place: self.micro_batches[place].norm)


class Laboratory:
    """Everything that a run needs, so that many can be made from the same start.

    Args:
        rebuilt: The module; each run begins with it as it is now.
        recorded: What the bundle says.
        weights: To begin with.
        device: Its kind.
        precision: Of the Trainer.
    """

    def __init__(self, rebuilt: Rebuilt, recorded: Recorded, weights: StartingWeights, device: str, precision: str) -> None:
        self.rebuilt, self.recorded, self.weights = rebuilt, recorded, weights
        self.device, self.precision = device, precision
        self._start = Snapshot(rebuilt.module)
        self._generator = torch.get_rng_state()  # for what setup and configure_model draw

    def run(self, rows: Sequence[dict[str, Any]]) -> Outcome:
        """Run micro-batches.

        Args:
            rows: The micro-batches, as the bundle holds them.

        Raises:
            UnusableReplayError: If the weights do not fit, or the module raises an error of its own.
        """
        with silenced():
            outcome = self._fit(rows)
        if not outcome.micro_batches:
            raise UnusableReplayError(f"No stored batch was run: the Trainer stopped at step {self.recorded.step} before it began.")
        return outcome

    def anomaly(self, rows: Sequence[dict[str, Any]]) -> Anomaly | None:
        """Run micro-batches while autograd looks for NaN itself.

        Args:
            rows: The micro-batches.

        Returns:
            What it has found, if anything.
        """
        with silenced() as said:
            try:
                self._fit(rows, detect_anomaly=True)
            except UnusableReplayError as error:
                return Anomaly.of(error.__cause__, [str(warning.message) for warning in said])
        return None

    def _fit(self, rows: Sequence[dict[str, Any]], *, detect_anomaly: bool = False) -> Outcome:
        module = self.rebuilt.module
        self._start.restore()
        torch.set_rng_state(self._generator)
        conductor = Conductor(module, rows, self.recorded, self.weights)
        with tempfile.TemporaryDirectory() as folder, _global_switches():
            trainer = self._trainer(module, conductor, folder, detect_anomaly=detect_anomaly)
            conductor.set_progress(trainer)
            _leave_batches_alone(module)
            try:
                trainer.fit(module, _Loader([self._cast(row) for row in rows], trainer))
            except _EnoughError:
                pass
            except UnusableReplayError:
                raise
            except Exception as error:
                raise UnusableReplayError.of(f"Running {type(module).__name__} on the stored batch", error) from error
            finally:
                conductor.close()
        return conductor.outcome

    def _cast(self, row: dict[str, Any]) -> dict[str, Any]:
        """A micro-batch whose numbers a run in half precision has rounded goes to a full one as they are."""
        had, wanted = (_DTYPES.get(precision, torch.float32) for precision in (self.recorded.precision, self.precision))
        if had is wanted:
            return row
        cast = partial(_as_dtype, had=had, wanted=wanted)
        return row | {"batch": apply_to_collection(row["batch"], Tensor, cast)}

    def _trainer(self, module: LightningModule, conductor: Conductor, folder: str, *, detect_anomaly: bool) -> Trainer:
        recorded = self.recorded
        plugins: list[Any] = [LightningEnvironment()]
        precision: Any = self.precision
        if precision == "16-mixed":  # Lightning itself would make bfloat16 of it on a CPU
            scale = recorded.loss_scale or 1.0  # a scale that the run has not found would overflow by itself
            scaler = torch.amp.GradScaler(self.device, init_scale=scale)
            precision, plugins = None, [*plugins, MixedPrecision("16-mixed", self.device, scaler)]
            if scale != 1.0:
                conductor.outcome.notes.append(f"gradients are shown as they flow: times the loss scale, {scale:g}")
        try:
            return Trainer(
                accelerator=self.device,
                devices=1,
                precision=precision,
                plugins=plugins,
                callbacks=[conductor],
                accumulate_grad_batches=recorded.accumulate_grad_batches if module.automatic_optimization else 1,
                max_steps=recorded.max_steps if recorded.max_steps > recorded.step else -1,
                max_epochs=recorded.max_epochs if (recorded.max_epochs or 0) > recorded.epoch else -1,
                logger=DummyLogger(),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
                num_sanity_val_steps=0,
                detect_anomaly=detect_anomaly,
                default_root_dir=folder,
                **self.rebuilt.trainer,
            )
        except Exception as error:
            raise UnusableReplayError.of("Trainer", error) from None


class _EnoughError(BaseException):
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
            _set(tracker, recorded.epoch)
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
                self._end(trainer)
        if AGAIN not in self.outcome.notes:
            self.outcome.notes.append(AGAIN)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop if there was no step: the window goes on, or its micro-batch was left out."""
        if not self.outcome.micro_batches[-1].gradients:
            self._weigh(trainer)
        if self._is_over:
            self._end(trainer)
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

    def _end(self, trainer: Trainer) -> None:
        self._unwatch()
        raise _EnoughError


class _Loader:
    """Stored batches; the loop takes the next batch's number from its progress, which is set just before."""

    def __init__(self, rows: Sequence[dict[str, Any]], trainer: Trainer) -> None:
        self._rows, self._trainer = rows, trainer

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Any]:
        progress = self._trainer.fit_loop.epoch_loop.batch_progress
        for row in self._rows:
            for tracker in (progress.current, progress.total):
                _set(tracker, row["batch_idx"])
            yield copy.deepcopy(row["batch"])  # steps may change a batch in place


def _leave_batches_alone(module: LightningModule) -> None:
    """Stored batches are those that training_step got: what makes them so is not done twice."""

    def as_is(batch: Any, dataloader_idx: int) -> Any:
        return batch

    module.on_before_batch_transfer = as_is  # type: ignore[method-assign]
    module.on_after_batch_transfer = as_is  # type: ignore[method-assign]


def _as_dtype(tensor: Tensor, had: torch.dtype, wanted: torch.dtype) -> Tensor:
    return tensor.to(wanted) if tensor.dtype is had else tensor


def _held(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.detach().cpu().to_dense().double()


def _set(tracker: Any, count: int) -> None:
    """Let a loop believe that so many are done."""
    for stage in vars(tracker):
        setattr(tracker, stage, count)


def _bare(optimizer: Any) -> Optimizer:
    bare: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return bare


def _scale_left(trainer: Trainer, optimizer: Optimizer) -> float:
    """The loss scale that is still in the gradients."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or scaler._per_optimizer_states[id(optimizer)]["stage"].name != "READY":
        return 1.0
    return float(scaler.get_scale())


@contextmanager
def _global_switches() -> Iterator[None]:
    """What a Trainer sets for the whole process is put back."""
    kept = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(kept[0], warn_only=kept[1])
        torch.backends.cudnn.benchmark = benchmark
        torch.set_grad_enabled(True)
