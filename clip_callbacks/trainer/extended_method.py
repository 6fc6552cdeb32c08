"""A method of the module in training, extended for one fit: nothing of Lightning's is patched, a copy of the module has its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class ExtendedHook:
    """Has something called after a method of a module, with the same arguments.

    Args:
        module: The module.
        name: The name of the method.
        after: What is called after it.
    """

    def __init__(self, module: LightningModule, name: str, after: Callable[..., None]) -> None:
        self._module = module
        self._name = name
        self._had_own = vars(module).get(name)
        self._extended = _Extended(getattr(module, name), after)
        setattr(module, name, self._extended)

    def detach(self) -> None:
        """Give the module its own method back; where somebody has extended this one, it only does what it did before."""
        self._extended.after = _nothing
        if vars(self._module).get(self._name) is not self._extended:
            return
        if self._had_own is None:
            delattr(self._module, self._name)
        else:
            setattr(self._module, self._name, self._had_own)


class _Extended:
    """A method, and what is called after it; in a copy of the module, the method alone.

    Args:
        original: The method.
        after: What is called after it.
    """

    def __init__(self, original: Callable[..., Any], after: Callable[..., None]) -> None:
        self.__wrapped__ = original
        self.after = after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.__wrapped__(*args, **kwargs)
        self.after(*args, **kwargs)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.__wrapped__,)


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What is called after a method that is extended no longer."""
