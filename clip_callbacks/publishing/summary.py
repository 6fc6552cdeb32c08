"""The table at the end of fit: numbers of steps, norms, and clip fractions of rules and shadow limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from clip_callbacks.core.decisions import Outcome
from clip_callbacks.core.metric_names import PERCENTILES
from clip_callbacks.stats.run_history import ClipCounts
from clip_callbacks.trainer.optimizer_context import OptimizerContext

MIN_STEPS_FOR_TABLE = 100
"""Least number of optimizer steps of a fit with a table: in a shorter one p99 would be the largest norm, and programs
with hundreds of fits, which would print hundreds of tables, have short ones."""

HEADERS = ("", "steps", "skipped", "clipped", "total_norm p50", *(f"p{percent}" for percent in list(PERCENTILES)[1:]), "max_norm")


def summary_table(
    contexts: Sequence[OptimizerContext], *, clips: bool, skipped_steps_of: Callable[[int], int | None]
) -> str | None:
    """Return a table with a row for each optimizer, followed by a row for each of its named rules and shadow limits.

    Columns without an entry are omitted, as that of skipped steps without a guard.

    Args:
        contexts: The optimizers.
        clips: If True, a callback may clip gradients.
        skipped_steps_of: Function from the number of an optimizer to its number of skipped steps; None where they are not counted.

    Returns:
        The table; None if the fit was too short.
    """
    if not any(context.steps >= MIN_STEPS_FOR_TABLE for context in contexts):
        return None
    from tabulate import tabulate  # here, since it is a tenth of the time that importing this package takes

    rows = []
    for context in contexts:
        rows += [_row(context, skipped_steps_of(context.index), clips=clips), *_rows_of_limits(context)]
    filled = [place for place in range(len(HEADERS)) if place == 0 or any(row[place] for row in rows)]
    cells = [[row[place] for place in filled] for row in rows]
    alignment = ["left", *["right"] * (len(filled) - 1)]
    return tabulate(cells, [HEADERS[place] for place in filled], "simple", disable_numparse=True, colalign=alignment)


def _row(context: OptimizerContext, skipped: int | None, *, clips: bool) -> list[str]:
    history = context.history
    max_norm = math.inf if history.last is None else float(history.last.max_norm)
    name = context.suffix[1:] or type(context.optimizer).__name__
    return [
        name,
        str(history.steps),
        "" if skipped is None else str(skipped),
        _percent(history.clips) if clips else "",
        *map(_number, history.run_percentiles()),
        _number(max_norm),
    ]


def _rows_of_limits(context: OptimizerContext) -> list[list[str]]:
    history, last = context.history, context.history.last
    rules: Sequence[Outcome] = ()
    shadows: Sequence[Outcome] = ()
    if last:
        rules, shadows = last.outcomes, last.shadows
    rows = []
    for prefix, counted, outcomes in (("", history.rules, rules), ("would clip: ", history.shadows, shadows)):
        limits = {outcome.name: _number(_lowest(outcome.limits)) for outcome in outcomes if outcome.name}
        for name, counts in counted.items():
            rows.append([f"- {prefix}{name}", "", "", _percent(counts), *[""] * len(PERCENTILES), limits.get(name, "")])
    return rows


def _lowest(limits: Tensor | float) -> float:
    if isinstance(limits, float):
        return limits
    return float(limits.amin())


def _percent(counts: ClipCounts) -> str:
    if not counts.steps:
        return ""
    return f"{counts.fraction:.1%}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return f"{value:.3g}"
