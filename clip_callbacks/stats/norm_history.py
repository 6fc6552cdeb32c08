"""Percentiles of total_norm and clip fractions over a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import CatMetric

from clip_callbacks.core.metric_names import (
    CLIP_FRACTION,
    CLIP_FRACTION_EPOCH,
    PERCENTILES,
    RULE_CLIP_FRACTION,
    RULE_CLIP_FRACTION_EPOCH,
    SHADOW_CLIP_FRACTION,
    SHADOW_CLIP_FRACTION_EPOCH,
)
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.stats.sketch import NormSketch

MAX_WAITING_STEPS = 128
"""Largest number of steps that wait until their norms are added to the metric together: most steps cost one list append."""


class NormHistory:
    """Total norms of finite steps since the last reset: 8 bytes per step, with exact percentiles."""

    def __init__(self) -> None:
        self._norms = CatMetric(nan_strategy="disable", sync_on_compute=False).set_dtype(torch.float64)
        self._waiting: list[Tensor] = []

    def add(self, total: Tensor) -> None:
        """Add one finite norm, shape ``(1,)``."""
        self._waiting.append(total)
        if len(self._waiting) >= MAX_WAITING_STEPS:
            self._flush()

    def reset(self) -> None:
        """Discard all norms."""
        self._norms.reset()
        self._waiting.clear()

    def values(self) -> Tensor:
        """Return all norms, float64 of shape ``(steps,)``."""
        self._flush()
        return self._norms.compute().reshape(-1) if self._norms.update_count else torch.empty(0, dtype=torch.float64)

    def percentiles(self, percents: tuple[int, ...]) -> Tensor | None:
        """Return percentiles with linear interpolation, shape ``(len(percents),)``; None without a step."""
        values = self.values()
        if not len(values):
            return None
        return torch.quantile(values, torch.tensor(percents, dtype=values.dtype, device=values.device) / 100)

    def load(self, values: Tensor) -> None:
        """Replace all norms by those of an earlier run."""
        self.reset()
        if len(values):
            self._norms.update(values)

    def _flush(self) -> None:
        if self._waiting:
            self._norms.update(torch.cat([total.double() for total in self._waiting]))
            self._waiting.clear()


class StepCounts:
    """Numbers of steps and of clipped steps."""

    def __init__(self) -> None:
        self.steps = self.clipped = 0

    @property
    def fraction(self) -> float:
        """Return the fraction of the steps that were clipped; 0 without steps."""
        return self.clipped / self.steps if self.steps else 0.0

    def reset(self) -> None:
        """Set both counts to 0."""
        self.steps = self.clipped = 0


class Spans:
    """Numbers of steps and of clipped steps over three spans.

    Attributes:
        since_logged: Counts since the last logged step.
        epoch: Counts of this epoch.
        run: Counts of the whole run.
    """

    def __init__(self) -> None:
        self.since_logged, self.epoch, self.run = StepCounts(), StepCounts(), StepCounts()

    def add(self, *, clipped: bool) -> None:
        """Count one step."""
        for counts in (self.since_logged, self.epoch, self.run):
            counts.steps += 1
            counts.clipped += clipped

    def state(self) -> list[int]:
        """Return all counts as a list."""
        return [number for counts in (self.since_logged, self.epoch, self.run) for number in (counts.steps, counts.clipped)]

    def load(self, state: list[int]) -> None:
        """Continue from the counts of :meth:`state`."""
        for counts, place in ((self.since_logged, 0), (self.epoch, 2), (self.run, 4)):
            counts.steps, counts.clipped = state[place : place + 2]


class RunHistory:
    """Norms and counts of one optimizer's steps, for its metrics.

    Attributes:
        epoch_norms: Total norms of the epoch's healthy steps.
        run_norms: Total norms of the run's healthy steps before this epoch.
        clips: Counts of healthy steps and of clipped ones.
        rules: Counts of healthy steps and of those clipped by a rule, for each rule with a name.
        shadows: Counts of healthy steps and of those that a shadow limit would have clipped, for each shadow limit.
        steps: Number of optimizer steps so far, including bad ones.
        last: Report of the last healthy step of this fit.
    """

    def __init__(self) -> None:
        self.epoch_norms = NormHistory()
        self.run_norms = NormSketch()
        self.clips = Spans()
        self.rules: dict[str, Spans] = {}
        self.shadows: dict[str, Spans] = {}
        self.steps = 0
        self.last: StepRecord | None = None

    def add(self, report: StepRecord) -> None:
        """Record a healthy step."""
        self.last = report
        self.epoch_norms.add(report.total)
        self.clips.add(clipped=report.clipped)
        for outcomes, counted in ((report.outcomes, self.rules), (report.shadows, self.shadows)):
            for outcome in outcomes:
                if outcome.name:
                    counted.setdefault(outcome.name, Spans()).add(clipped=outcome.clips)

    def fractions(self) -> dict[str, float]:
        """Return the clip fractions since the last logged step, overall, by named rule, by shadow limit; empty without one."""
        if not self.clips.since_logged.steps:
            return {}
        rules = {RULE_CLIP_FRACTION.format(name): spans.since_logged.fraction for name, spans in self.rules.items()}
        shadows = {SHADOW_CLIP_FRACTION.format(name): spans.since_logged.fraction for name, spans in self.shadows.items()}
        return {CLIP_FRACTION: self.clips.since_logged.fraction} | rules | shadows

    def epoch_metrics(self, *, clipping: bool) -> dict[str, float]:
        """Return the percentiles of total_norm and the clip fractions of this epoch; empty without a healthy step.

        Args:
            clipping: If True, the fraction over all rules is included.
        """
        percentiles = self.epoch_norms.percentiles(tuple(PERCENTILES))
        if percentiles is None:
            return {}
        fractions = {}
        if clipping:
            fractions[CLIP_FRACTION_EPOCH] = self.clips.epoch.fraction
        fractions |= {RULE_CLIP_FRACTION_EPOCH.format(name): spans.epoch.fraction for name, spans in self.rules.items()}
        fractions |= {SHADOW_CLIP_FRACTION_EPOCH.format(name): spans.epoch.fraction for name, spans in self.shadows.items()}
        return dict(zip(PERCENTILES.values(), percentiles.tolist(), strict=True)) | fractions

    def run_percentiles(self) -> list[float]:
        """Return the percentiles of total_norm over the run, each within 1 %; NaN without a healthy step."""
        norms = self.run_norms.rows([0])
        norms.add(self.epoch_norms.values()[:, None])
        return [share.item() for share in norms.quantiles([percent / 100 for percent in PERCENTILES])]

    def keep_only(self, rules: Sequence[str], shadows: Sequence[str]) -> None:
        """Discard the counts of rules and shadow limits that only an earlier run had.

        Args:
            rules: Names of the rules to keep.
            shadows: Names of the shadow limits to keep.
        """
        self.rules = {name: spans for name, spans in self.rules.items() if name in rules}
        self.shadows = {name: spans for name, spans in self.shadows.items() if name in shadows}

    def begin_log(self) -> None:
        """Set the counts since the last logged step to 0."""
        for spans in self._all:
            spans.since_logged.reset()

    def end_epoch(self) -> None:
        """Add the norms of the epoch to those of the run, and set its counts to 0."""
        self.run_norms.add(self.epoch_norms.values()[:, None])
        self.epoch_norms.reset()
        for spans in self._all:
            spans.epoch.reset()

    @property
    def _all(self) -> list[Spans]:
        return [self.clips, *self.rules.values(), *self.shadows.values()]

    def state_dict(self) -> dict[str, Any]:
        """Return all norms and counts, as tensors and numbers."""
        named = {kind: {name: spans.state() for name, spans in counted.items()} for kind, counted in self._named.items()}
        norms = {"norms": self.epoch_norms.values(), "run_norms": self.run_norms.state()}
        return {"steps": self.steps, "counts": self.clips.state()} | norms | named

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`."""
        self.steps = int(state["steps"])
        self.epoch_norms.load(state["norms"])
        self.run_norms.load(state["run_norms"])
        self.clips.load(state["counts"])
        for kind, counted in self._named.items():
            for name, counts in state[kind].items():
                counted.setdefault(name, Spans()).load(counts)

    @property
    def _named(self) -> dict[str, dict[str, Spans]]:
        return {"rules": self.rules, "shadows": self.shadows}
