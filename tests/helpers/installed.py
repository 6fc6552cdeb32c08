"""Answer quickly what Lightning and torchmetrics ask about the packages that are installed; to be called before they are imported.

Each Trainer asks ``importlib.metadata`` for entry points that bring callbacks. With two hundred packages that takes as long as
the rest of a small fit, and the answer never changes. And torchmetrics imports transformers, SciPy and Matplotlib for metrics and
plots that no test uses: nearly half of the time that it takes to import Lightning, in every process that does.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from functools import cache

UNUSED = {"matplotlib", "scipy", "transformers"}
"""Packages that torchmetrics would import."""
ASKING = "lightning_utilities.core.imports"
"""The module that asks for them; everybody else gets the answer."""


def ask_quickly() -> None:
    """Keep the list of entry points, and hide what is unused from torchmetrics."""
    importlib.metadata.entry_points = cache(importlib.metadata.entry_points)
    version, find_spec = importlib.metadata.version, importlib.util.find_spec

    def version_of_what_is_used(name: str) -> str:
        if name in UNUSED and _asks():
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    def spec_of_what_is_used(name: str, package: str | None = None) -> object:
        return None if name in UNUSED and _asks() else find_spec(name, package)

    importlib.metadata.version = version_of_what_is_used
    importlib.util.find_spec = spec_of_what_is_used


def _asks() -> bool:
    """Whether the caller's caller is the module that asks."""
    return sys._getframe(2).f_globals.get("__name__") == ASKING
