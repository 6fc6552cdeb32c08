"""Callbacks in processes that Lightning launches: what they have counted comes back to those of the main process.

With ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` the callbacks that train are copies, in processes that end with the fit. There
Lightning asks the strategy's launcher, by ``get_extra_results``, for what goes back to the main process, where it asks no callback.
So what a copy has counted is packed into a thing that, as it is unpickled, hands it over to the callback that was copied.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4
from weakref import WeakValueDictionary

import torch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_LIVING: WeakValueDictionary[str, ReturningCallback] = WeakValueDictionary()
"""The callbacks of this process by their identity, which their copies in launched processes share."""


class ReturningCallback(ABC):
    """A callback whose copies in launched processes tell it in the end what they have counted."""

    def __init__(self) -> None:
        super().__init__()
        self._take_identity(uuid4().hex)

    def _take_identity(self, identity: str) -> None:
        self._identity = identity
        _LIVING[identity] = self

    def _return_results_of(self, trainer: Trainer) -> None:
        """In a launched process, which ends with the fit, have what is counted by then sent to the main process."""
        launcher: Any = trainer.strategy.launcher
        if hasattr(launcher, "get_extra_results"):
            launcher.get_extra_results = partial(_with_results, launcher.get_extra_results, self)

    @abstractmethod
    def _results(self) -> dict[str, Any]:
        """The attributes that the callback of the main process takes over."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the module's methods, which Lightning hangs on every callback."""
        return {name: value for name, value in self.__dict__.items() if name not in {"log", "log_dict"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Keep the identity in another process; a copy in the same one is another callback."""
        self.__dict__.update(state)
        identity = state.get("_identity")
        self._take_identity(uuid4().hex if identity is None or identity in _LIVING else identity)


class _Results:
    """What a callback brings home; as it is unpickled, the callback of that process has it.

    Args:
        identity: Of the callback.
        attributes: The attributes, as ``torch.save`` writes them.
    """

    def __init__(self, identity: str, attributes: bytes) -> None:
        self._identity = identity
        self._attributes = attributes

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, (self._identity, self._attributes)


def _with_results(get_extra_results: Callable[[Trainer], dict[str, Any]], callback: ReturningCallback, trainer: Trainer) -> Any:
    """What a launcher sends to the main process, with what a callback has to bring home."""
    buffer = io.BytesIO()  # as Lightning does: tensors are not to share their memory with a process that ends
    torch.save(callback._results(), buffer)
    results = _Results(callback._identity, buffer.getvalue())
    return {**get_extra_results(trainer), f"clip_callbacks/{callback._identity}": results}


def _unpack(identity: str, attributes: bytes) -> None:
    """Hand over to the callback of this process, if it is still there, what its copy brings home."""
    callback = _LIVING.get(identity)
    if callback is not None:
        # all that is in it comes from a process that this one has started
        callback.__dict__.update(torch.load(io.BytesIO(attributes), map_location="cpu", weights_only=False))
