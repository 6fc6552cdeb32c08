"""GradientNormMonitor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from torch import Tensor

from clip_callbacks.blocks import SCOPES, Scope
from clip_callbacks.callbacks._history import NormHistory
from clip_callbacks.callbacks._lane import Lane
from clip_callbacks.callbacks._member import Member
from clip_callbacks.noise_scale import NoiseScale
from clip_callbacks.norms import as_norm_type, block_norms
from clip_callbacks.report import BLOCK_NORM, CONTRIBUTION, NOISE_SCALE, SPILL_OVER, StepReport
from clip_callbacks.spill_over import contributions, spill_over

TWO = 2.0

SUGGESTED_PERCENTILE = 90
"""Where the suggested threshold lies: what it clips are the largest 10 % of the steps."""


class GradientNormMonitor(Member):
    """Shows how large the gradients are: a norm for each block on every logging step, and at the end a max_norm worth trying.

    Changes nothing. Beside a GradientClipping it costs no further read of the gradients; its norms are those before clipping.

    Metrics: ``grad_norm/<block>`` for each block of ``scope``, and those that the whole family logs.

    Args:
        scope: Which entries share one norm: "global", "group", "layer" or "parameter". (A metric for each "unit" would be
            thousands.)
        norm_type: The order p of the norm, above 0; "inf" is the maximum norm. The same as GradientClipping's in the same Trainer.
        every_n_steps: Log the blocks' norms only every so many optimizer steps; None: on every logging step of the Trainer.
        noise_scale: Whether to estimate the gradient noise scale from the micro-batches of accumulation windows and log it as
            ``grad/noise_scale``, in samples (in micro-batches where a batch's tensors are of several lengths): about the batch
            beyond which more samples in a step stop to pay. Reads the gradients after each backward pass, and needs room for those
            of one micro-batch. McCandlish et al., arXiv 1812.06162; see :class:`~clip_callbacks.noise_scale.NoiseScale`.
        contributions: Whether to log for each block ``grad_contribution/<block>``, its share of the total norm (of the sum of
            squares, for p = 2), and ``grad_spill_over/<block>``, the share of its norm that clipping took because of other blocks:
            1 less its norm after clipping over what that would be if all other gradients were 0, the limits being what they are.

    Raises:
        ValueError: If an argument is out of its range, or ``noise_scale`` is asked for with another norm than the 2-norm.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientNormMonitor("parameter")], logger=False, enable_checkpointing=False)
    """

    kind = "monitor"

    def __init__(
        self,
        scope: Scope = "layer",
        *,
        norm_type: float | Literal["inf"] = 2.0,
        every_n_steps: int | None = None,
        noise_scale: bool = False,
        contributions: bool = False,
    ) -> None:
        if scope not in SCOPES or scope == "unit":
            raise ValueError(f"`scope` must be one of {', '.join(SCOPES[:-1])}, got {scope!r}.")
        self.scope: Scope = scope
        super().__init__()
        if every_n_steps is not None and (not isinstance(every_n_steps, int) or every_n_steps < 1):
            raise ValueError(f"`every_n_steps` must be a whole number of at least 1, or None, got {every_n_steps!r}.")
        self.norm_type: float = as_norm_type(norm_type)
        if noise_scale and self.norm_type != TWO:
            raise ValueError(f"`norm_type` must be 2 beside noise_scale=True, got {norm_type!r}: the estimate is one of 2-norms.")
        self.every_n_steps = every_n_steps
        self.noise_scale = noise_scale
        self.contributions = contributions
        self._noise: dict[int, NoiseScale] = {}
        self._norms: dict[int, NormHistory] = {}
        self._last_logged: dict[int, int] = {}

    @property
    def _stable_key(self) -> str:
        """Several monitors may stand in one Trainer: one for each scope."""
        return self._generate_state_key(scope=self.scope)

    def bind(self, lanes: Sequence[Lane], names: Sequence[str], *, renew: bool = False) -> None:
        """Have a history for each optimizer."""
        super().bind(lanes, names, renew=renew)
        for lane in lanes:
            self._norms.setdefault(lane.index, NormHistory())
            self._noise.setdefault(lane.index, NoiseScale())

    def forget(self) -> None:
        """Begin a new run."""
        super().forget()
        self._norms, self._last_logged, self._noise = {}, {}, {}

    def observe(self, lane: Lane, report: StepReport, *, healthy: bool) -> None:
        """Remember the total norm of a healthy step."""
        super().observe(lane, report, healthy=healthy)
        if healthy:
            self._norms[lane.index].add(report.total)
        if healthy and self.noise_scale and lane.noise:
            self._noise[lane.index].observe(lane.noise.small, lane.noise.big, lane.noise.samples or 1)

    def metrics(self, lane: Lane, report: StepReport) -> dict[str, float]:
        """Norms of the blocks, if it is time to log them, and the noise scale if there is an estimate."""
        noise = self._noise[lane.index].value if self.noise_scale else None
        return self._block_norms(lane, report) | ({} if noise is None else {NOISE_SCALE: noise})

    def _block_norms(self, lane: Lane, report: StepReport) -> dict[str, float]:
        if self.every_n_steps and lane.history.steps - self._last_logged.get(lane.index, 0) < self.every_n_steps:
            return {}
        self._last_logged[lane.index] = lane.history.steps
        partition = lane.table.partition(self.scope)
        norms = block_norms(report.parameter_norms, partition, report.norm_type)
        values = {BLOCK_NORM: norms} | (self._contributions(lane, report, norms) if self.contributions else {})
        return {
            prefix + name: value
            for prefix, each in values.items()
            for name, value in zip(partition.names, each.tolist(), strict=True)
        }

    def _contributions(self, lane: Lane, report: StepReport, norms: Tensor) -> dict[str, Tensor]:
        by_unit = report.unit_norms is not None
        parts = report.parameter_norms if report.unit_norms is None else report.unit_norms
        blocks = lane.table.partition(self.scope, by_unit=by_unit)
        return {
            CONTRIBUTION: contributions(norms, report.total, report.norm_type),
            SPILL_OVER: spill_over(report.outcomes, parts, report.factors, blocks, report.norm_type),
        }

    def suggested_max_norm(self, index: int = 0) -> float | None:
        """The 90th percentile of the run's total norms, to two digits; None before a healthy step.

        Args:
            index: Number of the optimizer.
        """
        percentiles = self._norms[index].percentiles((SUGGESTED_PERCENTILE,)) if index in self._norms else None
        return None if percentiles is None or not percentiles[0] > 0 else two_digits(float(percentiles[0]))

    def summary(self, lanes: Sequence[Lane]) -> list[str]:
        """The percentiles of the run and the suggestion, a line for each optimizer."""
        lines = []
        for lane in lanes:
            percentiles = self._norms[lane.index].percentiles((50, SUGGESTED_PERCENTILE, 99))
            if percentiles is not None:
                p50, p90, p99 = (f"{value:.3g}" for value in percentiles.tolist())
                steps, suggested = self._norms[lane.index].count, self.suggested_max_norm(lane.index)
                advice = f" Suggested max_norm: {suggested:g}, which clips the largest 10 % of the steps." if suggested else ""
                lines.append(
                    f"GradientNormMonitor{lane.suffix}: total_norm over {steps} steps: p50 {p50}, p90 {p90}, p99 {p99}.{advice}"
                )
        return lines

    def state_dict(self) -> dict[str, Any]:
        """The norms of the run, 8 bytes a step."""
        state = super().state_dict()
        norms = {index: history.values() for index, history in self._norms.items()}
        noise = {index: asdict(estimate) for index, estimate in self._noise.items()}
        return state | {"norms": norms, "last_logged": dict(self._last_logged), "noise": noise}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is not one of this callback.
        """
        super().load_state_dict(state_dict)
        for index, values in state_dict["norms"].items():
            self._norms[int(index)] = NormHistory()
            self._norms[int(index)].load(values)
        self._last_logged = {int(index): step for index, step in state_dict["last_logged"].items()}
        self._noise = {int(index): NoiseScale(**estimate) for index, estimate in state_dict["noise"].items()}


def two_digits(value: float) -> float:
    """Round a number above 0 to two significant digits."""
    return round(value, 1 - math.floor(math.log10(value)))
