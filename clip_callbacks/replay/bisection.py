"""The smallest subset of samples that still fails, by delta debugging (Zeller and Hildebrandt 2002, ddmin)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bisection:
    """What came of it.

    Args:
        samples: The subset; leave out any one of them, and it fails no more.
        size: Samples in the batch.
        runs: How many were made.
        is_stable: Whether the subset failed a second time.
        is_alone: Whether the rest of the batch does not fail without it.
    """

    samples: tuple[int, ...]
    size: int
    runs: int
    is_stable: bool
    is_alone: bool

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "samples": list(self.samples),
            "size": self.size,
            "runs": self.runs,
            "stable": self.is_stable,
            "alone": self.is_alone,
        }

    def __str__(self) -> str:
        """One line."""
        which = ", ".join(map(str, self.samples))
        text = f"Smallest part of the batch that still fails: sample{'s' * (len(self.samples) > 1)} {which}"
        text += f" (of {self.size}, counted from 0; {self.runs} runs)"
        if not self.is_alone:
            text += "; the rest fails without it too: it is not the only one"
        return text if self.is_stable else f"{text}; it did not fail a second time: it hangs on more than weights and samples"


def bisect(size: int, fails: Callable[[Sequence[int]], bool]) -> Bisection:
    r"""Find a subset that fails and of which no sample can be left out.

    Halves are tried first, then quarters and what is left without each of them, and so on: for one guilty sample of :math:`n` this
    takes at most :math:`2 \log_2 n` runs, for several that only fail together at most :math:`n^2 + 3n`; two more
    see what is left of the batch, and the subset again.

    Args:
        size: Samples in the batch, which as a whole is known to fail.
        fails: Runs some of them.

    Example:
        >>> found = bisect(64, lambda samples: {5, 41} <= set(samples))
        >>> found.samples
        (5, 41)
    """
    known: dict[tuple[int, ...], bool] = {tuple(range(size)): True}
    runs = 0

    def does_fail(samples: Sequence[int]) -> bool:
        nonlocal runs
        key = tuple(samples)
        if key not in known:
            runs += 1
            known[key] = fails(key)
        return known[key]

    samples, parts = list(range(size)), 2
    while len(samples) > 1:
        pieces = [samples[len(samples) * i // parts : len(samples) * (i + 1) // parts] for i in range(parts)]
        rests = [[sample for sample in samples if sample not in set(piece)] for piece in pieces] if parts > 2 else []  # noqa: PLR2004
        piece = next((piece for piece in pieces if does_fail(piece)), None)
        rest = None if piece else next((rest for rest in rests if does_fail(rest)), None)
        if piece:
            samples, parts = piece, 2
        elif rest:
            samples, parts = rest, max(parts - 1, 2)
        elif parts < len(samples):
            parts = min(2 * parts, len(samples))
        else:
            break
    rest = [sample for sample in range(size) if sample not in set(samples)]
    is_alone = not rest or not does_fail(rest)
    return Bisection(tuple(samples), size, runs + 1, fails(samples), is_alone)
