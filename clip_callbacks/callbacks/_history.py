"""What a run remembers of its norms: for percentiles and clip fractions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import CatMetric

from clip_callbacks.report import CLIP_FRACTION_EPOCH, PERCENTILES, StepReport

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

    def add(self, *, clipped: bool) -> None:
        """Count one step."""
        self.steps += 1
        self.clipped += clipped

    @property
    def fraction(self) -> float:
        """Share of steps clipped; 0 without steps."""
        return self.clipped / self.steps if self.steps else 0.0

    def reset(self) -> None:
        """Begin again."""
        self.steps = self.clipped = 0


class RunHistory:
    """What one optimizer's run remembers for its metrics.

    Attributes:
        epoch_norms: Total norms of the epoch's healthy steps.
        epoch: Counts of the epoch.
        since_logged: Counts since the last logged step.
        steps: Optimizer steps so far, bad ones too.
    """

    def __init__(self) -> None:
        self.epoch_norms = NormHistory()
        self.epoch = StepCounts()
        self.since_logged = StepCounts()
        self.steps = 0

    def add(self, report: StepReport) -> None:
        """Take in a healthy step."""
        self.epoch_norms.add(report.total)
        self.epoch.add(clipped=report.clipped)
        self.since_logged.add(clipped=report.clipped)

    def epoch_metrics(self, *, clipping: bool) -> dict[str, float]:
        """Percentiles of total_norm and, if wanted, the clip fraction of this epoch; empty without a healthy step."""
        percentiles = self.epoch_norms.percentiles(tuple(PERCENTILES))
        if percentiles is None:
            return {}
        fraction = {CLIP_FRACTION_EPOCH: self.epoch.fraction} if clipping else {}
        return dict(zip(PERCENTILES.values(), percentiles.tolist(), strict=True)) | fraction

    def end_epoch(self) -> None:
        """Begin a new epoch."""
        self.epoch_norms.reset()
        self.epoch.reset()

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers."""
        counts = [self.epoch.steps, self.epoch.clipped, self.since_logged.steps, self.since_logged.clipped]
        return {"steps": self.steps, "norms": self.epoch_norms.values(), "counts": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.steps = state["steps"]
        self.epoch_norms.load(state["norms"])
        self.epoch.steps, self.epoch.clipped, self.since_logged.steps, self.since_logged.clipped = state["counts"]
