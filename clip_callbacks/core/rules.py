"""Rules: which parameters are held to which limit, alone and all of a step's together."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import is_
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch

from clip_callbacks.core.blocks import SCOPES, Partition, Scope, Selection, unknown_scope
from clip_callbacks.core.limits import FixedLimit, Limit, LimitState, MaxNorm, as_limit
from clip_callbacks.core.measurement import MeasurementSpec
from clip_callbacks.core.tensor_table import TensorTable

TAKEN = {
    *("total_norm", "clipped_norm", "clip_coef", "max_norm", "clip_fraction", "clip_fraction_epoch", "skipped_steps"),
    *("total_norm_p50", "total_norm_p90", "total_norm_p99", "amp_scale", "accumulation_scale", "noise_scale"),
    *("shadow_clip_fraction", "shadow_clip_fraction_epoch"),
    *("overflowed_steps", "zeroed_steps", "dropped_micro_batches", "rollbacks"),
}
"""Names under "grad/" that other metrics have: some loggers make folders of names."""

ClipState: TypeAlias = tuple[LimitState, ...]
"""The states of the limits of a step: of each rule, of each shadow, of ``skip_above``."""


@dataclass(frozen=True)
class ClipRule:
    r"""One stage of clipping: parameters, how they form blocks, and the limit for each block's norm.

    Args:
        max_norm: The limit: a number above 0, a :class:`Limit`, or None (or inf) to measure and change nothing.
        scope: Which entries share one norm: "global", "group", "layer", "parameter" or "unit".
        params: A regular expression; the rule holds for parameters in whose name ``re.search`` finds it. None: for all.
        exclude: A regular expression; the rule does not hold for parameters in whose name ``re.search`` finds it.
        name: What the rule's metrics are called; None: by its place, ``rule_1`` and so on.

    Raises:
        ValueError: If the limit is not above 0, the scope is unknown, or a pattern is no regular expression.

    Example::

        >>> [ClipRule(1.0), ClipRule(0.1, scope="parameter", params=r"^decoder\.")][1].params
        '^decoder\\.'
    """

    max_norm: MaxNorm = 1.0
    scope: Scope = "global"
    params: str | None = None
    exclude: str | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check every argument."""
        as_limit(self.max_norm)
        if self.scope not in SCOPES:
            raise ValueError(unknown_scope(self.scope))
        _ = self.selection
        is_name = isinstance(self.name, str) and re.fullmatch(r"\w[\w.-]*", self.name) and self.name not in TAKEN
        if self.name is not None and not is_name:
            raise ValueError(
                f"`name` must consist of letters, digits, `_`, `-` and `.`, and not be that of another metric, got {self.name!r}: "
                "the rule's metrics are called by it."
            )

    @cached_property
    def selection(self) -> Selection:
        """Which parameters it holds for."""
        return Selection(self.params, self.exclude)

    def stage(self, table: TensorTable, *, by_unit: bool = False) -> Stage:
        """The rule bound to the parameters of one optimizer.

        Args:
            table: The parameters.
            by_unit: Whether the norms that are measured will be those of units.
        """
        limit = self._limit
        weighed = table.positions(self.selection) if limit is not None and limit.uses_weights else ()
        return Stage(limit, table.partition(self.scope, self.selection, by_unit=by_unit), weighed, self.name)

    @cached_property
    def _limit(self) -> Limit | None:
        limit = as_limit(self.max_norm)
        return None if limit == FixedLimit(math.inf) else limit


@dataclass(frozen=True)
class Stage:
    """A rule bound to parameters.

    Args:
        limit: None lets every norm pass.
        partition: The blocks.
        weighed: Positions of the parameters whose own norms the limit asks for.
        name: Of the rule.
    """

    limit: Limit | None
    partition: Partition
    weighed: tuple[int, ...] = ()
    name: str | None = None

    def init(self) -> LimitState:
        """State before the first step."""
        return self.limit.init(len(self.partition.names)) if self.limit else {}


@dataclass(frozen=True)
class Plan:
    """All that a step decides, bound to parameters.

    Args:
        rules: What clips, in order.
        shadows: What would clip.
        skip_above: What skips a finite step, if anything does.
        by_unit: Whether units are measured, since a scope asks for them.
    """

    rules: tuple[Stage, ...]
    shadows: tuple[Stage, ...]
    skip_above: Stage | None
    by_unit: bool

    @classmethod
    def of(cls, table: TensorTable, rules: Sequence[ClipRule], shadows: Sequence[ClipRule], skip_above: MaxNorm) -> Plan:
        """Bind rules to parameters; the last plan of a table is kept, for the next step with the same rules."""
        asked = (*rules, None, *shadows, None, skip_above)
        known = _LAST.get(table)
        if known is not None and len(known[0]) == len(asked) and all(map(is_, known[0], asked)):
            return known[1]
        by_unit = any(rule.scope == "unit" for rule in (*rules, *shadows))
        ceiling = None if skip_above is None else ClipRule(skip_above).stage(table, by_unit=by_unit)
        stages, shades = (tuple(rule.stage(table, by_unit=by_unit) for rule in some) for some in (rules, shadows))
        plan = cls(stages, shades, ceiling, by_unit)
        _LAST[table] = asked, plan
        return plan

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All of them, in the order of their states."""
        ceiling = () if self.skip_above is None else (self.skip_above,)
        return (*self.rules, *self.shadows, *ceiling)

    @cached_property
    def count_of_clipping(self) -> int:
        """How many states are those of rules and shadows; that of ``skip_above`` comes last."""
        return len(self.rules) + len(self.shadows)

    @cached_property
    def spec(self) -> MeasurementSpec:
        """What the stages need to know of the gradients."""
        weighed = {stage.weighed for stage in self.stages if stage.weighed}
        positions = tuple(sorted(set().union(*weighed)))
        is_local = not all(stage.partition.is_whole for stage in self.stages)
        return MeasurementSpec(local=is_local, by_unit=self.by_unit, weights=positions)

    @cached_property
    def remembers(self) -> bool:
        """Whether any limit has a state."""
        return any(self._shapes)

    @cached_property
    def _shapes(self) -> tuple[dict[str, torch.Size], ...]:
        return tuple({key: value.shape for key, value in held.items()} for held in self.init())

    def init(self) -> ClipState:
        """States before the first step."""
        return tuple(stage.init() for stage in self.stages)

    def parts(self, state: ClipState) -> tuple[ClipState, ClipState, ClipState]:
        """The states of the rules, of the shadows, and of ``skip_above``.

        Raises:
            TypeError: If it is no such state.
            ValueError: If they are of other rules.
        """
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
        for held, shapes in zip(state, self._shapes, strict=True) if any(state) or self.remembers else ():
            if len(held) != len(shapes) or any(getattr(held.get(key), "shape", None) != shape for key, shape in shapes.items()):
                raise ValueError(
                    f"`state` must be that of these rules, got tensors of shapes {[tuple(it.shape) for it in held.values()]} for "
                    f"{[tuple(shape) for shape in shapes.values()]}: pass what the last call with them returned."
                )
        rules, both = len(self.rules), self.count_of_clipping
        return state[:rules], state[rules:both], state[both:]


_LAST: WeakKeyDictionary[TensorTable, tuple[tuple[object, ...], Plan]] = WeakKeyDictionary()
