r"""Rules: which blocks are held to which limit, and the coefficients that follow.

.. math::
    c_b = \min\Bigl(1, \frac{\ell_b}{n_b + 10^{-6}}\Bigr)

Rules run in order, all from one read: after coefficients :math:`c` the norms are :math:`c \cdot n`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from clip_callbacks.blocks import SCOPES, Partition, Scope, unknown_scope
from clip_callbacks.limits import FixedLimit, Limit, LimitState, MaxNorm, as_max_norm
from clip_callbacks.norms import Measurement, block_norms
from clip_callbacks.parameters import ParameterTable

EPS = 1e-6
"""Added to a norm before the division, as ``torch.nn.utils.clip_grad_norm_`` does."""

CLEARLY = 1.0 - 1e-6
"""Below this share of the limit no rounding in float32 makes a coefficient less than 1: the division may be left out."""

ClipState: TypeAlias = tuple[LimitState, ...]
"""The state of a list of rules: one limit state for each."""


@dataclass(frozen=True)
class ClipRule:
    r"""One stage of clipping: parameters, how they form blocks, and the limit for each block's norm.

    Args:
        max_norm: The limit: a number above 0, a :class:`Limit`, or None (or inf) to measure and change nothing.
        scope: Which entries share one norm: "global", "group", "layer" or "parameter".
        params: A regular expression; the rule holds for parameters in whose name ``re.search`` finds it. None: for all.

    Raises:
        ValueError: If the limit is not above 0, the scope is unknown, or ``params`` is no regular expression.

    Example::

        >>> [ClipRule(1.0), ClipRule(0.1, scope="parameter", params=r"^decoder\.")][1].params
        '^decoder\\.'
    """

    max_norm: MaxNorm = 1.0
    scope: Scope = "global"
    params: str | None = None

    def __post_init__(self) -> None:
        """Check every argument."""
        _as_limit(self.max_norm)
        if self.scope not in SCOPES:
            raise ValueError(unknown_scope(self.scope))
        try:
            re.compile(self.params or "")
        except (re.error, TypeError) as error:
            raise ValueError(f"`params` must be a regular expression, got {self.params!r}: {error}.") from error

    def stage(self, table: ParameterTable) -> Stage:
        """The rule bound to the parameters of one optimizer."""
        return Stage(self._limit, table.partition(self.scope, self.params))

    @cached_property
    def _limit(self) -> Limit | None:
        return _as_limit(self.max_norm)


@dataclass(frozen=True)
class Stage:
    """A rule bound to parameters.

    Args:
        limit: None lets every norm pass.
        partition: The blocks.
    """

    limit: Limit | None
    partition: Partition

    def init(self) -> LimitState:
        """State before the first step."""
        return self.limit.init(len(self.partition.names)) if self.limit else {}


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one stage found and decided.

    Args:
        names: Of the B blocks.
        norms: Of the blocks as the stage met them, shape ``(B,)``.
        limits: For them, shape ``(B,)`` or one number.
        coefficients: Shape ``(B,)``, or 0-dim if there is one, in [0, 1]; exactly 1 where nothing is clipped.
        clips: Whether any coefficient is below 1; of a deferred step, whether any may be.
    """

    names: tuple[str, ...]
    norms: Tensor
    limits: Tensor | float
    coefficients: Tensor
    clips: bool


def coefficients(norms: Tensor, limits: Tensor | float, *, deferred: bool = False) -> tuple[Tensor, bool]:
    """The one division of the package: limits into coefficients.

    Args:
        norms: Shape ``(B,)``. A block whose norm is 0 or not finite gets 1: such a norm never scales a gradient.
        limits: Shape ``(B,)`` or one number.
        deferred: Whether nothing is to be read on the host.

    Returns:
        Coefficients of shape ``(B,)``, or 0-dim if there is one; and whether any is below 1, or, of a deferred step, may be.
    """
    if not deferred and isinstance(limits, float) and len(norms) == 1:
        coefficient = _coefficient(norms.tolist()[0], limits, norms.dtype)
        return (norms.new_tensor(coefficient), True) if coefficient < 1.0 else (_ones(norms), False)
    on_host: list[float] = [] if deferred else norms.tolist()
    if not deferred and isinstance(limits, float) and max(on_host, default=0.0) + EPS <= limits * CLEARLY:
        return _ones(norms), False
    # reciprocal, then product: the two roundings of `max_norm / (total_norm + 1e-6)` in torch, for the same bits
    ratios = (norms + EPS).reciprocal() * limits
    if not deferred:
        if min(ratios.tolist(), default=1.0) >= 1.0:
            return _ones(norms), False
        if min(on_host) > 0.0 and math.isfinite(sum(on_host)):
            return ratios.clamp(max=1.0), True
    limited = torch.where((norms > 0) & (norms < math.inf), ratios, 1.0).clamp(max=1.0)
    return limited, deferred or any(coefficient < 1.0 for coefficient in limited.tolist())


