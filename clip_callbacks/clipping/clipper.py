"""What clips in one fit: the part that GradientClipping makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from clip_callbacks.clipping.limit_memory import LimitMemory
from clip_callbacks.core.limit_state import Misfits, NamedLimitState
from clip_callbacks.core.limits import FixedLimit, Limit, as_limit, labels
from clip_callbacks.core.metric_names import (
    CLIP_COEF,
    CLIP_FRACTION,
    CLIPPED_NORM,
    MAX_NORM,
    RULE_CLIP_COEF,
    RULE_CLIP_FRACTION,
    RULE_MAX_NORM,
    RULE_TOTAL_NORM,
    SHADOW_CLIP_FRACTION,
    TOTAL_NORM,
)
from clip_callbacks.core.rules import ClipRule, ClipState, Stage, selection_of
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.trainer.optimizer_context import OptimizerContext


class Unclipped:
    """Measures, and clips nothing."""

    clips = False
    """Whether there is anything that may clip."""
    clip_value: float | None = None
    """The largest entry afterwards."""

    def misfits(self) -> Misfits:
        """What of a checkpoint did not fit, once met the optimizers."""
        return Misfits()

    def attach(self, contexts: Sequence[OptimizerContext], names: Sequence[str], *, renewed: bool) -> None:
        """Meet the optimizers, before the first step or after some of them took on other parameters.

        Args:
            contexts: The optimizers that are new, or hold other parameters.
            names: The names of all parameters of the module.
            renewed: Whether an optimizer changed in the middle of a fit.

        Raises:
            ValueError: If a rule's pattern matches no parameter.
        """

    def limits_norms_of(self, index: int) -> bool:
        """Whether anything limits the gradients of an optimizer, and does not only measure them."""
        return False

    def rules_of(self, index: int) -> Sequence[ClipRule]:
        """The rules that hold for an optimizer."""
        return ()

    def shadows_of(self, index: int) -> Sequence[ClipRule]:
        """The limits that are tried on it, as rules."""
        return ()

    def limit_states(self, index: int) -> ClipState:
        """The states of both."""
        return ()

    def save_limit_states(self, index: int, states: ClipState) -> None:
        """Keep them for the next step."""

    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        """Why the host must decide on steps of an optimizer, if it must."""
        return None

    def step_metrics(self, context: OptimizerContext, report: StepRecord) -> dict[str, Tensor | float]:
        """What a logged step tells of the clipping beside what its report has."""
        return {}

    def count_metrics(self, context: OptimizerContext) -> dict[str, float]:
        """What is counted over the run: clipped steps are told of as shares."""
        return {}

    def charts(self, context: OptimizerContext) -> dict[str, list[str]]:
        """By title, the metrics of each chart."""
        return {"total_norm": [TOTAL_NORM]}


class Clipper(Unclipped):
    """Holds the rules for each optimizer, and their states.

    Args:
        rules: The rules, in order.
        shadows: Limits that are tried on the blocks of the first rule, and clip nothing.
        clip_value: The largest entry afterwards; None leaves entries alone.
        saved: What :meth:`state_dict` returned, in a checkpoint; empty at the beginning of a run.
    """

    clips = True

    def __init__(
        self, rules: Sequence[ClipRule], shadows: Sequence[Limit], clip_value: float | None, saved: Mapping[str, Any]
    ) -> None:
        self._all_rules = rules
        self._all_shadows = shadows
        self.clip_value = clip_value
        self._rules: dict[int, list[ClipRule]] = {}
        self._shadows: dict[int, list[ClipRule]] = {}
        self._all_states: dict[int, list[NamedLimitState]] = {}
        self._memory = LimitMemory(saved)

    @override
    def misfits(self) -> Misfits:
        return self._memory.misfits

    @override
    def attach(self, contexts: Sequence[OptimizerContext], names: Sequence[str], *, renewed: bool) -> None:
        if not renewed:
            self._check(contexts, names)
        for context in contexts:
            rules = {key: _narrowed(rule, context) for key, rule in self._named_rules().items() if _holds(rule, context)}
            shadows = self._named_shadows(context)
            self._rules[context.index], self._shadows[context.index] = list(rules.values()), list(shadows.values())
            self._all_states[context.index] = self._memory.attach(context, rules, shadows, renewed=renewed)
            context.history.keep_only([rule.name for rule in rules.values() if rule.name], list(shadows))

    def _check(self, contexts: Sequence[OptimizerContext], names: Sequence[str]) -> None:
        every_name = list(dict.fromkeys([*names, *(name for context in contexts for name in context.table.names)]))
        if not any(len(context.table) for context in contexts):
            rank_zero_warn("No optimizer holds a parameter: GradientClipping has nothing to clip.", stacklevel=2)
            return
        for rule in self._all_rules:
            selection_of(rule).check(every_name)
            if not any(_holds(rule, context) for context in contexts):
                which = f"all but {rule.exclude!r}" if rule.include is None else repr(rule.include)
                rank_zero_warn(f"The rule for {which} holds for no parameter that an optimizer holds now.", stacklevel=2)

    def _named_shadows(self, context: OptimizerContext) -> dict[str, ClipRule]:
        """By their labels: the first rule with other limits, where it holds."""
        first = self._all_rules[0]
        if not _holds(first, context):
            return {}
        named = zip(self._all_shadows, labels(self._all_shadows), strict=True)
        return {name: _narrowed(replace(first, max_norm=limit, name=name), context) for limit, name in named}

    def _named_rules(self) -> dict[str, ClipRule]:
        """By their names, which each of several rules needs for its metrics."""
        if len(self._all_rules) == 1:
            (rule,) = self._all_rules
            return {names_of(self._all_rules)[0]: rule}
        return {name: replace(rule, name=name) for name, rule in zip(names_of(self._all_rules), self._all_rules, strict=True)}

    @override
    def limits_norms_of(self, index: int) -> bool:
        limits = [as_limit(rule.max_norm) for rule in self._rules[index]]
        return self.clip_value is not None or any(limit != FixedLimit(math.inf) for limit in limits)

    @override
    def rules_of(self, index: int) -> list[ClipRule]:
        return self._rules[index]

    @override
    def shadows_of(self, index: int) -> list[ClipRule]:
        return self._shadows[index]

    @override
    def limit_states(self, index: int) -> ClipState:
        return tuple([held.state for held in self._all_states[index]])

    @override
    def save_limit_states(self, index: int, states: ClipState) -> None:
        for held, after in zip(self._all_states[index], states, strict=True):
            held.state = after

    @override
    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        table = context.table
        if self.clip_value is None and all(Stage.of(rule, table).partition.is_whole for rule in self.rules_of(context.index)):
            return None
        return "a `clip_value`, or a rule with local norms, gives the gradients more than one factor"

    @override
    def step_metrics(self, context: OptimizerContext, report: StepRecord) -> dict[str, Tensor | float]:
        return {**report.rule_metrics(), **context.history.fractions()}

    @override
    def charts(self, context: OptimizerContext) -> dict[str, list[str]]:
        charts = {
            "total_norm, clipped_norm, max_norm": [TOTAL_NORM, CLIPPED_NORM, MAX_NORM],
            "clip_coef, clip_fraction": [CLIP_COEF, CLIP_FRACTION],
        }
        for name in (rule.name for rule in self.rules_of(context.index) if rule.name):
            charts[f"{name}: total_norm, max_norm"] = [RULE_TOTAL_NORM.format(name), RULE_MAX_NORM.format(name)]
            charts[f"{name}: clip_coef, clip_fraction"] = [RULE_CLIP_COEF.format(name), RULE_CLIP_FRACTION.format(name)]
        shadows = [SHADOW_CLIP_FRACTION.format(rule.name) for rule in self.shadows_of(context.index)]
        if shadows:
            charts["clip_fraction, in force and of shadows"] = [CLIP_FRACTION, *shadows]
        return charts

    def state_dict(self) -> dict[str, Any]:
        """The states of all limits."""
        return self._memory.state_dict()


def names_of(rules: Sequence[ClipRule]) -> list[str]:
    """The names of rules: their own, or those of their places."""
    return [rule.name or f"rule_{number}" for number, rule in enumerate(rules, 1)]


def _holds(rule: ClipRule, context: OptimizerContext) -> bool:
    return selection_of(rule).among(context.table.names) is not None


def _narrowed(rule: ClipRule, context: OptimizerContext) -> ClipRule:
    """The rule for an optimizer that may hold none of what is excluded."""
    selection = selection_of(rule).among(context.table.names)
    if selection is None or selection.exclude == rule.exclude:
        return rule
    return replace(rule, exclude=None)
