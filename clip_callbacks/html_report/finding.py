"""A finding on a run: one or two sentences with a severity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["bad", "warn", "good", "note"]

MAX_NAMED_BLOCKS = 4
"""The number of blocks that a finding names."""


@dataclass(frozen=True)
class Finding:
    """One or two sentences on a run.

    Args:
        severity: "bad" for a problem, "warn" for a warning, "good" or "note".
        text: The sentences, with numbers and advice.
    """

    severity: Severity
    text: str


def listed(names: Sequence[str]) -> str:
    """List the first names, with the number of the others."""
    more = f" and {len(names) - MAX_NAMED_BLOCKS} more" if len(names) > MAX_NAMED_BLOCKS else ""
    return ", ".join(names[:MAX_NAMED_BLOCKS]) + more
