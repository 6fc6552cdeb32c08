"""Lightning goes by two names, ``lightning.pytorch`` and ``pytorch_lightning``: the same code twice, strangers to each other.

Which of them a Trainer is of is known when it runs. Both are always installed: the first requires the second.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypeGuard, TypeVar

from lightning.pytorch import LightningModule
from lightning_utilities.core import rank_zero

_log = rank_zero.log
from pytorch_lightning import Callback as OtherCallback  # noqa: E402

# the last import takes over what both write their messages to: who silenced "lightning.pytorch" would hear from it again
rank_zero.log = _log

__all__ = ["OtherCallback", "is_of", "overrides"]

Kind = TypeVar("Kind")


def is_of(thing: object, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether a thing is of a class of ``lightning.pytorch`` or of its counterpart.

    Example::

        >>> import pytorch_lightning
        >>> isinstance(pytorch_lightning.LightningModule(), LightningModule)
        False
        >>> is_of(pytorch_lightning.LightningModule(), LightningModule)
        True
    """
    return isinstance(thing, (kind, _counterpart(kind)))


def overrides(thing: object, hook: str, kind: type[Any] = LightningModule) -> bool:
    """Whether a module, or a thing of another kind, has a hook of its own."""
    method = getattr(thing, hook)
    function = getattr(method, "__func__", method)  # what hangs on an instance may be any callable
    return all(function is not getattr(base, hook) for base in (kind, _counterpart(kind)))


def _counterpart(kind: type[Any]) -> type[Any]:
    """The class of the same name in ``pytorch_lightning``."""
    module = kind.__module__.replace("lightning.pytorch", "pytorch_lightning", 1)
    twin: type[Any] = getattr(import_module(module), kind.__name__)
    return twin
