"""What was logged in a run, whoever logged it: metrics over steps, the guard's journal, notes of the reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clip_callbacks.advice import Advice, advise
from clip_callbacks.report import (
    AMP_SCALE,
    BLOCK_NORM,
    CLIP_COEF,
    CLIP_FRACTION,
    CLIP_FRACTION_EPOCH,
    CLIPPED_NORM,
    MAX_NORM,
    NOISE_SCALE,
    SHADOW_CLIP_FRACTION,
    SHADOW_CLIP_FRACTION_EPOCH,
    SKIPPED_STEPS,
    TOTAL_NORM,
    UPDATE_RATIO,
)

Steps = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

LOSS_WORDS = ("loss", "train", "val")
"""What the names of losses hold or begin with, the best first."""


class UnusableLogError(ValueError):
    """Nothing can be read from a log; one line says what and why."""


@dataclass(frozen=True, eq=False)
class Series:
    """One metric over steps, in the order of the steps.

    Args:
        steps: Of the logger's x-axis, int64 of shape ``(n,)``.
        values: float64 of shape ``(n,)``; what was logged as NaN or inf is among them.
    """

    steps: Steps
    values: Values

    @classmethod
    def of(cls, steps: npt.ArrayLike, values: npt.ArrayLike) -> Series:
        """Bring points into the order of their steps; of several at one step the last one counts."""
        at, what = np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64)
        if len(at) > 1 and not bool(np.all(at[1:] > at[:-1])):
            order = np.argsort(at, kind="stable")
            at, what = at[order], what[order]
            is_last = np.append(at[1:] != at[:-1], True)
            at, what = at[is_last], what[is_last]
        return cls(at, what)

    @classmethod
    def empty(cls) -> Series:
        """No point."""
        return cls(np.empty(0, np.int64), np.empty(0, np.float64))

    def __len__(self) -> int:
        """How many points there are."""
        return len(self.steps)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return len(self.steps) > 0

    @cached_property
    def finite(self) -> Series:
        """The finite points."""
        is_finite = np.isfinite(self.values)
        return self if bool(is_finite.all()) else Series(self.steps[is_finite], self.values[is_finite])

    def within(self, first: int | None, last: int | None) -> Series:
        """The points from one step to another, both included."""
        low = 0 if first is None else int(np.searchsorted(self.steps, first, "left"))
        high = len(self) if last is None else int(np.searchsorted(self.steps, last, "right"))
        return Series(self.steps[low:high], self.values[low:high])

    def at(self, steps: Steps) -> Values:
        """The value in force at each of some steps: the last one logged up to there, NaN before the first."""
        if not self:
            return np.full(len(steps), np.nan)
        place = np.searchsorted(self.steps, steps, "right") - 1
        return np.where(place >= 0, self.values[np.maximum(place, 0)], np.nan)

    @property
    def last(self) -> float:
        """The last finite value; NaN without one."""
        return float(self.finite.values[-1]) if self.finite else float("nan")


@dataclass(frozen=True, eq=False)
class Run:
    """One run's log.

    Args:
        name: What tells it from the others.
        source: Where it was read.
        metrics: By name.
        bad_steps: The guard's journal: a dictionary for each bad step.
        notes: What the reader has to say, in sentences.
    """

    name: str
    source: str
    metrics: Mapping[str, Series]
    bad_steps: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def within(self, first: int | None, last: int | None) -> Run:
        """The run from one step to another."""
        metrics = {key: part for key, series in self.metrics.items() if (part := series.within(first, last))}
        bad_steps = tuple(
            bad for bad in self.bad_steps if (first or 0) <= int(bad.get("step", 0)) <= (float("inf") if last is None else last)
        )
        return replace(self, metrics=metrics, bad_steps=bad_steps)

    @cached_property
    def tracks(self) -> list[Track]:
        """One for each optimizer; several are told apart by the suffix of their metrics."""
        suffixes = [key.removeprefix(TOTAL_NORM) for key in self.metrics if key == TOTAL_NORM or key.startswith(f"{TOTAL_NORM}-")]
        return [Track(self, suffix) for suffix in sorted(suffixes)]

    def losses(self, wanted: tuple[str, ...] = ()) -> dict[str, Series]:
        """The metrics that are losses: those wanted, or those whose names say so; an epoch's mean only if there is nothing else."""
        if wanted:
            return {key: self.metrics[key] for key in wanted if key in self.metrics}
        ours = ("grad", "update_ratio", "lr-", "epoch", "step")
        others = [key for key in self.metrics if not key.startswith(ours)]
        for word in LOSS_WORDS:
            found = [key for key in others if (word in key if word == "loss" else key.startswith(LOSS_WORDS[1:]))]
            if found:
                steps = {key.removesuffix("_step") for key in found if key.endswith("_step")}
                kept = [key for key in found if not (key.endswith("_epoch") and key.removesuffix("_epoch") in steps)]
                return {key: self.metrics[key] for key in kept}
        return {}


