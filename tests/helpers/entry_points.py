"""Ask once in a process which packages are installed.

Each Trainer asks ``importlib.metadata`` for entry points that bring callbacks. With two hundred packages that takes as long as
the rest of a small fit, and the answer never changes.
"""

from __future__ import annotations

import importlib.metadata
from functools import cache


def ask_once() -> None:
    """Keep the answers; to be called before Lightning is imported."""
    importlib.metadata.entry_points = cache(importlib.metadata.entry_points)
