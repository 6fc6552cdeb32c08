"""The stored window through a real Trainer.fit, as often as is asked for, each time from the same start."""

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
from clip_callbacks.replay.callback import Conductor, EnoughError
from clip_callbacks.replay.errors import UnusableReplayError
from clip_callbacks.replay.rebuilt_module import Rebuilt
from clip_callbacks.replay.recorded_step import Recorded
from clip_callbacks.replay.result import Outcome
from clip_callbacks.replay.snapshot import Snapshot
from clip_callbacks.replay.starting_weights import StartingWeights
from clip_callbacks.replay.stored_batches import StoredBatches, as_precise, leave_batches_alone
from clip_callbacks.replay.suppressed_output import silenced


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
            leave_batches_alone(module)
            cast = [as_precise(row, self.recorded.precision, self.precision) for row in rows]
            try:
                trainer.fit(module, StoredBatches(cast, trainer))
            except EnoughError:
                pass
            except UnusableReplayError:
                raise
            except Exception as error:
                raise UnusableReplayError.of(f"Running {type(module).__name__} on the stored batch", error) from error
            finally:
                conductor.close()
        return conductor.outcome

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
