"""The weights that a replay begins with, from the first of the places that has them, and whether they fit the module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_callbacks.bundles.bundle import Bundle, classes_in
from clip_callbacks.core.tensor_table import without_wrappers
from clip_callbacks.replay.errors import UnusableReplayError
from clip_callbacks.replay.recorded_step import Recorded

NAMED = 3
"""How many keys an error names."""


@dataclass(frozen=True)
class StartingWeights:
    """What the module, and its optimizers, are given before the step.

    Args:
        text: Where they are from.
        module: A ``state_dict``; None: what the configuration makes is left.
        optimizers: One for each optimizer; empty: what ``configure_optimizers`` makes is left.
        distance: Optimizer steps from them to the bad one; None if that is not known.
    """

    text: str
    module: Mapping[str, Any] | None = None
    optimizers: Sequence[Mapping[str, Any]] = ()
    distance: int | None = None

    @classmethod
    def of(cls, bundle: Bundle, recorded: Recorded, checkpoint: Path | None) -> StartingWeights:
        """From ``--ckpt``, else the bundle itself, else the checkpoint that it refers to, else the configuration.

        Raises:
            UnusableReplayError: If a checkpoint cannot be read, or is not there.
        """
        if checkpoint is not None:
            return cls._of_checkpoint(checkpoint, recorded, "")
        if weights := bundle.weights():
            return cls("those of the bundle, from just before the step", weights["module"], bundle.optimizers(), 0)
        path = bundle.facts["weights"].get("checkpoint")
        if not path:
            return cls("as the configuration makes them; the bundle has none")
        if not isinstance(path, str):
            raise UnusableReplayError(f"{bundle.path} must tell of a checkpoint's path, got {path!r:.100}; give one by --ckpt.")
        if not Path(path).is_file():
            raise UnusableReplayError(f"The bundle's weights are those of {path}, which is gone; give another one by --ckpt PATH.")
        return cls._of_checkpoint(Path(path), recorded, ", which the bundle refers to")

    @classmethod
    def _of_checkpoint(cls, path: Path, recorded: Recorded, which: str) -> StartingWeights:
        if not path.is_file():
            raise UnusableReplayError(f"`--ckpt` must be a checkpoint of Lightning, got {path}, which is no file.")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            classes = classes_in(path)
            if classes:
                raise UnusableReplayError(
                    f"{path} holds objects that could run code: {', '.join(classes)}. Save it anew without them (for example "
                    "without save_hyperparameters of such objects), or give one saved with save_weights_only=True."
                ) from None
            said = next(iter(str(error).splitlines()), "")
            raise UnusableReplayError(f"{path} cannot be read as a checkpoint: {type(error).__name__}: {said}") from None
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
            raise UnusableReplayError(f"`--ckpt` must be a checkpoint of Lightning with a state_dict, got {path}.")
        step = content.get("global_step")
        distance = recorded.step - step if isinstance(step, int) else None
        text = f"those of {path}{which}"
        if distance is not None:
            text += f", of step {step}, {_in_words(distance)}"
        return cls(text, content["state_dict"], tuple(content.get("optimizer_states") or ()), distance)

    def load(self, module: nn.Module) -> None:
        """Give them to the module.

        Raises:
            UnusableReplayError: If they do not fit it.
        """
        if self.module is None:
            return
        if not all(isinstance(name, str) for name in self.module):
            raise UnusableReplayError(f"The weights must be a state_dict with names, got {list(self.module)[:NAMED]!r:.100}.")
        state = self._named_as_in(module)
        _check_kinds(state, module)
        check_fit({name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}, module, "weights")
        try:
            module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise UnusableReplayError(f"The weights do not fit the module: {' '.join(str(error).split())[:400]}") from None

    def _named_as_in(self, module: nn.Module) -> dict[str, Any]:
        """Under the module's own names, should wrappers have put theirs into one of them."""
        assert self.module is not None
        own = {without_wrappers(name): name for name in module.state_dict()}
        return {own.get(without_wrappers(name), name): value for name, value in self.module.items()}


def check_fit(shapes: Mapping[str, tuple[int, ...]], module: nn.Module, what: str) -> None:
    """See that tensors by name are those of a module.

    Raises:
        UnusableReplayError: If they are not; names the first that differ.
    """
    own = {without_wrappers(name): tuple(value.shape) for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    theirs = {without_wrappers(name): shape for name, shape in shapes.items()}
    missing, unexpected = [name for name in own if name not in theirs], [name for name in theirs if name not in own]
    others = [
        f"{name} {list(theirs[name])} instead of {list(own[name])}" for name in own if theirs.get(name, own[name]) != own[name]
    ]
    found = ((missing, "missing"), (unexpected, "unexpected"), (others, "of another shape"))
    if differences := [f"{len(names)} {which} ({_listed(names)})" for names, which in found if names]:
        raise UnusableReplayError(
            f"The {what} must be those of {type(module).__name__} as the configuration makes it, got {', '.join(differences)}; "
            "is it the configuration of that run?"
        )


def _check_kinds(state: Mapping[str, Any], module: nn.Module) -> None:
    """See that no whole numbers take the place of others, which torch would convert without a word."""
    own = module.state_dict()
    pairs = [(name, own[name], value) for name, value in state.items() if isinstance(value, Tensor) and name in own]
    others = [
        f"{name} {theirs.dtype} instead of {ours.dtype}"
        for name, ours, theirs in pairs
        if isinstance(ours, Tensor) and _kind(ours) != _kind(theirs)
    ]
    if others:
        raise UnusableReplayError(f"The weights must be numbers of the kind that the module has, got {_listed(others)}.")


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _in_words(distance: int) -> str:
    """Where a checkpoint's step lies, so many steps before the bad one."""
    if distance == 0:
        return "that of the bad one"
    steps = "step" if abs(distance) == 1 else "steps"
    side = "before" if distance > 0 else "after"
    return f"{abs(distance)} {steps} {side} the bad one"
