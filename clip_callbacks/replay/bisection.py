"""Delta debugging (Zeller and Hildebrandt 2002, algorithm ddmin): the smallest subset of a batch's samples that still fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bisection:
    """The smallest subset of samples that still fails.

    Args:
        samples: Indices of the samples; without any one of them the rest of the subset no longer fails.
        size: Number of samples in the batch.
        runs: Number of runs that were made.
        is_stable: If True, the subset failed a second time, too.
        is_alone: If True, the batch does not fail without the subset.
    """

    samples: tuple[int, ...]
    size: int
    runs: int
    is_stable: bool
    is_alone: bool

    def facts(self) -> dict[str, Any]:
        """Return the subset for JSON."""
        return {
            "samples": list(self.samples),
            "size": self.size,
            "runs": self.runs,
            "stable": self.is_stable,
            "alone": self.is_alone,
        }

    @property
    def names(self) -> str:
        """The samples in words, such as "samples 5, 57"."""
        return f"sample{'s' * (len(self.samples) > 1)} {', '.join(map(str, self.samples))}"

    def __str__(self) -> str:
        """Return one line."""
        text = f"Smallest part of the batch that still fails: {self.names} of {self.size}, counted from 0 ({self.runs} runs)"
        if not self.is_alone:
            text += "; the other samples fail without it, too"
        if not self.is_stable:
            text += "; it did not fail a second time: the failure depends on more than the weights and the samples"
        return text


def bisect(size: int, fails: Callable[[Sequence[int]], bool]) -> Bisection:
    r"""Find a failing subset of samples from which no sample can be left out.

    Halves of the batch are tried first, then quarters and the batch without each of them, then eighths and so on. For one bad
    sample of :math:`n` this takes at most :math:`2 \log_2 n` runs, for several samples that only fail together at most
    :math:`n^2 + 3n`. Two more runs try the rest of the batch, and the subset a second time.

    Args:
        size: Number of samples in the batch, which fails as a whole.
        fails: Function that runs the samples with the given indices, and returns whether they fail.

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
        rests = []
        if parts > 2:  # noqa: PLR2004 (of two halves each is the other's rest)
            rests = [[sample for sample in samples if sample not in set(piece)] for piece in pieces]
        if piece := next(filter(does_fail, pieces), None):
            samples, parts = piece, 2
        elif rest := next(filter(does_fail, rests), None):
            samples, parts = rest, max(parts - 1, 2)
        elif parts < len(samples):
            parts = min(2 * parts, len(samples))
        else:
            break
    rest = [sample for sample in range(size) if sample not in set(samples)]
    is_alone = not rest or not does_fail(rest)
    return Bisection(tuple(samples), size, runs + 1, fails(samples), is_alone)