@dataclass(frozen=True, eq=False)
class Track:
    """What was logged of one optimizer of a run.

    Args:
        run: The run.
        suffix: Of the metrics' names; empty with one optimizer.
    """

    run: Run
    suffix: str = ""

    @property
    def name(self) -> str:
        """The run's name, and the optimizer's if there are several."""
        return f"{self.run.name} · {self.suffix[1:]}" if self.suffix else self.run.name

    def metric(self, key: str) -> Series:
        """A metric by its name without the suffix; empty if it was not logged."""
        return self.run.metrics.get(key + self.suffix, Series.empty())

    @cached_property
    def total_norm(self) -> Series:
        """Norm of all gradients before clipping: the finite ones, above 0."""
        finite = self.metric(TOTAL_NORM).finite
        positive = finite.values > 0
        return finite if bool(positive.all()) else Series(finite.steps[positive], finite.values[positive])

    @cached_property
    def advice(self) -> Advice | None:
        """A max_norm from what was logged."""
        return advise(torch.from_numpy(np.array(self.total_norm.values)))

    @property
    def clipped_norm(self) -> Series:
        """Norm after clipping."""
        return self.metric(CLIPPED_NORM).finite

    @property
    def max_norm(self) -> Series:
        """The limit in force."""
        return self.metric(MAX_NORM).finite

    @property
    def clip_coef(self) -> Series:
        """clipped_norm / total_norm."""
        return self.metric(CLIP_COEF).finite

    @property
    def clip_fraction(self) -> Series:
        """Share of the steps since the last logged one that were clipped."""
        return self.metric(CLIP_FRACTION).finite

    @property
    def amp_scale(self) -> Series:
        """The GradScaler's scale."""
        return self.metric(AMP_SCALE).finite

    @property
    def noise_scale(self) -> Series:
        """The gradient noise scale."""
        return self.metric(NOISE_SCALE).finite

    @property
    def skipped_steps(self) -> Series:
        """How many steps were skipped so far."""
        return self.metric(SKIPPED_STEPS).finite

    @property
    def skips(self) -> Steps:
        """Logged steps up to which more steps had been skipped than before."""
        counts = self.skipped_steps
        if not counts:
            return np.empty(0, np.int64)
        return counts.steps[np.diff(counts.values, prepend=0.0) > 0]

    @property
    def bad_steps(self) -> list[Mapping[str, Any]]:
        """The journal's entries for this optimizer."""
        return [bad for bad in self.run.bad_steps if bad.get("optimizer", "") == self.suffix[1:]]

    @property
    def share_clipped(self) -> float:
        """Share of all the run's steps that were clipped, also of those that were not logged; NaN if nothing is known of it."""
        fraction = self.clip_fraction
        if not fraction:
            return float("nan")
        weights = np.diff(fraction.steps, prepend=-1).astype(np.float64)
        return float(np.average(fraction.values, weights=weights))

    def blocks(self, prefix: str = BLOCK_NORM) -> dict[str, Series]:
        """What was logged of each block under a prefix, by the blocks' names."""
        return {
            key.removeprefix(prefix).removesuffix(self.suffix): series.finite
            for key, series in self.run.metrics.items()
            if key.startswith(prefix) and key.endswith(self.suffix)
        }

    @property
    def update_ratios(self) -> dict[str, Series]:
        """Norm of the update over the norm of the weights, for each block."""
        return self.blocks(UPDATE_RATIO)

    @property
    def shadows(self) -> dict[str, float]:
        """For each shadow limit the share of steps it would have clipped, over the epochs, or over the logged steps."""
        shares: dict[str, float] = {}
        for pattern in (SHADOW_CLIP_FRACTION, SHADOW_CLIP_FRACTION_EPOCH):
            for name, series in self.blocks(pattern.format("")).items():
                if series:
                    weights = np.diff(series.steps, prepend=-1).astype(np.float64)
                    shares.setdefault(name, float(np.average(series.values, weights=weights)))
        return shares

    @property
    def epoch_clip_fractions(self) -> Series:
        """Share of each epoch's steps that were clipped."""
        return self.metric(CLIP_FRACTION_EPOCH).finite
