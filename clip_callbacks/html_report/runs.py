"""What was logged in a run, whoever logged it: metrics over steps, the guard's journal, notes of the reader."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from clip_callbacks.core.metric_names import (
    AMP_SCALE,
    BLOCK_NORM,
    CLIP_COEF,
    CLIP_FRACTION,
    CLIPPED_NORM,
    MAX_NORM,
    SHADOW_CLIP_FRACTION,
    SKIPPED_STEPS,
    TOTAL_NORM,
    UPDATE_RATIO,
)
from clip_callbacks.html_report.norm_metrics import MAX_LISTED_METRICS, NormMetric, find_norms, norms_of_others
from clip_callbacks.html_report.series import Series, Steps, Values

ROUNDING_TOLERANCE = 1.001
"""A clipped norm may be above its limit by so much without meaning anything."""
OWN_PREFIXES = ("grad/", "grad_", "update_ratio/")
LOSS_WORDS = {
    "loss",
    "losses",
    "nll",
    "bits",
    "bpc",
    "bpb",
    "perplexity",
    "ppl",
    "elbo",
    "ce",
    "bce",
    "mse",
    "mae",
    "rmse",
    "error",
}
"""What metrics are called that ought to fall."""
TRANSFORMERS = "transformers"
"""The kind of log that the Trainer of Hugging Face's transformers leaves in its checkpoints."""
PREFIXED_TOTAL_NORM = re.compile(rf"(.+-){TOTAL_NORM}(-|$)")


class UnusableLogError(ValueError):
    """Nothing can be read from a log; one line says what and why."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run's log.

    Args:
        name: What tells it from the others.
        source: Where it was read.
        metrics: By name.
        kind: Of log: "CSV", "TensorBoard", "MLflow" or "transformers".
        bad_steps: The guard's journal: a dictionary for each bad step.
        notes: What the reader has to say, in sentences.
        norms: The metrics that are norms of all gradients; None: those that are found by their names.
    """

    name: str
    source: str
    metrics: Mapping[str, Series]
    kind: str = "CSV"
    bad_steps: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    norms: tuple[NormMetric, ...] | None = None

    @classmethod
    def of(cls, name: str, source: str, metrics: Mapping[str, Series], kind: str, notes: Sequence[str] = ()) -> Run:
        """A run as it was logged: without the prefix that its logger may have been given, with a note if steps went back."""
        prefix = next((match[1] for key in metrics if (match := PREFIXED_TOTAL_NORM.match(key))), "")
        if prefix and TOTAL_NORM not in metrics:
            metrics = {key.removeprefix(prefix): series for key, series in metrics.items()}
        superseded = max((series.superseded for series in metrics.values()), default=0)
        if superseded:
            notes = [
                *notes,
                f"Steps go back: {superseded} points that were logged before are left out, as of a part that was run again.",
            ]
        return cls(name, source, metrics, kind, notes=tuple(notes))

    def between(self, first: int | None, last: int | None) -> Run:
        """The run from one step to another."""
        metrics = {key: part for key, series in self.metrics.items() if (part := series.between(first, last))}
        bad_steps = tuple(
            bad for bad in self.bad_steps if (first or 0) <= int(bad.get("step", 0)) <= (float("inf") if last is None else last)
        )
        return replace(self, metrics=metrics, bad_steps=bad_steps)

    def with_norms(self, wanted: Sequence[str] = ()) -> Run:
        """The run with the norms that are read, those wanted or those that are found, and a note if others could be meant."""
        norms = find_norms(self.metrics, wanted)
        read = [norm.name for norm in norms]
        others = [norm.name for norm in norms_of_others(self.metrics) if norm.name not in read]
        if not read or not others or wanted:
            return replace(self, norms=norms)
        note = f"Norms are read from {', '.join(read)}. --norm reads another: {', '.join(others[:MAX_LISTED_METRICS])}."
        return replace(self, norms=norms, notes=(*self.notes, note))

    @cached_property
    def optimizer_logs(self) -> list[OptimizerLog]:
        """One for each optimizer, or for each norm that is read."""
        norms = find_norms(self.metrics) if self.norms is None else self.norms
        return [OptimizerLog(self, norm) for norm in norms if norm.name in self.metrics]

    def is_same_run_as(self, other: Run) -> bool:
        """Whether two logs are of one run: one is the beginning of the other, in its norms and in every metric that both hold."""
        if len(self.optimizer_logs) != len(other.optimizer_logs):
            return False
        norms = [(log.logged_norm, like.logged_norm) for log, like in zip(self.optimizer_logs, other.optimizer_logs, strict=True)]
        shared = [(series, other.metrics[key]) for key, series in self.metrics.items() if key in other.metrics]
        is_long = any(min(len(one), len(two)) > 1 for one, two in norms)
        return is_long and all(one.agrees_with(two) for one, two in norms + shared)

    def losses(self, wanted: tuple[str, ...] = ()) -> dict[str, Series]:
        """The metrics that are losses: those wanted, or those whose names say so; an epoch's mean only if it stands alone."""
        if wanted:
            return {key: self.metrics[key] for key in wanted if key in self.metrics}
        found = [
            key for key in self.metrics if not key.startswith(OWN_PREFIXES) and LOSS_WORDS & set(re.split("[^a-z]+", key.lower()))
        ]
        by_step = {key.removesuffix("_step") for key in found if key.endswith("_step")}
        return {key: self.metrics[key] for key in found if key.removesuffix("_epoch") not in by_step or not key.endswith("_epoch")}


