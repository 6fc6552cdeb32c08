"""Lists and counts in the sentences of messages."""

from __future__ import annotations

from collections.abc import Sequence


def listed(items: Sequence[object], most: int, separator: str = ", ") -> str:
    """List the first items, with the number of the others."""
    text = separator.join(map(str, items[:most]))
    if len(items) > most:
        text += f" and {len(items) - most} more"
    return text


def plural(count: int, one: str, many: str) -> str:
    """Return the word that fits a count."""
    return one if count == 1 else many
