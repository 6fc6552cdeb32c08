"""Results of callbacks in processes that Lightning launches, returned to the callbacks of the main process.

Trap: with ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` the callbacks that train are copies, in processes that end with the
fit. Lightning returns only ``callback_metrics`` to the main process, by the launcher's ``get_extra_results``, and asks no callback.
That method is therefore extended: it also sends an object that, when the main process unpickles it, sets the attributes of the
callback that was copied.
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

_LIVING: WeakValueDictionary[str, ResultReturningCallback] = WeakValueDictionary()
"""The callbacks of this process by their identity, which their copies in launched processes share."""


class ResultReturningCallback(ABC):
    """A callback that receives the results of its copies in launched processes at the end of a fit."""

    def __init__(self) -> None:
        super().__init__()
        self._register(uuid4().hex)

    def _register(self, identity: str) -> None:
        self._identity = identity
        _LIVING[identity] = self

    def _return_results_of(self, trainer: Trainer) -> None:
        """In a launched process, send this callback's results to the main process at the end of the fit."""
        launcher: Any = trainer.strategy.launcher
        if hasattr(launcher, "get_extra_results"):
            launcher.get_extra_results = partial(_with_results, launcher.get_extra_results, self)

    @abstractmethod
    def _results(self) -> dict[str, Any]:
        """Return the attributes that the callback of the main process takes over."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the module's ``log`` and ``log_dict``, which Lightning sets on every callback."""
        return {name: value for name, value in self.__dict__.items() if name not in {"log", "log_dict"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Keep the identity in another process. A copy in the same process is a callback of its own."""
        self.__dict__.update(state)
        identity = state.get("_identity")
        self._register(uuid4().hex if identity is None or identity in _LIVING else identity)


class _Results:
    """The results of a callback. Unpickling them sets them on the callback with this identity.

    Args:
        identity: The identity of the callback.
        attributes: The attributes, serialized by ``torch.save``.
    """

    def __init__(self, identity: str, attributes: bytes) -> None:
        self._identity = identity
        self._attributes = attributes

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, (self._identity, self._attributes)


def _with_results(
    get_extra_results: Callable[[Trainer], dict[str, Any]], callback: ResultReturningCallback, trainer: Trainer
) -> Any:
    """Return what a launcher sends to the main process, together with the results of a callback."""
    buffer = io.BytesIO()  # like Lightning, which also avoids tensors that share memory with a process about to end
    torch.save(callback._results(), buffer)
    results = _Results(callback._identity, buffer.getvalue())
    return {**get_extra_results(trainer), f"clip_callbacks/{callback._identity}": results}


def _unpack(identity: str, attributes: bytes) -> None:
    """Set the results of a copy on the callback of this process, if it still exists."""
    callback = _LIVING.get(identity)
    if callback is not None:
        # weights_only=False is safe here: the bytes come from a process that this one has started
        callback.__dict__.update(torch.load(io.BytesIO(attributes), map_location="cpu", weights_only=False))
