"""What a run remembers of its norms: for percentiles and clip fractions."""

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

FLUSH = 128
"""Steps that wait before they go into the metric together: a step costs one list append."""


class NormHistory:
    """Total norms of finite steps since the last reset: 8 bytes a step, the percentiles exact."""

    def __init__(self) -> None:
        self._norms = CatMetric(nan_strategy="disable", sync_on_compute=False).set_dtype(torch.float64)
        self._waiting: list[Tensor] = []

    def add(self, total: Tensor) -> None:
        """Take in one finite norm, shape ``(1,)``."""
        self._waiting.append(total)
        if len(self._waiting) >= FLUSH:
            self._flush()

    def reset(self) -> None:
        """Forget everything."""
        self._norms.reset()
        self._waiting.clear()

    def values(self) -> Tensor:
        """All norms, float64 of shape ``(steps,)``."""
        self._flush()
        return self._norms.compute().reshape(-1) if self._norms.update_count else torch.empty(0, dtype=torch.float64)

    @property
    def count(self) -> int:
        """How many norms there are."""
        return len(self.values())

    def percentiles(self, percents: tuple[int, ...]) -> Tensor | None:
        """Percentiles with linear interpolation, shape ``(len(percents),)``; None without a step."""
        values = self.values()
        if not len(values):
            return None
        return torch.quantile(values, torch.tensor(percents, dtype=values.dtype, device=values.device) / 100)

    def load(self, values: Tensor) -> None:
        """Begin from norms that an earlier run saw."""
        self.reset()
        if len(values):
            self._norms.update(values)

    def _flush(self) -> None:
        if self._waiting:
            self._norms.update(torch.cat([total.double() for total in self._waiting]))
            self._waiting.clear()


class StepCounts:
    """How many steps there were, and how many of them were clipped."""

    def __init__(self) -> None:
        self.steps = self.clipped = 0

    @property
    def fraction(self) -> float:
        """Share of steps clipped; 0 without steps."""
        return self.clipped / self.steps if self.steps else 0.0

    def reset(self) -> None:
        """Begin again."""
        self.steps = self.clipped = 0


class Spans:
    """Steps and how many of them were clipped, over three spans.

    Attributes:
        since_logged: Since the last logged step.
        epoch: In this epoch.
        run: In the whole run.
    """

    def __init__(self) -> None:
        self.since_logged, self.epoch, self.run = StepCounts(), StepCounts(), StepCounts()

    def add(self, *, clipped: bool) -> None:
        """Count one step."""
        for counts in (self.since_logged, self.epoch, self.run):
            counts.steps += 1
            counts.clipped += clipped

    def state(self) -> list[int]:
        """Everything, as numbers."""
        return [number for counts in (self.since_logged, self.epoch, self.run) for number in (counts.steps, counts.clipped)]

    def load(self, state: list[int]) -> None:
        """Go on from what :meth:`state` returned."""
        for counts, place in ((self.since_logged, 0), (self.epoch, 2), (self.run, 4)):
            counts.steps, counts.clipped = state[place : place + 2]


class RunHistory:
    """What one optimizer's run remembers for its metrics.

    Attributes:
        epoch_norms: Total norms of the epoch's healthy steps.
        clips: How many of the healthy steps were clipped.
        run_norms: Total norms of the run's healthy steps, but for those of the epoch.
        rules: The same for each rule with a name.
        shadows: For each shadow limit, how many it would have clipped.
        steps: Optimizer steps so far, bad ones too.
        last: What the last healthy step of this fit reported.
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
        """Take in a healthy step."""
        self.last = report
        self.epoch_norms.add(report.total)
        self.clips.add(clipped=report.clipped)
        for outcomes, counted in ((report.outcomes, self.rules), (report.shadows, self.shadows)):
            for outcome in outcomes:
                if outcome.name:
                    counted.setdefault(outcome.name, Spans()).add(clipped=outcome.clips)

    def fractions(self) -> dict[str, float]:
        """Clip fractions since the last logged step, if there was one: of all, of each rule with a name, and of each shadow."""
        if not self.clips.since_logged.steps:
            return {}
        rules = {RULE_CLIP_FRACTION.format(name): spans.since_logged.fraction for name, spans in self.rules.items()}
        shadows = {SHADOW_CLIP_FRACTION.format(name): spans.since_logged.fraction for name, spans in self.shadows.items()}
        return {CLIP_FRACTION: self.clips.since_logged.fraction} | rules | shadows

    def epoch_metrics(self, *, clipping: bool) -> dict[str, float]:
        """Percentiles of total_norm and, if wanted, the clip fractions of this epoch; empty without a healthy step."""
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
        """Percentiles of total_norm over the run, each within 1 %; NaN without a healthy step."""
        norms = self.run_norms.rows([0])
        norms.add(self.epoch_norms.values()[:, None])
        return [share.item() for share in norms.quantiles([percent / 100 for percent in PERCENTILES])]

    def keep_only(self, rules: Sequence[str], shadows: Sequence[str]) -> None:
        """Forget the counts of rules and shadows that an earlier run had."""
        self.rules = {name: spans for name, spans in self.rules.items() if name in rules}
        self.shadows = {name: spans for name, spans in self.shadows.items() if name in shadows}

    def begin_log(self) -> None:
        """Begin to count anew: a step was logged."""
        for spans in self._all:
            spans.since_logged.reset()

    def end_epoch(self) -> None:
        """Begin a new epoch."""
        self.run_norms.add(self.epoch_norms.values()[:, None])
        self.epoch_norms.reset()
        for spans in self._all:
            spans.epoch.reset()

    @property
    def _all(self) -> list[Spans]:
        return [self.clips, *self.rules.values(), *self.shadows.values()]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers."""
        named = {kind: {name: spans.state() for name, spans in counted.items()} for kind, counted in self._named.items()}
        norms = {"norms": self.epoch_norms.values(), "run_norms": self.run_norms.state()}
        return {"steps": self.steps, "counts": self.clips.state()} | norms | named

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
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
