"""The states of all random number generators of a process, captured at little cost and restored."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import nn


class RandomStates:
    """The states of the generators that a training step may draw from: Python's, NumPy's, torch's, CUDA's, and the module's own.

    Args:
        module: Module whose attributes, and those of its submodules, are searched for generators once.
    """

    def __init__(self, module: nn.Module) -> None:
        """Search the module for generators."""
        self._own = _own_generators(module)

    def capture(self) -> dict[str, Any]:
        """Return all states as tensors, numbers and arrays, without waiting for a device."""
        numpy = sys.modules.get("numpy")
        return {
            "python": random.getstate(),
            "numpy": numpy.random.get_state(legacy=False) if numpy else None,
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]
            "generators": {name: _state(generator) for name, generator in self._own.items()},
        }


def restore(states: dict[str, Any], module: nn.Module) -> list[str]:
    """Restore the states of all generators.

    Args:
        states: States from :meth:`RandomStates.capture`.
        module: Module whose own generators are restored, by their names.

    Returns:
        Remarks on the generators that could not be restored.
    """
    notes = []
    random.setstate(states["python"])
    if states["numpy"] is not None:
        import numpy as np  # noqa: PLC0415 (torch does not need NumPy, and neither does this package)

        np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
        else:
            notes.append("random numbers of the CUDA device cannot be drawn without one: masks of dropout differ")
    own = _own_generators(module)
    for name, state in states["generators"].items():
        if name in own:
            _set_state(own[name], state)
        else:
            notes.append(f"the module has no generator `{name}`, which the bundle has")
    return notes


def _own_generators(module: nn.Module) -> dict[str, Any]:
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, child in module.named_modules()
        for name, value in vars(child).items()
        if isinstance(value, (torch.Generator, random.Random)) or _is_numpy(value)
    }


def _is_numpy(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.Generator)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state
