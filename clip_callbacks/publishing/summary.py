"""The table at the end of fit: what the steps were like, and what would have been clipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from clip_callbacks.core.decisions import Outcome
from clip_callbacks.core.metric_names import PERCENTILES
from clip_callbacks.stats.norm_history import Spans
from clip_callbacks.trainer.optimizer_context import OptimizerContext

LEAST_STEPS = 100
"""After a fit of fewer steps there is no table: p99 would be the largest norm, and who fits hundreds of times fits briefly."""

HEADERS = ("", "steps", "skipped", "clipped", "total_norm p50", *(f"p{percent}" for percent in list(PERCENTILES)[1:]), "max_norm")


def summary_table(
    contexts: Sequence[OptimizerContext], *, clips: bool, skipped_steps_of: Callable[[int], int | None]
) -> str | None:
    """A row for each optimizer, and below it one for each named rule and each shadow limit; None if the fit was too short.

    Columns that nobody fills, as without a guard or a limit, are left out.

    Args:
        contexts: The optimizers.
        clips: Whether there is anything that may clip.
        skipped_steps_of: How many steps of an optimizer were skipped, by its number; None if nobody counts.
    """
    if not any(context.steps >= LEAST_STEPS for context in contexts):
        return None
    from tabulate import tabulate  # a tenth of what the import of this package takes

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
        _share(history.clips) if clips else "",
        *map(_number, history.run_percentiles()),
        _number(max_norm),
    ]


def _rows_of_limits(context: OptimizerContext) -> list[list[str]]:
    history, last = context.history, context.history.last
    rules: Sequence[Outcome] = ()
    shadows: Sequence[Outcome] = ()
    if last:
        rules, shadows = last.outcomes, last.shadows
    return [
        [f"- {what}{name}", "", "", _share(spans), *[""] * len(PERCENTILES), limits.get(name, "")]
        for what, counted, limits in (
            ("", history.rules, _limits(rules)),
            ("would clip: ", history.shadows, _limits(shadows)),
        )
        for name, spans in counted.items()
    ]


def _limits(outcomes: Sequence[Outcome]) -> Mapping[str, str]:
    """The lowest limit of each outcome with a name."""
    named = {outcome.name: outcome.limits for outcome in outcomes if outcome.name}
    return {name: _number(_lowest(limits)) for name, limits in named.items()}


def _lowest(limits: Tensor | float) -> float:
    if isinstance(limits, float):
        return limits
    return float(limits.amin())


def _share(spans: Spans) -> str:
    if not spans.run.steps:
        return ""
    return f"{spans.run.fraction:.1%}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return f"{value:.3g}"
