"""A runner that runs the stored window through a real ``Trainer.fit``, any number of times from the same start."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision

from clip_callbacks.replay.anomaly import Anomaly
from clip_callbacks.replay.callback import ReplayCallback, ReplayFinishedError
from clip_callbacks.replay.errors import UnusableReplayError
from clip_callbacks.replay.rebuilt_module import RebuiltModule
from clip_callbacks.replay.recorded_step import RecordedStep
from clip_callbacks.replay.result import WindowResult
from clip_callbacks.replay.snapshot import ModuleSnapshot
from clip_callbacks.replay.starting_weights import StartingWeights
from clip_callbacks.replay.stored_batches import StoredBatches, convert_batch, disable_transfer_hooks
from clip_callbacks.replay.suppressed_output import suppress_output


class ReplayRunner:
    """Runs micro-batches of a bundle, each time from the same start.

    Args:
        rebuilt: The module, whose present state each run begins with.
        recorded: The bad step as its bundle describes it.
        weights: The weights to begin with.
        device: Type of the device.
        precision: Precision of the Trainer.
    """

    def __init__(
        self, rebuilt: RebuiltModule, recorded: RecordedStep, weights: StartingWeights, device: str, precision: str
    ) -> None:
        self.recorded, self.weights, self.device, self.precision = recorded, weights, device, precision
        self._rebuilt = rebuilt
        self._start = ModuleSnapshot(rebuilt.module)
        self._random_state = torch.get_rng_state()  # setup and configure_model may draw random numbers

    def run(self, rows: Sequence[dict[str, Any]]) -> WindowResult:
        """Run micro-batches.

        Args:
            rows: The micro-batches, as the bundle holds them.

        Raises:
            UnusableReplayError: If the weights do not fit the module, or the module raises an error.
        """
        with suppress_output():
            result = self._fit(rows)
        if not result.micro_batches:
            raise UnusableReplayError(f"No stored batch was run: the Trainer ended the fit at step {self.recorded.step} at once.")
        return result

    def detect_anomaly(self, rows: Sequence[dict[str, Any]]) -> Anomaly | None:
        """Run micro-batches with autograd's anomaly detection.

        Args:
            rows: The micro-batches.

        Returns:
            The backward function that returned NaN; None if none did.
        """
        with suppress_output() as warnings:
            try:
                self._fit(rows, detect_anomaly=True)
            except UnusableReplayError as error:
                return Anomaly.of(error.__cause__, [str(warning.message) for warning in warnings])
        return None

    def _fit(self, rows: Sequence[dict[str, Any]], *, detect_anomaly: bool = False) -> WindowResult:
        module = self._rebuilt.module
        self._start.restore()
        torch.set_rng_state(self._random_state)
        callback = ReplayCallback(module, rows, self.recorded, self.weights)
        with tempfile.TemporaryDirectory() as folder, _global_settings_restored():
            trainer = self._trainer(module, callback, folder, detect_anomaly=detect_anomaly)
            callback.set_progress(trainer)
            disable_transfer_hooks(module)
            converted = [convert_batch(row, self.recorded.precision, self.precision) for row in rows]
            try:
                trainer.fit(module, StoredBatches(converted, trainer))
            except ReplayFinishedError:
                pass
            except UnusableReplayError:
                raise
            except Exception as error:
                source = f"Running {type(module).__name__} on the stored batch"
                raise UnusableReplayError.from_user_code(source, error) from error
            finally:
                callback.detach()
        return callback.result

    def _trainer(self, module: LightningModule, callback: ReplayCallback, folder: str, *, detect_anomaly: bool) -> Trainer:
        recorded = self.recorded
        plugins: list[Any] = [LightningEnvironment()]
        precision: Any = self.precision
        if precision == "16-mixed":  # on a CPU Lightning itself would replace it by bfloat16
            # without a recorded scale 1: GradScaler's own first scale, 65536, might overflow where the run did not
            scale = recorded.loss_scale or 1.0
            scaler = torch.amp.GradScaler(self.device, init_scale=scale)
            precision, plugins = None, [*plugins, MixedPrecision("16-mixed", self.device, scaler)]
            if scale != 1.0:
                callback.result.notes.append(f"gradients are shown as the backward pass has them: times the loss scale, {scale:g}")
        try:
            return Trainer(
                accelerator=self.device,
                devices=1,
                precision=precision,
                plugins=plugins,
                callbacks=[callback],
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
                **self._rebuilt.trainer_options,
            )
        except Exception as error:
            raise UnusableReplayError.from_user_code("Trainer", error) from None


@contextmanager
def _global_settings_restored() -> Iterator[None]:
    """Restore the settings that a Trainer makes for the whole process."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        torch.set_grad_enabled(True)
