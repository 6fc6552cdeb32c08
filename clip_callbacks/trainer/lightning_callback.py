"""The base class of this package's callbacks, which derives from the class ``Callback`` of each Lightning that is imported.

Trap: ``lightning.pytorch`` and ``pytorch_lightning`` are separate copies of the same code. Each checks callbacks by
``isinstance`` with its own ``Callback``, and importing either takes seconds. So this package imports neither, and adds the class
of each to its own bases as soon as the program has imported it.
"""

from __future__ import annotations

import sys
from abc import ABCMeta, abstractmethod
from typing import TYPE_CHECKING, Any

from clip_callbacks.trainer.compat import PACKAGES

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:

    class Callback:
        """Placeholder base: Python can exchange bases only for others of the same layout, so ``object`` would not do."""


def _lightning_bases() -> list[type[Any]]:
    """Return the class Callback of each Lightning that has been imported by now."""
    modules = [sys.modules.get(f"{package}.callbacks.callback") for package in PACKAGES]
    return [vars(module)["Callback"] for module in modules if module is not None and "Callback" in vars(module)]


class _LightningBasesLast(ABCMeta):
    """Puts the class Callback of each Lightning at the end of the method resolution order.

    The hooks of Lightning's Callback do nothing. In a class that inherits from one of this package's callbacks and from a user's
    callback for one Lightning, those of the other Lightning would otherwise hide the user's hooks, from the moment on in which
    any package imports it.
    """

    def mro(cls) -> list[type]:
        """Return the method resolution order."""
        order = super().mro()
        bases = [kind for kind in order if kind in _lightning_bases()]
        others = [kind for kind in order[:-1] if kind not in bases]
        return [*others, *bases, object]


class LightningCallback(Callback, metaclass=_LightningBasesLast):
    """A callback of ``lightning.pytorch`` and of ``pytorch_lightning``, once these are imported."""

    def _key(self, **options: Any) -> str:
        """Return a ``state_key`` in the format of Lightning's callbacks, which distinguishes callbacks of one class by options."""
        return f"{type(self).__qualname__}{options!r}"

    @abstractmethod
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check options and the Trainer before training."""


_OWN_BASES = LightningCallback.__bases__


def update_bases() -> None:
    """Add the class Callback of each Lightning that has been imported by now to the bases of this package's callbacks."""
    bases = (*_lightning_bases(), *_OWN_BASES)
    if LightningCallback.__bases__ != bases:
        LightningCallback.__bases__ = bases


class _ImportObserver:
    """A finder on ``sys.meta_path`` that finds no module, but is asked for each one that is imported.

    Lightning imports further modules after the one that defines Callback; at that point the class is there.
    """

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        """Update the bases, and leave the search to the other finders."""
        if name.startswith(PACKAGES):
            update_bases()


update_bases()
if len(LightningCallback.__bases__) < len(PACKAGES) + len(_OWN_BASES):
    sys.meta_path.insert(0, _ImportObserver)
