"""Hooks of a callback that have nothing to do in a fit, hidden from Lightning until the fit is over.

Trap: for each hook of each callback Lightning reads ``state_key`` and enters a context of its profiler, which takes several
microseconds, even if the hook is the empty one of its own class ``Callback``. It passes over a hook that is not callable
(``trainer/call.py``). Therefore such hooks are set to None on the instance. A hook that a subclass overrides stays.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from clip_callbacks.trainer.compat import CALLBACK

BATCH_HOOKS = frozenset(
    {"on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"}
    | {"on_before_optimizer_step", "on_train_batch_end"}
)
"""The hooks that Lightning calls in each batch."""


def hide_hooks(callback: Any, names: Collection[str], base: type[Any]) -> None:
    """Set hooks to None on a callback, except those of a subclass, of another base class, or of the instance.

    Args:
        callback: The callback.
        names: The names of hooks that have nothing to do.
        base: The class of this package that defines the hooks.
    """
    for name in names:
        inherited = [getattr(kind, name, None) for kind in (base, *CALLBACK.classes)]
        if name not in vars(callback) and getattr(type(callback), name) in inherited:
            setattr(callback, name, None)


def show_hooks(callback: Any) -> None:
    """Undo :func:`hide_hooks`."""
    for name in _hidden(vars(callback)):
        delattr(callback, name)


def without_hidden(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a callback as they are outside a fit, for a copy or a pickle of it."""
    hidden = _hidden(attributes)
    return {name: value for name, value in attributes.items() if name not in hidden}


def _hidden(attributes: dict[str, Any]) -> list[str]:
    return [name for name in BATCH_HOOKS if name in attributes and attributes[name] is None]
