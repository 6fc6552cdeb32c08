"""The progress bar for work that takes longer than a second."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

DELAY_S = 1.0
"""Seconds before the bar appears: shorter work shows none."""
INTERVAL_S = 0.1
"""Least time between two updates of the bar, in seconds."""


def progress_bar(label: str, total: int, unit: str) -> Any:
    """Make a progress bar on stderr that disappears when it is done; nothing is drawn if stderr is not a terminal.

    Args:
        label: Text before the bar.
        total: Number of units of work.
        unit: "B" for bytes, or the name of one unit.
    """
    options = {"unit": unit, "unit_scale": unit == "B", "delay": DELAY_S, "mininterval": INTERVAL_S}
    return tqdm(total=total, desc=label, leave=False, disable=None, **options)
