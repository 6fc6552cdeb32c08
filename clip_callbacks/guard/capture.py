"""Capture of a bad step: what its bundle holds, taken without any effect on the training."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from clip_callbacks._version import __version__
from clip_callbacks.bundles.bundle import BATCHES, CONFIG, OPTIMIZERS, WEIGHTS, Bundle
from clip_callbacks.bundles.encoding import bytes_of, encoded
from clip_callbacks.bundles.folder import BundleFolder
from clip_callbacks.bundles.random_states import RandomStates
from clip_callbacks.guard.options import Weights
from clip_callbacks.trainer.fingerprints import version_of
from clip_callbacks.trainer.grad_scaler import grad_scaler
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import KeptBatch, StepContext

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

NOT_SEEN = "training_step takes the dataloader's iterator, or calls loss.backward() and not self.manual_backward(loss)"
"""Reason why hooks have not seen the batches of a bad step."""

StateBefore: TypeAlias = Callable[[OptimizerContext], Mapping[int, Tensor]]


class BundleWriter:
    """Writes the bundles of one rank's bad steps.

    Args:
        folder: Folder for the bundles.
        weights: Content of a bundle: all weights and optimizer states, a reference to a checkpoint, or none.
        module: The module in training.
        before: Returns tensors as they were before a step of an optimizer, by the ``id`` of the live ones.
    """

    def __init__(self, folder: BundleFolder, weights: Weights, module: LightningModule, before: StateBefore) -> None:
        self._folder = folder
        self._weights = weights
        self._module = module
        self._before = before
        self._states = RandomStates(module)

    def keep(self, batch: Any, batch_idx: int) -> KeptBatch:
        """Keep a reference to a batch, with the states of the random number generators before it."""
        return KeptBatch(batch, batch_idx, self._states.capture(), _versions(batch))

    def write(self, step: StepContext, report: Mapping[str, Any], *, is_window: bool) -> Bundle:
        """Write the bundle of a bad step.

        Args:
            step: The step, with its micro-batches.
            report: Facts about the step, for JSON.
            is_window: If False, the bundle is about one micro-batch and not about a whole window.

        Returns:
            The bundle.

        Raises:
            OSError: If the folder or the disk is full; no part of the bundle is left then.
        """
        # Batches are references, and are only read now: good steps copy no batch.
        parts, batches = self._batches(step)
        texts, missing = _config(step.trainer)
        if not parts:
            missing[BATCHES] = NOT_SEEN
        if self._weights == "full":
            parts |= self._state(step)
        # asked with the size of this bundle, before a byte is written
        if obstacle := self._folder.fullness(sum(map(bytes_of, parts.values()))):
            raise OSError(obstacle)
        facts = {
            "kind": "spike" if report["stage"] == "spike" else "nonfinite",
            "report": dict(report),
            "level": "window" if is_window else "microbatch",
            "optimizer": step.optimizer.index,
            "versions": _versions_of_software(),
            "module": self._module_facts(),
            "trainer": _trainer_facts(step),
            "weights": _weights_facts(step.trainer, self._weights),
            "batches": batches,
        }
        return self._folder.write(_name(step.place), facts, parts, texts, missing)

    @staticmethod
    def _batches(step: StepContext) -> tuple[dict[str, Any], dict[str, Any]]:
        # The loss goes along so that a replay can tell whether it is the same, bit for bit.
        kept = [(loss, batch) for loss, batch, _ in step.micro_batches if batch]
        rows = [
            {"batch": encoded(one.batch), "batch_idx": one.batch_idx, "loss": loss.detach().cpu(), "rng": encoded(one.rng)}
            for loss, one in kept
        ]
        changed = any(_versions(one.batch) != one.versions for _, one in kept)
        facts = {"count": len(rows), "changed_in_place": changed}
        if not rows:
            return {}, facts
        return {BATCHES: rows}, facts

    def _state(self, step: StepContext) -> dict[str, Any]:
        before = self._before(step.optimizer)
        # `before` is keyed by the ids of the live tensors; without `keep_vars` torch returns detached aliases with other ids.
        live = self._module.state_dict(keep_vars=True)
        weights = {name: encoded(before.get(id(value), _data(value))) for name, value in live.items() if not is_lazy(value)}
        return {WEIGHTS: {"module": weights}, OPTIMIZERS: [encoded(each.state_dict()) for each in step.trainer.optimizers]}

    def _module_facts(self) -> dict[str, Any]:
        module = self._module
        return {
            "class": f"{type(module).__module__}.{type(module).__qualname__}",
            "script": sys.argv[0],
            "automatic_optimization": module.automatic_optimization,
            "hparams": _as_json(dict(module.hparams)),
            "state": {
                name: [str(value.dtype).removeprefix("torch."), list(value.shape)]
                for name, value in module.state_dict().items()
                if isinstance(value, Tensor) and not is_lazy(value)
            },
        }


def _trainer_facts(step: StepContext) -> dict[str, Any]:
    trainer = step.trainer
    return {
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "world_size": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "device": str(trainer.strategy.root_device),
        "global_step": step.place["step"],
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "loss_scale": _loss_scale(step),
    }


def _loss_scale(step: StepContext) -> float | None:
    if step.loss_scale is not None:
        return float(step.loss_scale)
    if scaler := grad_scaler(step.trainer):
        return scaler.get_scale()
    return None


def _weights_facts(trainer: Trainer, weights: Weights) -> dict[str, Any]:
    if weights != "reference":
        return {"kind": weights}
    checkpoint, step = _last_checkpoint(trainer)
    return {"kind": weights, "checkpoint": checkpoint, "step": step}


def _last_checkpoint(trainer: Trainer) -> tuple[str | None, int | None]:
    """Return the newest checkpoint that this run has saved, or was started from, and its step if that is known."""
    # `best_model_path` may be older, and `last_model_path` is empty without `save_last`.
    saved = [
        (getattr(callback, "_last_global_step_saved", 0), path)
        for callback in trainer.checkpoint_callbacks
        if (path := getattr(callback, "_last_checkpoint_saved", ""))
    ]
    if saved:
        step, path = max(saved)
        return str(Path(path).absolute()), step
    if trainer.ckpt_path:
        return str(Path(trainer.ckpt_path).absolute()), None
    return None, None


def _config(trainer: Trainer) -> tuple[dict[str, str], dict[str, str]]:
    """Return the configuration of LightningCLI as a text file, or the reason why there is none."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # SaveConfigCallback is known by its attributes: to name its class would import Lightning's command line.
        parser, config = getattr(callback, "parser", None), getattr(callback, "config", None)
        if parser is not None and config is not None:
            try:
                return {CONFIG: parser.dump(config, skip_none=False)}, {}
            except Exception as error:  # of any kind: users' types have serializers of their own
                return {}, {CONFIG: f"{type(error).__name__}: {error}"}
    return {}, {}


def _as_json(value: Any) -> Any:
    """Convert a value to types of JSON; objects of other types become their text."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return repr(value)


def _versions_of_software() -> dict[str, str | None]:
    # optional for torch: if the run has not imported it, it plays no part
    numpy = sys.modules.get("numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "lightning": version("lightning"),
        "numpy": numpy.__version__ if numpy else None,
        "clip_callbacks": __version__,
    }


def _name(place: Mapping[str, int | str]) -> str:
    name = f"step-{place['step']:07d}_batch-{place['batch']:07d}_epoch-{place['epoch']}_rank-{place['rank']}"
    if "optimizer" in place:
        name += f"_{place['optimizer']}"
    return name


def _versions(batch: Any) -> tuple[tuple[int, int], ...]:
    """Return the identity of each leaf of a batch, and how often it was changed in place."""
    versions = []
    for leaf in tree_leaves(batch):
        version = 0
        if isinstance(leaf, Tensor):
            version = version_of(leaf) or 0
        versions.append((id(leaf), version))
    return tuple(versions)


def _data(value: Any) -> Any:
    return value.data if isinstance(value, Tensor) else value
