"""The part of one fit that GradientClipping makes: rules bound to optimizers, and the states of their limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from clip_callbacks.clipping.limit_memory import LimitMemory
from clip_callbacks.core.limit_state import NamedLimitState, StateMismatch, save_states
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
    """Part of a fit without GradientClipping: the engine measures, and clips nothing."""

    clips = False
    """If True, the fit has rules, which may clip."""
    clip_value: float | None = None
    """Largest absolute value of an entry after clipping; None for no bound."""

    def mismatch(self) -> StateMismatch:
        """Return the differences between a checkpoint and the options of this run; complete after :meth:`attach`."""
        return StateMismatch()

    def attach(self, contexts: Sequence[OptimizerContext], names: Sequence[str], *, renewed: bool) -> None:
        """Bind the rules to optimizers, before the first step or after some of them took on other parameters.

        Args:
            contexts: Optimizers that are new or hold other parameters.
            names: Names of all parameters of the module.
            renewed: If True, an optimizer changed in the middle of a fit.

        Raises:
            ValueError: If a rule's pattern matches no parameter.
        """

    def limits_norms_of(self, index: int) -> bool:
        """Return whether any limit may change the gradients of an optimizer; limits of inf only measure."""
        return False

    def rules_of(self, index: int) -> Sequence[ClipRule]:
        """Return the rules that hold for an optimizer."""
        return ()

    def shadows_of(self, index: int) -> Sequence[ClipRule]:
        """Return the shadows of an optimizer, as rules."""
        return ()

    def limit_states(self, index: int) -> ClipState:
        """Return the states of the rules' limits, then those of the shadows."""
        return ()

    def save_limit_states(self, index: int, states: ClipState) -> None:
        """Keep the states after a step for the next one."""

    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        """Return the reason why the host must decide on an optimizer's steps; None if the device may."""
        return None

    def step_metrics(self, context: OptimizerContext, report: StepRecord) -> dict[str, Tensor | float]:
        """Return the metrics of rules, and the shares of clipped steps, for a logged step."""
        return {}

    def count_metrics(self, context: OptimizerContext) -> dict[str, float]:
        """Return the counters of the run for the loggers; none here, because clipped steps are logged as shares."""
        return {}

    def charts(self, context: OptimizerContext) -> dict[str, list[str]]:
        """Return the names of the metrics in each chart, by the chart's title."""
        return {"total_norm": [TOTAL_NORM]}


class Clipper(Unclipped):
    """The rules of each optimizer in one fit, and the states of their limits.

    Args:
        rules: Rules in order.
        shadows: Limits that are evaluated on the blocks of the first rule and change no gradient.
        clip_value: Largest absolute value of an entry after clipping; None for no bound.
        saved: State from a checkpoint, as :meth:`state_dict` returned it; empty at the beginning of a run.
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
    def mismatch(self) -> StateMismatch:
        return self._memory.mismatch

    @override
    def attach(self, contexts: Sequence[OptimizerContext], names: Sequence[str], *, renewed: bool) -> None:
        if not renewed:
            # at the start only: later an optimizer may well give up the last parameter that a rule selects
            self._check(contexts, names)
        for context in contexts:
            rules = {key: _narrowed(rule, context) for key, rule in self._named_rules().items() if _holds(rule, context)}
            shadows = self._named_shadows(context)
            self._rules[context.index], self._shadows[context.index] = list(rules.values()), list(shadows.values())
            self._all_states[context.index] = self._memory.attach(context, rules, shadows, renewed=renewed)
            # a resumed history may know rules that this run no longer has
            context.history.keep_only([rule.name for rule in rules.values() if rule.name], list(shadows))

    def _check(self, contexts: Sequence[OptimizerContext], names: Sequence[str]) -> None:
        # parameters that only an optimizer knows, as outside the module, are legitimate targets too
        every_name = list(dict.fromkeys([*names, *(name for context in contexts for name in context.table.names)]))
        if not any(len(context.table) for context in contexts):
            rank_zero_warn("No optimizer holds a parameter: GradientClipping has nothing to clip.", stacklevel=2)
            return
        for rule in self._all_rules:
            # An error against all names of the module; only a warning if the parameters exist and no optimizer holds them now,
            # because an optimizer may take them on later, as in fine-tuning.
            selection_of(rule).check(every_name)
            if not any(_holds(rule, context) for context in contexts):
                rank_zero_warn(
                    f"The rule with include={rule.include!r} and exclude={rule.exclude!r} holds for no parameter that an optimizer "
                    "holds now: it clips nothing until one takes such a parameter on.",
                    stacklevel=2,
                )

    def _named_shadows(self, context: OptimizerContext) -> dict[str, ClipRule]:
        """Return the first rule with each shadow's limit in turn, by the shadow's label; none where that rule does not hold."""
        # shadows have the scope and the parameters of the first rule, so that their clip fractions compare with its own
        first = self._all_rules[0]
        if not _holds(first, context):
            return {}
        named = zip(self._all_shadows, labels(self._all_shadows), strict=True)
        return {name: _narrowed(replace(first, max_norm=limit, name=name), context) for limit, name in named}

    def _named_rules(self) -> dict[str, ClipRule]:
        """Return the rules by name. Each of several rules gets one, for its metrics; a single rule needs none."""
        if len(self._all_rules) == 1:
            (rule,) = self._all_rules
            # without a name its values are `grad/max_norm` and the like, which a report has anyway
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
        return tuple([each.state for each in self._all_states[index]])

    @override
    def save_limit_states(self, index: int, states: ClipState) -> None:
        save_states(self._all_states[index], states)

    @override
    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        table = context.table
        # On the device a fused optimizer's kernel clips, and it applies one factor (`grad_scale`) to all gradients. Shadows change
        # no gradient, and have the blocks of the first rule.
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
            charts["clip_fraction, applied and shadow limits"] = [CLIP_FRACTION, *shadows]
        return charts

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all limits."""
        return self._memory.state_dict()


def names_of(rules: Sequence[ClipRule]) -> list[str]:
    """Return the names of rules, with ``rule_1``, ``rule_2``, … by place for rules without a name."""
    return [rule.name or f"rule_{number}" for number, rule in enumerate(rules, 1)]


def _holds(rule: ClipRule, context: OptimizerContext) -> bool:
    return selection_of(rule).among(context.table.names) is not None


def _narrowed(rule: ClipRule, context: OptimizerContext) -> ClipRule:
    """Return the rule without its ``exclude`` where that matches none of an optimizer's parameters, which is no mistake there."""
    selection = selection_of(rule).among(context.table.names)
    if selection is None or selection.exclude == rule.exclude:
        return rule
    return replace(rule, exclude=None)
