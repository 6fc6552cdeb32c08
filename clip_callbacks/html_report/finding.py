"""A finding on a run: one or two sentences with a severity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["bad", "warn", "good", "note"]


@dataclass(frozen=True)
class Finding:
    """One or two sentences on a run.

    Args:
        severity: "bad" for a problem, "warn" for a warning, "good" or "note".
        text: The sentences, with numbers and advice.
    """

    severity: Severity
    text: str
