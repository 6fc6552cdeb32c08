"""The weights with which a replay begins: where they come from, and whether they fit the module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_callbacks.bundles.bundle import Bundle, classes_in, first_line
from clip_callbacks.core.tensor_table import without_wrappers
from clip_callbacks.core.wording import listed, plural
from clip_callbacks.replay.errors import UnusableReplayError
from clip_callbacks.replay.recorded_step import RecordedStep

MAX_NAMES = 3
"""Number of parameters that an error names."""


@dataclass(frozen=True)
class StartingWeights:
    """The weights of the module, and the states of its optimizers, with which a replay begins.

    Args:
        source: Origin of the weights, in words.
        module: A ``state_dict`` of the module; None leaves the module as the configuration builds it.
        optimizers: A ``state_dict`` for each optimizer; if empty, they begin as ``configure_optimizers`` makes them.
        distance: Number of optimizer steps from the weights to the bad step; negative if they are later, None if unknown.
    """

    source: str
    module: Mapping[str, Any] | None = None
    optimizers: Sequence[Mapping[str, Any]] = ()
    distance: int | None = None

    @classmethod
    def of(cls, bundle: Bundle, recorded: RecordedStep, checkpoint: Path | None) -> StartingWeights:
        """Take the first weights that there are: of ``--ckpt``, the bundle, the checkpoint it refers to, or the configuration.

        Raises:
            UnusableReplayError: If a checkpoint is missing or cannot be read.
        """
        if checkpoint is not None:
            return cls._of_checkpoint(checkpoint, recorded)
        if weights := bundle.weights():
            return cls("from the bundle, saved just before the step", weights["module"], bundle.optimizers(), 0)
        path = bundle.facts["weights"].get("checkpoint")
        if not path:
            return cls("as the configuration initializes them, because the bundle holds none")
        if not isinstance(path, str):
            raise UnusableReplayError(
                f"`checkpoint` in {bundle.path} must be a path, got {path!r:.100}; name a checkpoint: --ckpt PATH."
            )
        if not Path(path).is_file():
            raise UnusableReplayError(
                f"The bundle refers to the weights in {path}, but that file is missing; name another checkpoint: --ckpt PATH."
            )
        return cls._of_checkpoint(Path(path), recorded, " (the checkpoint that the bundle refers to)")

    @classmethod
    def _of_checkpoint(cls, path: Path, recorded: RecordedStep, remark: str = "") -> StartingWeights:
        if not path.is_file():
            raise UnusableReplayError(f"`--ckpt` must be a checkpoint of Lightning, got {path}, which is not a file.")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            if classes := classes_in(path):
                raise UnusableReplayError(
                    f"{path} holds objects that could run code: {', '.join(classes)}. Save it again without them (for example "
                    "without save_hyperparameters of such objects), or name a checkpoint saved with save_weights_only=True."
                ) from None
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UnusableReplayError(f"{path} cannot be read as a checkpoint: {reason}") from None
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
            raise UnusableReplayError(f"`--ckpt` must be a checkpoint of Lightning with a state_dict, got {path}.")
        step = content.get("global_step")
        distance, source = None, f"from {path}{remark}"
        if isinstance(step, int):
            distance = recorded.step - step
            source += f", saved at step {step}, {distance_in_words(distance)} the bad step"
        return cls(source, content["state_dict"], tuple(content.get("optimizer_states") or ()), distance)

    def load(self, module: nn.Module) -> None:
        """Load the weights into the module.

        Raises:
            UnusableReplayError: If they do not fit the module.
        """
        if self.module is None:
            return
        if not all(isinstance(name, str) for name in self.module):
            raise UnusableReplayError(
                f"The weights must be a state_dict with names as keys, got {list(self.module)[:MAX_NAMES]!r:.100}."
            )
        state = self._named_as_in(module)
        _check_dtypes(state, module)
        check_names_and_shapes(
            {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}, module, "weights"
        )
        try:
            module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise UnusableReplayError(f"The weights do not fit the module: {' '.join(str(error).split())[:400]}") from None

    def _named_as_in(self, module: nn.Module) -> dict[str, Any]:
        """Return the weights under the module's names; wrappers such as torch.compile may have added theirs on either side."""
        assert self.module is not None
        own = {without_wrappers(name): name for name in module.state_dict()}
        return {own.get(without_wrappers(name), name): value for name, value in self.module.items()}


def check_names_and_shapes(shapes: Mapping[str, tuple[int, ...]], module: nn.Module, what: str) -> None:
    """Check that a module has tensors of these names and shapes.

    Args:
        shapes: Shapes by name.
        module: The module.
        what: Name of the tensors for the error.

    Raises:
        UnusableReplayError: If any name or shape differs.
    """
    own = {without_wrappers(name): tuple(value.shape) for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    given = {without_wrappers(name): shape for name, shape in shapes.items()}
    differences = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "of another shape": [
            f"{name} {list(given[name])} instead of {list(own[name])}" for name in own if given.get(name, own[name]) != own[name]
        ],
    }
    if found := [f"{len(names)} {kind} ({listed(names, MAX_NAMES)})" for kind, names in differences.items() if names]:
        raise UnusableReplayError(
            f"The {what} must fit {type(module).__name__} as the configuration builds it, got {', '.join(found)}; "
            "give the configuration of the run to --config."
        )


def _check_dtypes(state: Mapping[str, Any], module: nn.Module) -> None:
    """Check that no integers stand for floating-point numbers, or real for complex ones: torch would convert them silently."""
    own = module.state_dict()
    pairs = [(name, own[name], value) for name, value in state.items() if isinstance(value, Tensor) and name in own]
    differences = [
        f"{name} {given.dtype} instead of {expected.dtype}"
        for name, expected, given in pairs
        if isinstance(expected, Tensor)
        and (expected.is_floating_point(), expected.is_complex()) != (given.is_floating_point(), given.is_complex())
    ]
    if differences:
        raise UnusableReplayError(
            f"The weights must be of the kinds of numbers that the module has, got {listed(differences, MAX_NAMES)}."
        )


def distance_in_words(distance: int) -> str:
    """Return how many steps before or after a step another one is."""
    if distance == 0:
        return "just before"
    steps = plural(abs(distance), "1 step", f"{abs(distance)} steps")
    return f"{steps} before" if distance > 0 else f"{steps} after"
