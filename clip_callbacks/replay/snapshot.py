"""A module as it was built, to be had back before each of several runs."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules")
_TORCHS = vars(nn.Module()).keys() - {"training"}


class Snapshot:
    """Values of a module's tensors, and its attributes.

    The module itself stays the same object, as do its parameters: an optimizer that LightningCLI has bound to it holds them.

    Args:
        module: Not yet fitted.
    """

    def __init__(self, module: nn.Module) -> None:
        tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        self._values = [(tensor, tensor.detach().clone(), tensor.requires_grad) for tensor in tensors.values()]
        self._kept = tensors | {id(child): child for child in module.modules()}
        self._tables = [(child, {key: dict(vars(child)[key]) for key in _TABLES}) for child in module.modules()]
        self._attributes = [(child, self._copied(_own(child))) for child in module.modules()]

    def restore(self) -> None:
        """Make the module what it was."""
        for tensor, value, requires_grad in self._values:
            tensor.data, tensor.grad = value.clone(), None
            if tensor.requires_grad != requires_grad:  # a run may have ended between toggle_optimizer and untoggle_optimizer
                tensor.requires_grad_(requires_grad)
        for child, tables in self._tables:
            for key, table in tables.items():
                vars(child)[key].clear()
                vars(child)[key].update(table)
        for child, attributes in self._attributes:
            for key in _own(child).keys() - attributes.keys():
                del vars(child)[key]
            vars(child).update(self._copied(attributes))

    def _copied(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """What cannot be copied, such as a lock, stays the same."""
        return {key: self._copy(value) for key, value in attributes.items()}

    def _copy(self, value: Any) -> Any:
        try:
            return copy.deepcopy(value, dict(self._kept))
        except Exception:
            return value


def _own(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in _TORCHS}
