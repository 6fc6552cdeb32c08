"""A snapshot of a module as it was built, which is restored before each of several runs."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules")
_ATTRIBUTES_OF_TORCH = vars(nn.Module()).keys() - {"training"}


class ModuleSnapshot:
    """Copies of the values of a module's tensors, and of its attributes.

    The module and its parameters stay the same objects, because an optimizer that LightningCLI has bound to the module holds them.

    Args:
        module: A module that has not been fitted.
    """

    def __init__(self, module: nn.Module) -> None:
        tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        self._values = [(tensor, tensor.detach().clone(), tensor.requires_grad) for tensor in tensors.values()]
        self._shared = tensors | {id(child): child for child in module.modules()}
        self._tables = [(child, {key: dict(vars(child)[key]) for key in _TABLES}) for child in module.modules()]
        self._attributes = [(child, self._copied(_own_attributes(child))) for child in module.modules()]

    def restore(self) -> None:
        """Give the module the values, submodules and attributes that it had."""
        for tensor, value, requires_grad in self._values:
            tensor.data, tensor.grad = value.clone(), None
            if tensor.requires_grad != requires_grad:  # a run may have ended between toggle_optimizer and untoggle_optimizer
                tensor.requires_grad_(requires_grad)
        for child, tables in self._tables:
            for key, table in tables.items():
                vars(child)[key].clear()
                vars(child)[key].update(table)
        for child, attributes in self._attributes:
            for key in _own_attributes(child).keys() - attributes.keys():
                del vars(child)[key]
            vars(child).update(self._copied(attributes))

    def _copied(self, attributes: dict[str, Any]) -> dict[str, Any]:
        return {key: self._copy(value) for key, value in attributes.items()}

    def _copy(self, value: Any) -> Any:
        """Return a deep copy that shares the module's tensors and submodules, or the value itself if it has no copy, as a lock."""
        try:
            return copy.deepcopy(value, dict(self._shared))
        except Exception:
            return value


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in _ATTRIBUTES_OF_TORCH}
