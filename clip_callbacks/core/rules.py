"""Clipping rules, and the plan that binds the rules of one step to the parameters of one optimizer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import is_
from typing import NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch

from clip_callbacks.core.blocks import SCOPES, Partition, Scope, Selection, unknown_scope
from clip_callbacks.core.limits import FixedLimit, Limit, LimitOfOne, LimitState, MaxNorm, as_limit, initial_state
from clip_callbacks.core.measurement import MeasurementSpec
from clip_callbacks.core.tensor_table import TensorTable

RESERVED_NAMES = {
    *("total_norm", "clipped_norm", "clip_coef", "max_norm", "clip_fraction", "clip_fraction_epoch", "skipped_steps"),
    *("total_norm_p50", "total_norm_p90", "total_norm_p99", "amp_scale", "accumulation_scale", "noise_scale"),
    *("shadow_clip_fraction", "shadow_clip_fraction_epoch"),
    *("overflowed_steps", "zeroed_steps", "dropped_micro_batches", "rollbacks", "spikes"),
    *("reported_steps", "loss", "loss_limit"),
}
"""Names that no rule may have. The metrics of a rule are called "grad/<name>/…", and some loggers make a folder of each part of a
name: "grad/total_norm" cannot be a metric and a folder."""

ClipState: TypeAlias = tuple[LimitState | LimitOfOne, ...]
"""States of all limits of a step: one for each rule, then one for each shadow, then those of ``skip_above`` and ``loss_above``. A
guard holds the latter in numbers of Python where it can."""


@dataclass(frozen=True)
class ClipRule:
    r"""One stage of clipping: a selection of parameters, the blocks that they form, and the limit for each block's norm.

    .. math::
        g \leftarrow g \cdot \min\Bigl(1, \frac{\ell_b}{n_b}\Bigr)

    for all gradients g in block b, with the p-norm :math:`n_b` of the block and its limit :math:`\ell_b`. Under a fixed limit 1e-6
    is added to the norm, as in torch. Gradients of parameters that are not selected are left alone.

    Args:
        max_norm: Limit in the unit of the gradients: a number above 0, a :class:`Limit`, or None (or inf) to measure and change
            nothing.
        scope: Gradient entries that share one norm: "global" (all that the rule selects), "group" (an optimizer's parameter group),
            "layer" (the parameters that one module owns directly), "parameter" (one tensor) or "unit" (one output row).
        include: Regular expression; the rule holds for parameters in whose name ``re.search`` finds it. None selects all.
        exclude: Regular expression; the rule does not hold for parameters in whose name ``re.search`` finds it.
        name: Name of the rule in metrics, ``grad/<name>/…``; None names each of several rules by its place, ``rule_1`` and so on.

    Raises:
        ValueError: If the limit is not above 0, the scope is unknown, a pattern is not a regular expression, or the name is that of
            another metric.

    Example::

        >>> ClipRule(0.1, scope="parameter", include=r"^decoder\.", exclude="bias$").max_norm
        0.1
    """

    max_norm: MaxNorm = 1.0
    scope: Scope = "global"
    include: str | None = field(default=None, kw_only=True)
    exclude: str | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check every argument."""
        # Checked where the user writes the rule, and not converted: the rule shows what was written.
        as_limit(self.max_norm)
        if self.scope not in SCOPES:
            raise ValueError(unknown_scope(self.scope))
        selection_of(self)
        is_name = isinstance(self.name, str) and re.fullmatch(r"\w[\w.-]*", self.name) and self.name not in RESERVED_NAMES
        if self.name is not None and not is_name:
            raise ValueError(
                f"`name` must consist of letters, digits, `_`, `-` and `.`, and not be that of another metric, got {self.name!r}: "
                "the rule's metrics are called by it."
            )


def check_rules(rules: object) -> None:
    """Check the value of an argument ``rules``.

    Raises:
        TypeError: If it is not a list, or another sequence, of rules.
        ValueError: If two rules have the same name.
    """
    if not isinstance(rules, Sequence) or not all(isinstance(rule, ClipRule) for rule in rules):
        raise TypeError(f"`rules` must be a list of ClipRule, got {rules!r}.")
    check_names([rule.name for rule in rules if rule.name is not None])


def check_names(names: Sequence[str]) -> None:
    """Check that the names of rules differ.

    Raises:
        ValueError: If two names are equal.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"`name` must differ between rules, got {', '.join(names)}: metrics are called by it.")


def check_shadow(shadow: object) -> None:
    """Check the value of an argument ``shadow``, but for the limits in it.

    Raises:
        TypeError: If it is not None, a list, or another sequence.
    """
    # a string is a sequence too, of numbers perhaps
    if shadow is not None and (not isinstance(shadow, Sequence) or isinstance(shadow, str)):
        raise TypeError(f"`shadow` must be a list of limits and numbers, got {shadow!r}.")


def selection_of(rule: ClipRule) -> Selection:
    """Return the selection of parameters that a rule holds for.

    Raises:
        ValueError: If a pattern of the rule is not a regular expression.
    """
    return Selection(rule.include, rule.exclude)


class SpikeLimits(NamedTuple):
    """Limits above which a finite step is a spike.

    Args:
        skip_above: Limit of the total norm; None for none.
        loss_above: Limit of the window's loss; None for none.
        both: If True, a step is a spike only if it is above both limits; else one of them is enough.
    """

    skip_above: MaxNorm = None
    loss_above: Limit | None = None
    both: bool = False


NO_SPIKE_LIMITS = SpikeLimits()
"""Limits of a step that is never a spike."""


@dataclass(frozen=True)
class Stage:
    """A rule bound to the parameters of one optimizer.

    Args:
        limit: Limit of the rule; None if every norm passes.
        partition: Blocks of the rule.
        weight_positions: Positions in the table of the parameters whose own norms the limit needs.
        name: Name of the rule.
    """

    limit: Limit | None
    partition: Partition
    weight_positions: tuple[int, ...] = ()
    name: str | None = None

    @classmethod
    def of(cls, rule: ClipRule, table: TensorTable, *, by_unit: bool = False) -> Stage:
        """Bind a rule to the parameters of one optimizer.

        Args:
            rule: The rule.
            table: The parameters.
            by_unit: If True, the step measures the norms of units, and the partition is one of units.

        Raises:
            ValueError: If a pattern of the rule matches no parameter.
        """
        stated, selection = as_limit(rule.max_norm), selection_of(rule)
        # A limit of inf is left out, so that a rule that only measures computes no coefficients.
        limit = None if stated == FixedLimit(math.inf) else stated
        # weights are read only for limits that look at them: it is one more read of the parameters
        positions = table.positions(selection) if limit is not None and limit.uses_weights else ()
        return cls(limit, table.partition(rule.scope, selection, by_unit=by_unit), positions, rule.name)

    def init(self) -> LimitState:
        """Return the state of the limit before the first step."""
        if self.limit is None:
            return {}
        with torch.device("cpu"):  # where norms are read, whatever torch's default device is
            return initial_state(self.limit, len(self.partition.names))


@dataclass(frozen=True)
class Plan:
    """Everything that decides about one step, bound to the parameters of one optimizer.

    Args:
        rules: Stages that clip, in order.
        shadows: Stages that are evaluated and change no gradient.
        by_unit: If True, the norms of units are measured, because some scope is "unit".
        skip_above: Stage whose limit is the largest total norm of a step that is no spike; None for no limit.
        loss_above: Stage whose limit is the largest loss of a step that is no spike; None for no limit.
        both: If True, a spike is above both of them; else above one.
    """

    rules: tuple[Stage, ...]
    shadows: tuple[Stage, ...]
    by_unit: bool = False
    skip_above: Stage | None = None
    loss_above: Stage | None = None
    both: bool = False

    @classmethod
    def of(
        cls,
        table: TensorTable,
        rules: Sequence[ClipRule],
        shadows: Sequence[ClipRule],
        spikes: SpikeLimits = NO_SPIKE_LIMITS,
    ) -> Plan:
        """Bind rules to parameters. The last plan of each table is cached and returned again for the same rules.

        Args:
            table: The parameters.
            rules: Rules that clip, in order.
            shadows: Rules that change no gradient.
            spikes: Limits above which a finite step is a spike.
        """
        if table.awaited:
            table.renew()
        # Compared by identity, which costs less than equality and holds at every step of a loop that keeps its rules. The list of
        # awaited parameters is another one once the table is renewed.
        key = (*rules, None, *shadows, None, *spikes, table.awaited)
        cached = _LAST_PLANS.get(table)
        if cached is not None and len(cached[0]) == len(key) and all(map(is_, cached[0], key)):
            return cached[1]
        # only here: rules of a plan that is known were checked when it was made
        check_rules(rules)
        # One rule of scope "unit" is enough to measure units for all: norms of larger blocks follow from theirs, so that gradients
        # are still read once.
        by_unit = any(rule.scope == "unit" for rule in (*rules, *shadows))

        def bind(rule: ClipRule) -> Stage:
            return Stage.of(rule, table, by_unit=by_unit)

        skip_above = None if spikes.skip_above is None else bind(ClipRule(as_limit(spikes.skip_above, "skip_above")))
        loss_above = None if spikes.loss_above is None else bind(ClipRule(spikes.loss_above))
        plan = cls(tuple(map(bind, rules)), tuple(map(bind, shadows)), by_unit, skip_above, loss_above, spikes.both)
        # One plan a table: a loop has one set of rules. The plan holds partitions and not the table, or the entry would never go.
        _LAST_PLANS[table] = key, plan
        return plan

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All stages in the order of their states."""
        thresholds = [stage for stage in (self.skip_above, self.loss_above) if stage is not None]
        return (*self.rules, *self.shadows, *thresholds)

    @cached_property
    def count_of_clipping(self) -> int:
        """Count of the states of rules and shadows; those of ``skip_above`` and ``loss_above`` come after them."""
        return len(self.rules) + len(self.shadows)

    @cached_property
    def spec(self) -> MeasurementSpec:
        """Specification of the norms that the stages need."""
        positions = tuple(sorted({position for stage in self.stages for position in stage.weight_positions}))
        # Norms of single parameters must be reliable one by one only if some stage looks at less than the whole gradient.
        is_local = not all(stage.partition.is_whole for stage in self.stages)
        return MeasurementSpec(local=is_local, by_unit=self.by_unit, weights=positions)

    @cached_property
    def remembers(self) -> bool:
        """If True, at least one limit has a state."""
        return any(self._shapes)

    @cached_property
    def _shapes(self) -> tuple[dict[str, torch.Size], ...]:
        return tuple({key: value.shape for key, value in stage.init().items()} for stage in self.stages)

    def init(self) -> ClipState:
        """Return the states before the first step."""
        if not self.remembers:  # a plain loop with fixed limits may ask for them at every step
            return tuple([{} for _ in self.stages])
        return tuple(stage.init() for stage in self.stages)

    def parts(self, state: ClipState) -> tuple[ClipState, ClipState, ClipState]:
        """Split a state into those of the rules, of the shadows, and of ``skip_above`` and ``loss_above``.

        Args:
            state: States of all stages, as :meth:`init` or the last step returned them.

        Raises:
            TypeError: If it is not a tuple or list.
            ValueError: If it belongs to other rules.
        """
        # A max_norm lands here if the call is written like torch's clip_grad_norm_, whose second argument it is.
        if not isinstance(state, (tuple, list)):
            raise TypeError(
                f"`state` must be what the last call returned, or None before the first, got {state!r}. Pass a limit by "
                "name: clip_step(parameters, max_norm=1.0)."
            )
        if len(state) != len(self.stages):
            raise ValueError(
                f"`state` must hold one entry for each of {len(self.stages)} rules, shadows and skip_above, got {len(state)}: pass "
                "what the last call returned."
            )
        # of rules without memory there is nothing to compare
        if self.remembers or any(state):
            self._check(state)
        first_shadow, end = len(self.rules), self.count_of_clipping
        return state[:first_shadow], state[first_shadow:end], state[end:]

    def _check(self, state: ClipState) -> None:
        for held, shapes in zip(state, self._shapes, strict=True):
            if not isinstance(held, dict):  # never a user's: it was made for this stage
                continue
            if len(held) != len(shapes) or any(getattr(held.get(key), "shape", None) != shape for key, shape in shapes.items()):
                raise ValueError(
                    f"`state` must be that of these rules, got tensors of shapes {[tuple(it.shape) for it in held.values()]} for "
                    f"{[tuple(shape) for shape in shapes.values()]}: pass what the last call with them returned, or None once a "
                    "parameter has got other rows."
                )


_LAST_PLANS: WeakKeyDictionary[TensorTable, tuple[tuple[object, ...], Plan]] = WeakKeyDictionary()
"""The last plan of each table, with the rules that it was made from."""
