"""What makes our callbacks callbacks of Lightning: of each that a program imports, as soon as it does, and of none before."""

from __future__ import annotations

import sys
from abc import ABCMeta, abstractmethod
from typing import TYPE_CHECKING, Any

from clip_callbacks.trainer.compat import PACKAGES

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:

    class Callback:
        """Stands where the bases of callbacks will be: Python lets bases be exchanged for others of the same layout only."""


def _hosts() -> list[type[Any]]:
    """The class Callback of each Lightning that has been imported by now."""
    modules = [sys.modules.get(f"{package}.callbacks.callback") for package in PACKAGES]
    return [vars(module)["Callback"] for module in modules if module is not None and "Callback" in vars(module)]


class _HostsLast(ABCMeta):
    """Puts the class Callback of each Lightning behind all other classes in which methods are looked for.

    Hooks of theirs do nothing. In a class made of one of ours and of a callback that somebody wrote for one Lightning, those of the
    other Lightning would hide his, from the moment on in which some package imports that one.
    """

    def mro(cls) -> list[type]:
        """The classes in the order in which methods are looked for."""
        order = super().mro()
        hosts = [kind for kind in order if kind in _hosts()]
        others = [kind for kind in order[:-1] if kind not in hosts]
        return [*others, *hosts, object]


class Guest(Callback, metaclass=_HostsLast):
    """A callback that is one of ``lightning.pytorch`` and of ``pytorch_lightning``, once these are imported.

    Both check by ``isinstance`` what they are given, and their command lines look through subclasses.
    """

    def _key(self, **options: Any) -> str:
        """A ``state_key`` that tells callbacks of one class apart, made as Lightning's own callbacks make theirs."""
        return f"{type(self).__qualname__}{options!r}"

    @abstractmethod
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be done before anything is done."""


_OWN_BASES = Guest.__bases__


def meet() -> None:
    """Take the class Callback of each Lightning that has been imported by now among the bases of our callbacks."""
    bases = (*_hosts(), *_OWN_BASES)
    if Guest.__bases__ != bases:
        Guest.__bases__ = bases


class _Arrivals:
    """Finds no module, but hears of each that is looked for: after the one that defines a Callback, a Lightning imports others."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        """Leave the search to the other finders."""
        if name.startswith(PACKAGES):
            meet()


meet()
if len(Guest.__bases__) < len(PACKAGES) + len(_OWN_BASES):
    sys.meta_path.insert(0, _Arrivals)
