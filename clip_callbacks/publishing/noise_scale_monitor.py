"""The estimates of the gradient noise scale in one fit: the part that GradientNoiseScale makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from typing_extensions import override

from clip_callbacks.core.metric_names import NOISE_SCALE
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.publishing.monitor import Monitor
from clip_callbacks.stats.histogram import Histogram
from clip_callbacks.stats.noise_scale import NoiseScale, WindowNorms
from clip_callbacks.trainer.optimizer_context import OptimizerContext


class NoiseScaleMonitor(Monitor):
    """Estimates the noise scale of each optimizer's gradients from its accumulation windows.

    Args:
        saved: A state from :meth:`state_dict`; empty at the beginning of a run.
    """

    measures_micro_batches = True

    def __init__(self, saved: Mapping[str, Any]) -> None:
        self._estimates = {int(index): NoiseScale(**estimate) for index, estimate in saved.get("noise", {}).items()}

    @override
    def attach(self, contexts: Sequence[OptimizerContext], names: Sequence[str], *, renewed: bool) -> None:
        for context in contexts:
            self._estimates.setdefault(context.index, NoiseScale())

    @override
    def end_step(self, context: OptimizerContext, report: StepRecord, window: WindowNorms | None) -> None:
        if window is not None:  # None for steps that were not taken, too
            self._estimates[context.index].observe(window.small, window.big, window.samples or 1)

    @override
    def readings(self, context: OptimizerContext, report: StepRecord) -> tuple[dict[str, float], dict[str, Histogram]]:
        value = self._estimates[context.index].value
        return ({} if value is None else {NOISE_SCALE: value}), {}

    @override
    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        return "GradientNoiseScale reads the gradients after each backward pass"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"noise": {index: asdict(estimate) for index, estimate in self._estimates.items()}}
