"""Answer quickly what Lightning and torchmetrics ask about the packages that are installed; to be called before they are imported.

Each Trainer asks ``importlib.metadata`` for entry points that bring callbacks. With two hundred packages that takes as long as
the rest of a small fit, and the answer never changes. And torchmetrics imports transformers for metrics that no test uses: a
fifth of the time that it takes to import Lightning, in every process that does.
"""

from __future__ import annotations

import importlib.metadata
import sys
from functools import cache

UNUSED = {"transformers"}
"""Packages that torchmetrics would import."""
ASKING = "lightning_utilities.core.imports"
"""The module that asks for it; everybody else gets the answer."""


def ask_quickly() -> None:
    """Keep the list of entry points, and hide what is unused from torchmetrics."""
    importlib.metadata.entry_points = cache(importlib.metadata.entry_points)
    version = importlib.metadata.version

    def version_of_what_is_used(name: str) -> str:
        if name in UNUSED and sys._getframe(1).f_globals.get("__name__") == ASKING:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    importlib.metadata.version = version_of_what_is_used
