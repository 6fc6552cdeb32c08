"""What one step reports, and the names of the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clip_callbacks.norms import sound_total
from clip_callbacks.rules import Outcome

TOTAL_NORM = "grad/total_norm"
CLIPPED_NORM = "grad/clipped_norm"
CLIP_COEF = "grad/clip_coef"
MAX_NORM = "grad/max_norm"
CLIP_FRACTION = "grad/clip_fraction"
CLIP_FRACTION_EPOCH = "grad/clip_fraction_epoch"
SKIPPED_STEPS = "grad/skipped_steps"
AMP_SCALE = "grad/amp_scale"
ACCUMULATION_SCALE = "grad/accumulation_scale"
BLOCK_NORM = "grad_norm/"
"""Prefix of a monitor's metrics; the name of the block follows."""

TRUE, FALSE = torch.tensor(True), torch.tensor(False)
"""The two 0-dim flags that reports hold: made once."""

PERCENTILES = {50: "grad/total_norm_p50", 90: "grad/total_norm_p90", 99: "grad/total_norm_p99"}


@dataclass(frozen=True, eq=False)
class StepReport:
    """What one optimizer step's pass found and did. Tensors stay tensors: reading them is the caller's decision.

    Norms are of the true gradient: after accumulation rescaling, without the loss scale.

    Args:
        total: Norm of all gradients before clipping, shape ``(1,)``; :attr:`total_norm` is the same, 0-dim.
        parameter_norms: Norm of each parameter's gradient before clipping, shape ``(N,)``, 0 where there is none.
        outcomes: What each rule found and decided, in order.
        factors: What each parameter's gradient was multiplied by in clipping, shape ``(N,)`` or one for all, ``(1,)``; None is 1.
        norm_type: The order p of all norms.
        finite: Whether every gradient was finite when it came, 0-dim bool.
        skipped: Whether the step is skipped, 0-dim bool.
    """

    total: Tensor
    parameter_norms: Tensor
    outcomes: tuple[Outcome, ...]
    factors: Tensor | None
    norm_type: float
    finite: Tensor
    skipped: Tensor

    @cached_property
    def total_norm(self) -> Tensor:
        """Norm of all gradients before clipping, 0-dim."""
        return self.total[0]

    @cached_property
    def clipped_norm(self) -> Tensor:
        """Norm of all gradients after norm clipping (and before ``clip_value`` clamps entries), 0-dim."""
        if self.factors is None:
            return self.total_norm
        if self._is_global:
            return self.total_norm * self.clip_coef
        return sound_total(self.parameter_norms.double() * self.factors, self.norm_type)[0].to(self.total.dtype)

    @cached_property
    def clip_coef(self) -> Tensor:
        """clipped_norm / total_norm, 0-dim; under one global rule its coefficient, min(1, max_norm / (total_norm + 1e-6))."""
        if self.factors is None or self.total.tolist() == [0.0]:
            return torch.ones_like(self.total_norm)
        if self._is_global:
            return self.outcomes[0].coefficients[0]
        return self.clipped_norm / self.total_norm

    @cached_property
    def max_norm(self) -> Tensor:
        """The limit in force, 0-dim: of the first rule, for the block with the lowest one; inf without a limit."""
        if not self.outcomes:
            return torch.full_like(self.total_norm, torch.inf)
        limits = self.outcomes[0].limits
        return limits.amin() if isinstance(limits, Tensor) else torch.full_like(self.total_norm, limits)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the B blocks: those of the first rule, then of the second, and so on."""
        return tuple(name for outcome in self.outcomes for name in outcome.names)

    @cached_property
    def norms(self) -> Tensor:
        """Norms of the blocks as their rule met them, shape ``(B,)``."""
        return torch.cat([outcome.norms for outcome in self.outcomes]) if self.outcomes else self.total.new_empty(0)

    @cached_property
    def limits(self) -> Tensor:
        """Limits of the blocks, shape ``(B,)``; inf where there is none."""
        each = [
            outcome.limits if isinstance(outcome.limits, Tensor) else torch.full_like(outcome.norms, outcome.limits)
            for outcome in self.outcomes
        ]
        return torch.cat(each) if each else self.total.new_empty(0)

    @cached_property
    def coefficients(self) -> Tensor:
        """Coefficients of the blocks, shape ``(B,)``, in [0, 1]."""
        return torch.cat([outcome.coefficients for outcome in self.outcomes]) if self.outcomes else self.total.new_empty(0)

    @property
    def clipped(self) -> bool:
        """Whether any gradient was made smaller."""
        return self.factors is not None

    def metrics(self, *, clipping: bool = True) -> dict[str, Tensor]:
        """The values of this step under their names on a dashboard; none of a skipped step, whose norm is no number.

        Args:
            clipping: Whether those that tell of clipping are wanted.
        """
        if self.skipped is TRUE:
            return {}
        if not clipping:
            return {TOTAL_NORM: self.total_norm}
        return {
            TOTAL_NORM: self.total_norm,
            CLIPPED_NORM: self.clipped_norm,
            CLIP_COEF: self.clip_coef,
            MAX_NORM: self.max_norm,
        }

    @property
    def _is_global(self) -> bool:
        """Whether one coefficient for everything is all there was to decide."""
        return len(self.outcomes) == 1 and self.factors is not None and len(self.factors) == 1
