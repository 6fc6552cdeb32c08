"""The progress bar of what takes more than a moment."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

DELAY_S = 1.0
"""What is done sooner shows no bar."""
INTERVAL_S = 0.1
"""How often it is drawn anew."""


def progress_bar(what: str, total: int, unit: str) -> Any:
    """A bar on stderr, gone when it is done; none where nobody looks on.

    Args:
        what: Is read or drawn.
        total: How many units there are.
        unit: "B" for bytes, or a word.
    """
    options = {"unit": unit, "unit_scale": unit == "B", "delay": DELAY_S, "mininterval": INTERVAL_S}
    return tqdm(total=total, desc=what, leave=False, disable=None, **options)
