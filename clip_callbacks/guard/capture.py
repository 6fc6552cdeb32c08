"""What of a bad step goes into its bundle, and that nothing of it disturbs the training."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

import clip_callbacks
from clip_callbacks.bundles.bundle import BATCHES, CONFIG, OPTIMIZERS, WEIGHTS, Bundle
from clip_callbacks.bundles.encoding import bytes_of, encoded
from clip_callbacks.bundles.folder import BundleFolder
from clip_callbacks.bundles.random_states import RandomStates
from clip_callbacks.guard.step_context import Incident
from clip_callbacks.trainer.grad_scaler import grad_scaler
from clip_callbacks.trainer.optimizer_context import KeptBatch

if TYPE_CHECKING:
    from clip_callbacks.guard.restore import Rewind

NOT_SEEN = "training_step takes the dataloader's iterator, or calls loss.backward() and not self.manual_backward(loss)"
"""Why hooks have not seen what a bad step was made of."""

Weights: TypeAlias = Literal["none", "reference", "full"]


class Bundles:
    """Writes bundles of one rank's bad steps.

    Args:
        folder: Where they go.
        weights: What of the weights and the optimizers' states goes along.
        module: The module in training.
    """

    def __init__(self, folder: BundleFolder, weights: Weights, module: LightningModule) -> None:
        self._folder = folder
        self._weights = weights
        self._module = module
        self._states = RandomStates(module)

    def keep(self, batch: Any, batch_idx: int) -> KeptBatch:
        """Keep a batch by reference, and where the random numbers stand."""
        return KeptBatch(batch, batch_idx, self._states.capture(), _versions(batch))

    def write(self, incident: Incident, report: Mapping[str, Any], rewind: Rewind | None, *, is_window: bool) -> Bundle:
        """Write the bundle of a bad step.

        Args:
            incident: Where and when, and the micro-batches.
            report: Of the step, for JSON.
            rewind: What knows the batch statistics before the step.
            is_window: Whether it is about a whole window, or one micro-batch of it.

        Returns:
            The bundle.

        Raises:
            OSError: If the folder is full, or the disk; nothing of the bundle is left.
        """
        parts, batches = self._batches(incident)
        texts, missing = _config(incident.trainer)
        if not parts:
            missing[BATCHES] = NOT_SEEN
        if self._weights == "full":
            parts |= self._state(incident.trainer, rewind)
        if obstacle := self._folder.fullness(sum(map(bytes_of, parts.values()))):
            raise OSError(obstacle)
        facts = {
            "kind": "spike" if report["stage"] == "spike" else "nonfinite",
            "report": dict(report),
            "level": "window" if is_window else "microbatch",
            "optimizer": incident.lane.index,
            "versions": _versions_of_software(),
            "module": self._module_facts(),
            "trainer": _trainer_facts(incident),
            "weights": _weights_facts(incident.trainer, self._weights),
            "batches": batches,
        }
        return self._folder.write(_name(incident.place), facts, parts, texts, missing)

    @staticmethod
    def _batches(incident: Incident) -> tuple[dict[str, Any], dict[str, Any]]:
        kept = [(loss, kept) for loss, kept in incident.window if kept]
        rows = [
            {"batch": encoded(it.batch), "batch_idx": it.batch_idx, "loss": loss.detach().cpu(), "rng": encoded(it.rng)}
            for loss, it in kept
        ]
        changed = any(_versions(it.batch) != it.versions for _, it in kept)
        return {BATCHES: rows} if rows else {}, {"count": len(rows), "changed_in_place": changed}

    def _state(self, trainer: Trainer, rewind: Rewind | None) -> dict[str, Any]:
        before = rewind.statistics_before() if rewind else {}
        live = self._module.state_dict(keep_vars=True)
        weights = {name: encoded(before.get(id(value), _data(value))) for name, value in live.items()}
        return {WEIGHTS: {"module": weights}, OPTIMIZERS: [encoded(optimizer.state_dict()) for optimizer in trainer.optimizers]}

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


def _trainer_facts(incident: Incident) -> dict[str, Any]:
    trainer = incident.trainer
    scaler = grad_scaler(trainer)
    return {
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "world_size": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "device": str(trainer.strategy.root_device),
        "global_step": incident.place["step"],
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "loss_scale": float(incident.loss_scale) if incident.loss_scale is not None else scaler.get_scale() if scaler else None,
    }


def _weights_facts(trainer: Trainer, weights: Weights) -> dict[str, Any]:
    if weights != "reference":
        return {"kind": weights}
    checkpoint, step = _last_checkpoint(trainer)
    return {"kind": weights, "checkpoint": checkpoint, "step": step}


def _last_checkpoint(trainer: Trainer) -> tuple[str | None, int | None]:
    """The newest checkpoint that this run has saved, or begun with, and its step as far as that is known."""
    saved = [
        (getattr(callback, "_last_global_step_saved", 0), path)
        for callback in trainer.checkpoint_callbacks
        if (path := getattr(callback, "_last_checkpoint_saved", ""))
    ]
    if saved:
        step, path = max(saved)
        return str(Path(path).absolute()), step
    return (str(Path(trainer.ckpt_path).absolute()), None) if trainer.ckpt_path else (None, None)


def _config(trainer: Trainer) -> tuple[dict[str, str], dict[str, str]]:
    """The configuration, if LightningCLI is there to tell it; or why it cannot be told."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        parser, config = getattr(callback, "parser", None), getattr(callback, "config", None)
        if parser is not None and config is not None:
            try:
                return {CONFIG: parser.dump(config, skip_none=False)}, {}
            except Exception as error:  # of somebody's own types
                return {}, {CONFIG: f"{type(error).__name__}: {error}"}
    return {}, {}


def _as_json(value: Any) -> Any:
    """What JSON can say of it; the rest as text."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _versions_of_software() -> dict[str, str | None]:
    numpy = sys.modules.get("numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "lightning": lightning.__version__,
        "numpy": numpy.__version__ if numpy else None,
        "clip_callbacks": clip_callbacks.__version__,
    }


def _name(place: Mapping[str, int | str]) -> str:
    suffix = f"_{place['optimizer']}" if "optimizer" in place else ""
    return f"step-{place['step']:07d}_batch-{place['batch']:07d}_epoch-{place['epoch']}_rank-{place['rank']}{suffix}"


def _versions(batch: Any) -> tuple[tuple[int, int], ...]:
    """Which things a batch consists of, and how often its tensors were changed in place."""
    return tuple(
        (id(leaf), leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0) for leaf in tree_leaves(batch)
    )


def _data(value: Any) -> Any:
    return value.data if isinstance(value, Tensor) else value