def _coefficient(norm: float, limit: float, dtype: torch.dtype) -> float:
    """The same on the host, each operation rounded to the dtype as torch rounds it: most steps need no tensor at all."""
    if not 0.0 < norm < math.inf:
        return 1.0
    if dtype is torch.float64:
        return 1.0 / (norm + EPS) * limit
    return _float32(_float32(1.0 / _float32(norm + _float32(EPS))) * _float32(limit))


def _float32(number: float) -> float:
    return c_float(number).value


def decide(
    stages: Sequence[Stage], measured: Measurement, norm_type: float, state: ClipState
) -> tuple[tuple[Outcome, ...], Tensor | None, ClipState]:
    """Run the stages in order on the norms of one step.

    Returns:
        The outcome of each stage; the product of their coefficients for each parameter, shape ``(N,)``, or of one entry
        if it is one for all, or None if all are 1; and the state after, which is the state before if any norm was not finite.
    """
    outcomes: list[Outcome] = []
    after: list[LimitState] = []
    factors: Tensor | None = None
    for stage, held in zip(stages, state, strict=True):
        before = {key: value.to(measured.total.device) for key, value in held.items()} if held else held
        outcome = _outcome(stage, _norms_after(factors, stage.partition, measured, norm_type), before, measured)
        outcomes.append(outcome)
        after.append(_observed(stage, outcome, before, measured))
        if outcome.clips:
            spread = stage.partition.spread(outcome.coefficients)
            factors = spread if factors is None else factors * spread
    return tuple(outcomes), factors, tuple(after)


def _norms_after(factors: Tensor | None, partition: Partition, measured: Measurement, norm_type: float) -> Tensor:
    if partition.is_whole and measured.is_deferred:
        return measured.total if factors is None else measured.total * factors
    if factors is not None:
        return block_norms(measured.norms * factors, partition, norm_type)
    return measured.total if partition.is_whole else block_norms(measured.norms, partition, norm_type)


def describe(stages: Sequence[Stage], measured: Measurement, norm_type: float) -> tuple[Outcome, ...]:
    """Outcomes of a step that is skipped: the blocks' norms, nothing decided."""
    unlimited = [Stage(None, stage.partition) for stage in stages]
    return decide(unlimited, measured, norm_type, tuple({} for _ in unlimited))[0]


def _outcome(stage: Stage, norms: Tensor, state: LimitState, measured: Measurement) -> Outcome:
    names = stage.partition.names
    if stage.limit is None:
        return Outcome(names, norms, math.inf, _ones(norms), clips=False)
    may_be_bad = measured.is_deferred or not measured.is_finite
    limits = stage.limit.limits(norms.nan_to_num(0.0, 0.0, 0.0) if may_be_bad else norms, state)
    return Outcome(names, norms, limits, *coefficients(norms, limits, deferred=measured.is_deferred))


def _observed(stage: Stage, outcome: Outcome, state: LimitState, measured: Measurement) -> LimitState:
    """State after the step: what it was before, if any norm was not finite."""
    if stage.limit is None or not state or not (measured.is_deferred or measured.is_finite):
        return state
    clipped = outcome.norms * outcome.coefficients
    if not measured.is_deferred:
        return stage.limit.observe(clipped, state)
    after = stage.limit.observe(clipped.nan_to_num(0.0, 0.0, 0.0), state)
    return {key: torch.where(measured.finite, value, state[key]) for key, value in after.items()}


def _as_limit(max_norm: MaxNorm) -> Limit | None:
    if max_norm is None or isinstance(max_norm, Limit):
        return max_norm
    number = as_max_norm(max_norm)
    return None if math.isinf(number) else FixedLimit(number)


_ONES: dict[tuple[int, torch.dtype], Tensor] = {}


def _ones(norms: Tensor) -> Tensor:
    """Ones like norms, on a CPU made once: what most steps report costs nothing."""
    if type(norms) is not Tensor or not norms.is_cpu:  # made while a graph is captured or a program traced, they belong to that
        return torch.ones_like(norms)
    key = len(norms), norms.dtype
    if key not in _ONES:
        _ONES[key] = torch.ones_like(norms)
    return _ONES[key]