@dataclass(frozen=True, eq=False)
class OptimizerLog:
    """What was logged of one optimizer of a run.

    Args:
        run: The run.
        norm: The metric that is the norm of all its gradients.
    """

    run: Run
    norm: NormMetric

    @property
    def suffix(self) -> str:
        """What the names of its metrics end with; empty with one optimizer."""
        return self.norm.suffix

    @property
    def name(self) -> str:
        """The run's name, and the optimizer's if there are several."""
        return f"{self.run.name} · {self.suffix[1:]}" if self.suffix else self.run.name

    def metric(self, key: str) -> Series:
        """A metric by its name without the suffix; empty if it was not logged."""
        return self.run.metrics.get(key + self.suffix, Series.empty())

    @property
    def logged_norm(self) -> Series:
        """Norm of all gradients as it was logged: ours is that before clipping."""
        return self.run.metrics[self.norm.name]

    @cached_property
    def total_norm(self) -> Series:
        """Norm of all gradients: the finite ones, above 0."""
        finite = self.logged_norm.finite
        positive = finite.values > 0
        return finite if bool(positive.all()) else Series(finite.steps[positive], finite.values[positive])

    @property
    def steps_between_norms(self) -> float:
        """How far apart logged norms are, in the median; NaN with fewer than two."""
        gaps = np.diff(self.total_norm.steps)
        return float(np.median(gaps)) if len(gaps) else math.nan

    @property
    def has_every_step(self) -> bool:
        """Whether the norm of each step was logged, but for some that had none."""
        return self.steps_between_norms == 1.0

    @property
    def max_norm(self) -> Series:
        """The limit in force."""
        return self.metric(MAX_NORM).finite

    @property
    def has_local_norms(self) -> bool:
        """Whether the limit held for blocks by themselves: the norm of all gradients was above it after clipping."""
        clipped, limit = self.metric(CLIPPED_NORM).finite, self.max_norm
        _, first, second = np.intersect1d(clipped.steps, limit.steps, return_indices=True)
        return bool((clipped.values[first] > ROUNDING_TOLERANCE * limit.values[second]).any())

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

    @cached_property
    def skipped_steps(self) -> Series:
        """How many steps were skipped, from where the log begins; in a part of a run without those before it."""
        counts = self.metric(SKIPPED_STEPS).finite
        # the norms tell where the log begins: counts come at each epoch's end too, so that their steps keep no interval
        return Series(counts.steps, counts.values - counts.values[0]) if counts and self.metric(TOTAL_NORM).first_step else counts

    @property
    def skips(self) -> tuple[Steps, Values]:
        """Logged steps up to which more steps had been skipped than before, and how many more."""
        counts = self.skipped_steps
        more = np.diff(counts.values, prepend=0.0)
        return counts.steps[more > 0], more[more > 0]

    @property
    def steps(self) -> int:
        """How many steps the log tells of."""
        return 1 + max(int(series.steps[-1]) for series in self.run.metrics.values()) - self._first_step

    @property
    def _first_step(self) -> int:
        """The first step that the log tells of: 0, or 1 if others count steps that are done, as 10, 20, 30."""
        steps, first_step = self.logged_norm.steps, self.logged_norm.first_step
        counts_done = not self.norm.is_ours and len(steps) > 1 and int(steps[0]) == int(np.median(np.diff(steps)))
        return max(first_step, int(counts_done))

    @property
    def bad_steps(self) -> list[Mapping[str, Any]]:
        """The journal's entries for this optimizer."""
        return [bad for bad in self.run.bad_steps if bad.get("optimizer", "") == self.suffix[1:]]

    @property
    def clipped_share(self) -> float:
        """Share of all steps that were clipped, also of those that were not logged; NaN if nothing is known of it."""
        return self.clip_fraction.mean

    def blocks(self) -> dict[str, Series]:
        """The norms of blocks, by the blocks' names."""
        named = {key: self.norm.block(key) for key in self.run.metrics}
        blocks = {block: self.run.metrics[key].finite for key, block in named.items() if block}
        return blocks or self.with_prefix(BLOCK_NORM)

    def with_prefix(self, prefix: str) -> dict[str, Series]:
        """What was logged of each block, or of each limit, under a prefix."""
        return {
            key.removeprefix(prefix).removesuffix(self.suffix): series.finite
            for key, series in self.run.metrics.items()
            if key.startswith(prefix) and key.endswith(self.suffix)
        }

    @property
    def update_ratios(self) -> dict[str, Series]:
        """Norm of the update over the norm of the weights, for each block."""
        return self.with_prefix(UPDATE_RATIO)

    @property
    def shadows(self) -> dict[str, float]:
        """For each shadow limit the share of steps that it would have clipped."""
        shares = {name: series.mean for name, series in self.with_prefix(SHADOW_CLIP_FRACTION.format("")).items()}
        return {name: share for name, share in shares.items() if not math.isnan(share)}
