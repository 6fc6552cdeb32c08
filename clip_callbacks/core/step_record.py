"""The engine's record of one optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from clip_callbacks.core.actions import StepOutcome
from clip_callbacks.core.decisions import Outcome
from clip_callbacks.core.few_values import EUCLIDEAN, MAX_VALUES_FOR_PYTHON, norm_of_products
from clip_callbacks.core.measurement import FALSE, FLAGS, TRUE
from clip_callbacks.core.metric_names import (
    CLIP_COEF,
    CLIPPED_NORM,
    MAX_NORM,
    RULE_CLIP_COEF,
    RULE_MAX_NORM,
    RULE_TOTAL_NORM,
    TOTAL_NORM,
)
from clip_callbacks.core.remeasurement import total_norm_in_float64
from clip_callbacks.core.spikes import NO_THRESHOLDS, Thresholds


@dataclass(eq=False)  # not frozen, since that makes the record of a step take three times as long; nobody changes a record
class StepRecord:
    """The norms of one optimizer step, and the decisions about it; :class:`~clip_callbacks.StepReport` shows it to users.

    Norms are those of the true gradient: after accumulation rescaling, without the loss scale. All values stay tensors, so that
    the caller decides when to read them.

    Args:
        total_norm: Norm of all gradients before clipping, 0-dim.
        parameter_norms: Norm of each parameter's gradient before clipping, shape ``(N,)``; 0 where there is none.
        outcomes: The decisions of the rules, in order.
        factors: The factor of each parameter's gradient in clipping, shape ``(N,)``; or of each unit's, ``(U,)``, if
            ``unit_norms`` is not None; or one entry for all. None is 1.
        norm_type: The order p of all norms.
        finite: True if every gradient was finite before the step, and every known loss, 0-dim bool.
        skipped: True if the step is skipped, 0-dim bool.
        accumulation_scale: The factor of all gradients that turned a window's sum into its mean.
        unit_norms: Norm of each output row's gradient before clipping, shape ``(U,)``, if a rule has the scope "unit".
        shadows: The decisions that the shadow rules would have made, each alone.
        thresholds: The limits above which the step is a spike.
        outcome: The outcome of the step.
    """

    total_norm: Tensor
    parameter_norms: Tensor
    outcomes: tuple[Outcome, ...]
    factors: Tensor | None
    norm_type: float
    finite: Tensor
    skipped: Tensor
    accumulation_scale: float = 1.0
    unit_norms: Tensor | None = None
    shadows: tuple[Outcome, ...] = ()
    thresholds: Thresholds = NO_THRESHOLDS
    outcome: StepOutcome = StepOutcome.TAKEN

    @property
    def clipped_norm(self) -> Tensor:
        """Norm of all gradients after norm clipping, before ``clip_value`` clamps entries, 0-dim."""
        return self._clipping()[0]

    @property
    def clip_coef(self) -> Tensor:
        """Ratio clipped_norm / total_norm, 0-dim; for one global rule its coefficient, min(1, max_norm / (total_norm + 1e-6))."""
        return self._clipping()[1]

    def _clipping(self) -> tuple[Tensor, Tensor]:
        """Return clipped_norm and clip_coef."""
        total_norm, factors = self.total_norm, self.factors
        if factors is None:
            return total_norm, _constant(1.0, self.total_norm.dtype)
        # A rule for a part of the parameters has one coefficient but more factors: they are 1 outside its block.
        if len(self.outcomes) == 1 and factors.numel() == 1:
            # one factor scales the norm itself, without the roundings that a norm of norms or their ratio would have
            coefficient = self.outcomes[0].coefficients
            if coefficient.ndim:
                coefficient = coefficient.reshape(())
            return total_norm * coefficient, coefficient
        # several factors: the norm is added up anew, in float64, as torch has no counterpart whose bits it could share
        norms = self.parameter_norms
        if self.unit_norms is not None and factors.numel() > 1:
            norms = self.unit_norms
        if self.norm_type == EUCLIDEAN and norms.is_cpu and 1 < factors.numel() <= MAX_VALUES_FOR_PYTHON:
            return _clipping_on_host(total_norm, norm_of_products(norms, factors))
        clipped_norm = total_norm_in_float64(norms.double() * factors, self.norm_type).to(self.total_norm.dtype)
        # 0 / 0 would be NaN: without gradients nothing is clipped
        return clipped_norm, torch.where(total_norm > 0, clipped_norm / total_norm, 1.0)

    @property
    def max_norm(self) -> Tensor:
        """Limit of the first rule, 0-dim; the lowest one if its blocks have several, inf without a limit."""
        limits: Tensor | float = math.inf
        if self.outcomes:
            limits = self.outcomes[0].limits
        if not isinstance(limits, Tensor):
            return _constant(limits, self.total_norm.dtype)
        if limits.numel() == 1:
            return limits.reshape(())
        return limits.amin()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the B blocks: those of the first rule, then of the second, and so on."""
        return tuple(name for outcome in self.outcomes for name in outcome.names)

    @cached_property
    def norms(self) -> Tensor:
        """Norms of the blocks before their rule and after the rules before it, shape ``(B,)``."""
        return self._joined([outcome.norms for outcome in self.outcomes])

    @cached_property
    def limits(self) -> Tensor:
        """Limits of the blocks, shape ``(B,)``; inf where there is none."""
        return self._joined([outcome.limit_of_each for outcome in self.outcomes])

    @cached_property
    def coefficients(self) -> Tensor:
        """Coefficients of the blocks, shape ``(B,)``, in [0, 1]."""
        return self._joined([outcome.coefficients.reshape(-1) for outcome in self.outcomes])

    def _joined(self, each: list[Tensor]) -> Tensor:
        """Return values of the blocks of all rules in one tensor; empty without a rule."""
        if not each:
            return self.total_norm.new_empty(0)
        return torch.cat(each)

    @property
    def clipped(self) -> bool:
        """Whether any gradient was made smaller. For a deferred step, whether any may have been."""
        return self.factors is not None

    def to_host(self) -> StepRecord:
        """Copy the record of a deferred step to the host without waiting.

        The values are valid once the device has reached this point.
        """
        copies: dict[int, Tensor] = {}  # several fields share tensors, which are copied once

        def copy(tensor: Tensor) -> Tensor:
            if id(tensor) not in copies:
                # from CUDA torch copies into pinned memory, so that the host need not wait
                copies[id(tensor)] = tensor.to("cpu", non_blocking=True)
            return copies[id(tensor)]

        def copies_of(outcomes: tuple[Outcome, ...]) -> tuple[Outcome, ...]:
            return tuple(
                replace(
                    outcome,
                    found=copy(outcome.norms),
                    limits=copy(outcome.limits) if isinstance(outcome.limits, Tensor) else outcome.limits,
                    coefficients=copy(outcome.coefficients),
                )
                for outcome in outcomes
            )

        # `unit_norms` is left out: a deferred step has one factor for all gradients, and never needs them.
        return replace(
            self,
            total_norm=copy(self.total_norm),
            parameter_norms=copy(self.parameter_norms),
            outcomes=copies_of(self.outcomes),
            factors=None if self.factors is None else copy(self.factors),
            finite=copy(self.finite),
            skipped=copy(self.skipped),
            shadows=copies_of(self.shadows),
            thresholds=self.thresholds.mapped(copy),
        )

    def decided_on_host(self) -> StepRecord:
        """Return the record of a deferred step, once it is on the host, as if the host had decided about the step."""
        is_finite = bool(self.finite)
        finite = FLAGS[is_finite]
        # The kernel was handed factors and used none: a skipped step has no decisions.
        if bool(self.skipped):
            return replace(
                self,
                outcomes=tuple(outcome.undecided() for outcome in self.outcomes),
                factors=None,
                finite=finite,
                skipped=TRUE,
                shadows=(),
                outcome=StepOutcome.SKIPPED,
            )
        # the device multiplied by the factor without asking whether it was 1
        factors = self.factors
        if factors is not None and not any(factor < 1.0 for factor in factors.reshape(-1).tolist()):
            factors = None
        outcome = StepOutcome.IGNORED
        if is_finite:
            outcome = StepOutcome.TAKEN
        return replace(
            self,
            outcomes=_with_clips(self.outcomes),
            factors=factors,
            finite=finite,
            skipped=FALSE,
            shadows=_with_clips(self.shadows),
            outcome=outcome,
        )

    def metrics(self, *, clipping: bool = True) -> dict[str, Tensor]:
        """Return the values of this step under the names of metrics. Empty if the total norm is not finite.

        Args:
            clipping: If False, only the total norm is returned.
        """
        # some loggers refuse NaN, some store inf as a number, and a single NaN spoils the mean of an epoch
        total_norm = self.total_norm
        total: Any = total_norm.tolist()
        if not math.isfinite(total):
            return {}
        if not clipping:
            return {TOTAL_NORM: total_norm}
        clipped_norm, clip_coef = self._clipping()
        metrics = {TOTAL_NORM: total_norm, CLIPPED_NORM: clipped_norm, CLIP_COEF: clip_coef}
        max_norm = self.max_norm
        # it is inf without a limit, or in the warm-up of one
        number: Any = max_norm.tolist()  # reads the memory, where `float` would dispatch an operator
        if math.isfinite(number):
            metrics[MAX_NORM] = max_norm
        return metrics

    def rule_metrics(self) -> dict[str, Tensor]:
        """For each rule with a name: the norm of its blocks together before it, its limit, and its coefficient."""
        metrics = {}
        for outcome in self.outcomes:
            if outcome.name:
                # blocks of a rule share no entry: the p-norm of their norms is that of all gradients that the rule selects
                before = total_norm_in_float64(outcome.norms, self.norm_type)
                after = total_norm_in_float64(outcome.norms * outcome.coefficients, self.norm_type)
                limits = outcome.limits
                metrics[RULE_TOTAL_NORM.format(outcome.name)] = before
                if not isinstance(limits, Tensor):
                    limits = torch.tensor(limits, dtype=torch.float64, device="cpu")
                metrics[RULE_MAX_NORM.format(outcome.name)] = limits.amin()
                # the share of the norm that is left, since a rule with several blocks has several coefficients
                metrics[RULE_CLIP_COEF.format(outcome.name)] = torch.where(before > 0, after / before, 1.0)
        return metrics


