"""A method of the module in training or of a plugin, extended for one fit.

Trap: Lightning gives a callback no hook after the module's own, and none where gradients are clipped. The method is therefore
replaced on the instance; Lightning itself is not patched. The replacement must survive copies of the module in mid-fit, so a copy
of it is the original method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ExtendedMethod:
    """Calls a function after each call of a method, with the same arguments.

    Args:
        owner: The module or plugin.
        name: The name of the method.
        after: The function to call after it.
    """

    def __init__(self, owner: Any, name: str, after: Callable[..., None]) -> None:
        self._owner = owner
        self._name = name
        self._instance_attribute = vars(owner).get(name)
        self._extended = _Extended(getattr(owner, name), after)
        setattr(owner, name, self._extended)

    def detach(self) -> None:
        """Restore the owner's own method. If other code has wrapped the extension, only the added call is removed."""
        self._extended.after = _do_nothing
        if vars(self._owner).get(self._name) is not self._extended:
            return
        if self._instance_attribute is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._instance_attribute)


class _Extended:
    """A method together with a function that is called after it. Its copy is the method alone.

    Args:
        original: The method.
        after: The function to call after it.
    """

    def __init__(self, original: Callable[..., Any], after: Callable[..., None]) -> None:
        self.__wrapped__ = original  # Lightning's is_param_in_hook_signature looks for the method's arguments under this name
        self.after = after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.__wrapped__(*args, **kwargs)
        self.after(*args, **kwargs)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return _identity, (self.__wrapped__,)


def _identity(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass
