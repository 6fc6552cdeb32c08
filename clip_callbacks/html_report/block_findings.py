"""Findings on the blocks of a run: shares of the norm, update-to-weight ratios, blocks that do not learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from clip_callbacks.core.metric_names import GRADIENT_ZEROS
from clip_callbacks.core.wording import listed, plural
from clip_callbacks.html_report.finding import Finding
from clip_callbacks.html_report.runs import OptimizerLog
from clip_callbacks.html_report.series import Series
from clip_callbacks.html_report.vanished import silent_blocks, vanished_blocks
from clip_callbacks.stats.vanishing import MIN_STEPS
from clip_callbacks.stats.vanishing_causes import ZERO_CAUSES, describe_lost_updates, describe_rounding

DOMINANT_SHARE = 0.9
"""A block whose norm is a larger share of the total norm decides alone how all blocks are clipped."""
SMALL_SHARE = 1e-4
"""A block whose norm is a smaller share of the total norm is reported."""
USUAL_UPDATE_RATIOS = (1e-5, 1e-2)
"""Range of update-to-weight ratios that are not reported; about 1e-3 is typical."""
MANY_ZEROS = 0.5
"""Least share of exact zeros in a gradient that is reported."""
MAX_NAMED_BLOCKS = 4
"""The number of blocks that a finding names."""
TYPICAL_RATIO = "About 1e-3 is typical."


def find_in_blocks(log: OptimizerLog) -> Iterator[Finding]:
    """List the findings on the blocks of an optimizer."""
    yield from _vanished(log)
    yield from _shares(log)
    yield from _zeros(log)
    yield from _update_ratios(log)


def _shares(log: OptimizerLog) -> Iterator[Finding]:
    norms = {name: series for name, series in log.blocks().items() if series}
    if len(norms) < 2:  # noqa: PLR2004
        return
    shares = {}
    for name, series in norms.items():
        total = log.total_norm.at(series.steps)
        with np.errstate(over="ignore"):  # two numbers at either end of float64 have no finite ratio
            ratio = Series(series.steps, series.values / np.where(total > 0, total, np.nan)).finite
        if ratio:
            shares[name] = ratio.median
    largest = max(shares, key=lambda name: shares[name], default=None)
    if largest is not None and shares[largest] > DOMINANT_SHARE:
        yield Finding(
            "note",
            f"The norm of {largest} alone is {min(shares[largest], 1.0):.0%} of {log.norm.title} in the median step: a global "
            'max_norm clips all other blocks because of it. scope="layer" clips each block by its own norm.',
        )
    # an update ratio tells more: a share is small for small blocks too
    explained = {*silent_blocks(log), *log.update_ratios}
    if small := [name for name, share in shares.items() if share < SMALL_SHARE and name not in explained]:
        yield Finding(
            "note",
            f"The norm of {_listed(small)} is less than {SMALL_SHARE:g} of {log.norm.title} in the median step. A small block may "
            "well have a small norm: GradientNormMonitor(log_update_ratio=True) tells how fast each block learns.",
        )


def _update_ratios(log: OptimizerLog) -> Iterator[Finding]:
    low, high = USUAL_UPDATE_RATIOS
    medians = {name: series.median for name, series in log.update_ratios.items() if series}
    if fast := [name for name, value in medians.items() if value > high]:
        yield Finding(
            "note",
            f"The update-to-weight ratio of {_listed(fast)} is above {high:g}: the learning rate is high for them. {TYPICAL_RATIO}",
        )
    explained = vanished_blocks(log)
    if slow := [name for name, value in medians.items() if 0 < value < low and name not in explained]:
        yield Finding(
            "note", f"The update-to-weight ratio of {_listed(slow)} is below {low:g}: they hardly change. {TYPICAL_RATIO}"
        )
    if still := [name for name, value in medians.items() if value == 0 and name not in explained]:
        yield Finding(
            "warn",
            f"The update-to-weight ratio of {_listed(still)} is exactly 0 in the median step: the updates change nothing. Either "
            f"the learning rate or the gradient was 0, or the updates were rounded away. {describe_rounding()}",
        )


def _vanished(log: OptimizerLog) -> Iterator[Finding]:
    """Name the blocks that did not learn for a while, grouped by what the log tells of the cause."""
    found, zeros, silent = vanished_blocks(log), log.with_prefix(GRADIENT_ZEROS), set(silent_blocks(log))
    of_cause: dict[str, list[str]] = {}
    for name, block in found.items():
        if block.epochs:
            cause = _cause(name in silent, zeros.get(name, Series.empty()))
            epochs = plural(block.epochs, "an epoch", f"{block.epochs} epochs")
            of_cause.setdefault(cause, []).append(f"{name} ({block.share:.0%} of its entries, at the end of {epochs})")
    for cause, names in of_cause.items():
        yield Finding("warn", f"Did not learn for {MIN_STEPS} steps or more: {_listed(names)}. {cause}")
    if unexplained := [name for name, block in found.items() if not block.epochs]:
        yield Finding(
            "note",
            f"The norm of {_listed(unexplained)} is exactly 0 at all logged steps. The log does not tell whether the gradient was "
            "zero or whether there was none: frozen and unused parameters have none, and then nothing is wrong.",
        )


def _cause(is_silent: bool, zeros: Series) -> str:
    """Return a sentence about the likely causes, as far as the log tells them."""
    if is_silent or (zeros and zeros.median >= MANY_ZEROS):
        return f"The gradient was exactly zero. {ZERO_CAUSES}"
    lost = " ".join(describe_lost_updates())
    if zeros:
        return f"The gradient was not zero, but the updates were too small to change the weights. {lost}"
    return f"Either the gradient was exactly zero, or the updates were too small to change the weights. {ZERO_CAUSES} {lost}"


def _listed(names: Sequence[str]) -> str:
    return listed(names, MAX_NAMED_BLOCKS)


def _zeros(log: OptimizerLog) -> Iterator[Finding]:
    explained = vanished_blocks(log)
    medians = {name: series.median for name, series in log.with_prefix(GRADIENT_ZEROS).items() if series}
    many = {name: share for name, share in medians.items() if share >= MANY_ZEROS and name not in explained}
    if many:
        names = _listed([f"{name} ({share:.0%})" for name, share in many.items()])
        yield Finding(
            "note",
            f"At least half of the gradient of {names} is exactly zero in the median step. That is normal for embeddings and "
            "experts, of which a batch uses only some; elsewhere it hints at units that are never active.",
        )