def as_skipped(record: StepRecord, outcome: StepOutcome) -> StepRecord:
    """Return the record of a step that was measured as good but is skipped.

    Args:
        record: The record.
        outcome: The outcome of the step: skipped, or overflowed.
    """
    # norms and decisions stay: they are what was measured, whatever became of the step
    return replace(record, skipped=TRUE, outcome=outcome)


def _clipping_on_host(total_norm: Tensor, clipped: float) -> tuple[Tensor, Tensor]:
    """Return clipped_norm and clip_coef in the dtype of the total norm."""
    total: Any = total_norm.tolist()
    if math.isnan(total):  # which an infinite norm beside the NaN has hidden
        clipped = total
    clipped_norm = torch.tensor(clipped, dtype=total_norm.dtype, device="cpu")
    rounded: Any = clipped_norm.tolist()
    ratio = 1.0  # without gradients nothing is clipped
    if total > 0.0:
        ratio = rounded / total
    return clipped_norm, torch.tensor(ratio, dtype=total_norm.dtype, device="cpu")


def _with_clips(outcomes: tuple[Outcome, ...]) -> tuple[Outcome, ...]:
    """Find out on the host which decisions clipped."""
    return tuple(
        replace(outcome, clips=any(coefficient < 1.0 for coefficient in outcome.coefficients.reshape(-1).tolist()))
        for outcome in outcomes
    )


@lru_cache(maxsize=64)
def _constant(number: float, dtype: torch.dtype) -> Tensor:
    """A 0-dim tensor, made once, since most steps report the same few constants."""
    # on the CPU, whatever the default device is, which may change while the tensor is cached
    return torch.tensor(number, dtype=dtype, device="cpu")
