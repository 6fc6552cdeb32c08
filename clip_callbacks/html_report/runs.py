"""The log of a run in one form, whichever logger wrote it: metrics over steps, the guard's journal, notes of the reader."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from clip_callbacks.bundles.terminal import escaped
from clip_callbacks.core.metric_names import (
    AMP_SCALE,
    BLOCK_NORM,
    CLIP_COEF,
    CLIP_FRACTION,
    CLIPPED_NORM,
    MAX_NORM,
    OVERFLOWED_STEPS,
    SHADOW_CLIP_FRACTION,
    SKIPPED_STEPS,
    TOTAL_NORM,
    UPDATE_RATIO,
)
from clip_callbacks.core.wording import plural
from clip_callbacks.html_report.norm_metrics import (
    MAX_LISTED_METRICS,
    NORM_WORDS,
    OWN_METRIC,
    NormMetric,
    find_norms,
    norms_of_others,
    words_of,
)
from clip_callbacks.html_report.series import LAST_STEP, Series, Steps, Values
from clip_callbacks.html_report.spikes import Spikes, norm_spikes

ROUNDING_FACTOR = 1.001
"""A clipped norm may exceed its limit by this factor through rounding alone."""
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
"""Words in the names of metrics that are losses."""
FACTOR_WORDS = {"weight", "weights", "scale", "coef", "coefficient", "lambda"}
"""Words in the names of metrics that are factors of a loss, as loss_weight is."""
JOURNAL_ALONE = "journal"
"""The kind of log of a run of which nothing but the guard's journal was found."""
TRANSFORMERS = "transformers"
"""The kind of log that the Trainer of Hugging Face transformers leaves in its checkpoints."""
PREFIXED_METRIC = re.compile(rf"(.+-)(?:{TOTAL_NORM}|{SKIPPED_STEPS})(-|$)")
"""The name of a metric of ours behind the prefix that a logger was given."""
SKIP_POLICY = "skip"
"""The policy of a journalled step that grad/skipped_steps counts; other policies count steps elsewhere, or micro-batches."""


class UnusableLogError(ValueError):
    """A log cannot be used; the message is one line that says which log and why."""


@dataclass(frozen=True, eq=False)
class Run:
    """The log of one run.

    Args:
        name: Name of the run, which differs from those of the other runs on the page.
        source: File, folder or address that the log was read from.
        metrics: The logged metrics by their names.
        kind: Kind of log: "CSV", "TensorBoard", "MLflow" or "transformers"; "journal" if nothing but the journal was found.
        bad_steps: The guard's journal, one dictionary per bad step.
        notes: Remarks of the reader, in sentences.
        norms: The metrics that are norms of all gradients; None finds them by their names.
        whole: The run that this one is a part of; None if it is whole.
    """

    name: str
    source: str
    metrics: Mapping[str, Series]
    kind: str = "CSV"
    bad_steps: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    norms: tuple[NormMetric, ...] | None = None
    whole: Run | None = None

    @classmethod
    def of(cls, name: str, source: str, metrics: Mapping[str, Series], kind: str, notes: Sequence[str] = ()) -> Run:
        """Make a run from its metrics: remove the prefix that its logger may have been given, and add a note if steps go back.

        Characters in names that cannot be printed are replaced by their escape codes: plots, pages and terminals do not take them.
        """
        name, source = escaped(name), escaped(source)
        metrics = {escaped(key): series for key, series in metrics.items()}
        prefix = next((match[1] for key in metrics if (match := PREFIXED_METRIC.match(key))), "")
        if prefix and TOTAL_NORM not in metrics and SKIPPED_STEPS not in metrics:
            metrics = {key.removeprefix(prefix): series for key, series in metrics.items()}
        superseded = max((series.superseded for series in metrics.values()), default=0)
        if superseded:
            points, are = plural(superseded, "point", "points"), plural(superseded, "is", "are")
            part = "a part that was run again, as after a resume,"
            notes = [*notes, f"Steps go back: {superseded} {points} of {part} {are} left out."]
        return cls(name, source, metrics, kind, notes=tuple(notes))

    def between(self, first: int | None, last: int | None) -> Run:
        """Return the run from one step to another, both included; None leaves that end open."""
        metrics = {key: part for key, series in self.metrics.items() if (part := series.between(first, last))}
        low, high = first or 0, last
        if high is None:
            high = LAST_STEP
        bad_steps = tuple(bad for bad in self.bad_steps if low <= int(bad.get("step", 0)) <= high)
        return replace(self, metrics=metrics, bad_steps=bad_steps, whole=self)

    def with_norms(self, wanted: Sequence[str] = ()) -> Run:
        """Return the run with its norms chosen: those wanted, or those found by name, with a note if others could be meant."""
        norms = find_norms(self.metrics, wanted, self._journalled_suffixes)
        read = [norm.name for norm in norms]
        others = [norm.name for norm in norms_of_others(self.metrics) if norm.name not in read]
        if not read or not others or wanted:
            return replace(self, norms=norms)
        listed = ", ".join(others[:MAX_LISTED_METRICS])
        note = f"The norm of all gradients was read from {', '.join(read)}. Use --norm to read another metric: {listed}."
        return replace(self, norms=norms, notes=(*self.notes, note))

    @cached_property
    def optimizer_logs(self) -> list[OptimizerLog]:
        """The logs of the optimizers: one for each norm of all gradients, or for each count of skipped steps."""
        norms = self.norms
        if norms is None:
            norms = find_norms(self.metrics, journalled=self._journalled_suffixes)
        return [OptimizerLog(self, norm) for norm in norms if self._tells_of(norm)]

    def _tells_of(self, norm: NormMetric) -> bool:
        """Return whether the log tells of an optimizer: if all its steps were bad, by their count and in the journal only."""
        if norm.name in self.metrics:
            return True
        return norm.is_ours and (SKIPPED_STEPS + norm.suffix in self.metrics or norm.suffix in self._journalled_suffixes)

    @property
    def _journalled_suffixes(self) -> set[str]:
        """Suffixes of the metrics of those optimizers that are in the journal."""
        return {f"-{optimizer}" if (optimizer := bad.get("optimizer")) else "" for bad in self.bad_steps}

    @property
    def last_step(self) -> int:
        """The last step that was logged; that of the journal if nothing was."""
        logged = [int(series.steps[-1]) for series in self.metrics.values()]
        return max(logged or [int(bad["step"]) for bad in self.bad_steps])

    def is_same_run_as(self, other: Run) -> bool:
        """Return whether two logs are of one run: one is the beginning of the other, in the norms and in every shared metric."""
        if len(self.optimizer_logs) != len(other.optimizer_logs):
            return False
        norms = [(log.logged_norm, like.logged_norm) for log, like in zip(self.optimizer_logs, other.optimizer_logs, strict=True)]
        shared = [(series, other.metrics[key]) for key, series in self.metrics.items() if key in other.metrics]
        has_enough_points = any(min(len(one), len(two)) > 1 for one, two in norms)  # two runs may agree in one point by chance
        return has_enough_points and all(one.agrees_with(two) for one, two in norms + shared)

    def losses(self, wanted: tuple[str, ...] = ()) -> dict[str, Series]:
        """Return the losses: those wanted, or those found by name; means of epochs only if those of steps are not logged."""
        if wanted:
            return {key: self.metrics[key] for key in wanted if key in self.metrics}
        words = {key: words_of(key) for key in self.metrics if not OWN_METRIC.match(key)}
        found = [key for key in words if _says_loss(words[key]) and not words[key] & (FACTOR_WORDS | NORM_WORDS)]
        by_step = {key.removesuffix("_step") for key in found if key.endswith("_step")}
        return {key: self.metrics[key] for key in found if key.removesuffix("_epoch") not in by_step or not key.endswith("_epoch")}


def _says_loss(words: set[str]) -> bool:
    """Return whether words name a loss; "entropy" alone may be that of a policy."""
    return bool(words & LOSS_WORDS) or {"cross", "entropy"} <= words


@dataclass(frozen=True, eq=False)
class OptimizerLog:
    """The log of one optimizer of a run.

    Args:
        run: The run that the optimizer belongs to.
        norm: The metric that is the norm of all gradients of this optimizer.
    """

    run: Run
    norm: NormMetric

    @property
    def suffix(self) -> str:
        """Suffix of the optimizer's metrics; empty if the run has one optimizer."""
        return self.norm.suffix

    @property
    def name(self) -> str:
        """Name of the run, followed by that of the optimizer if there are several."""
        if not self.suffix:
            return self.run.name
        return f"{self.run.name} · {self.suffix[1:]}"

    def metric(self, key: str) -> Series:
        """Return a metric by its name without the suffix; an empty series if it was not logged."""
        return self.run.metrics.get(key + self.suffix, Series.empty())

    @property
    def logged_norm(self) -> Series:
        """Norm of all gradients as it was logged; clip_callbacks logs the norm before clipping."""
        return self.run.metrics.get(self.norm.name, Series.empty())

    @cached_property
    def total_norm(self) -> Series:
        """Norm of all gradients where it is finite and above 0."""
        finite = self.logged_norm.finite
        return finite.where(finite.values > 0)

    @cached_property
    def norm_spikes(self) -> Spikes:
        """Logged norms that are far above those of neighbouring steps."""
        return norm_spikes(self.total_norm)

    @property
    def steps_between_norms(self) -> float:
        """Median number of steps from one logged norm to the next; NaN with fewer than two norms."""
        return self.total_norm.steps_between

    @property
    def has_every_step(self) -> bool:
        """Whether the norm of every optimizer step was logged, except for steps without a norm."""
        return self.steps_between_norms == 1.0

    @property
    def max_norm(self) -> Series:
        """The limit in force."""
        return self.metric(MAX_NORM).finite

    @cached_property
    def has_local_norms(self) -> bool:
        """Whether the limit held for the norm of each block: only then can the norm of all gradients exceed it after clipping."""
        clipped, limit = self.metric(CLIPPED_NORM).finite, self.max_norm
        _, first, second = np.intersect1d(clipped.steps, limit.steps, return_indices=True)
        return bool((clipped.values[first] > ROUNDING_FACTOR * limit.values[second]).any())

    @property
    def clip_coef(self) -> Series:
        """The clipping coefficient, clipped_norm / total_norm."""
        return self.metric(CLIP_COEF).finite

    @property
    def clip_fraction(self) -> Series:
        """Share of the optimizer steps since the last logged one that were clipped."""
        return self.metric(CLIP_FRACTION).finite

    @property
    def amp_scale(self) -> Series:
        """The loss scale of the GradScaler."""
        return self.metric(AMP_SCALE).finite

    @cached_property
    def skipped_steps(self) -> Series:
        """Number of optimizer steps skipped so far; a log that begins in mid-run counts from its own beginning.

        The journal tells of steps that were skipped after the last logged count.
        """
        counts, first, last = self._counted_from_first_step(SKIPPED_STEPS), 0, LAST_STEP
        if counts:
            first = int(counts.steps[-1]) + 1
            # a journal may also hold bad steps of a longer run that had the same folder before
            last = first + int(np.diff(counts.steps, prepend=-1)[-1])
        later = self._journalled_skips(first, last)
        values = np.nan_to_num(counts.last) + np.arange(1.0, 1 + len(later))
        return Series(np.append(counts.steps, later), np.append(counts.values, values))

    @cached_property
    def overflowed_steps(self) -> Series:
        """Number of optimizer steps that overflowed in float16 so far, which the GradScaler skipped; counted as skipped_steps."""
        return self._counted_from_first_step(OVERFLOWED_STEPS)

    def _counted_from_first_step(self, key: str) -> Series:
        counts = self.metric(key).finite
        return replace(counts, values=counts.values - self._count_before_first_step(key))

    def _count_before_first_step(self, key: str) -> float:
        """Return a count as it was before the first step of the log.

        The log of a resumed run begins with a count that includes its first logging interval. The journal tells which steps were
        skipped there. Without a journal, and for overflows, that interval is left out of the count.
        """
        counts = self.metric(key).finite
        if not counts or not self.first_step:
            return 0.0
        if self.run.whole:
            whole = OptimizerLog(self.run.whole, self.norm)
            before = whole.metric(key).finite.between(None, self.first_step - 1)
            return before.last if before else whole._count_before_first_step(key)
        skipped = 0
        if key == SKIPPED_STEPS:
            skipped = len(self._journalled_skips(self.first_step, int(counts.steps[0])))
        return max(0.0, float(counts.values[0]) - skipped)

    def _journalled_skips(self, first: int, last: int) -> Steps:
        """Return the steps from one to another, both included, that were skipped according to the journal."""
        steps = np.unique(np.array([bad["step"] for bad in self.bad_steps if bad.get("policy") == SKIP_POLICY], dtype=np.int64))
        return steps[(first <= steps) & (steps <= last)]

    @property
    def skips(self) -> tuple[Steps, Values]:
        """Logged steps at which the number of skipped steps had grown, and by how much."""
        counts = self.skipped_steps
        growth = np.diff(counts.values, prepend=0.0)
        return counts.steps[growth > 0], growth[growth > 0]

    @property
    def step_count(self) -> int:
        """Number of optimizer steps that the log covers."""
        last = self.run.last_step
        if self.skipped_steps:
            last = max(last, int(self.skipped_steps.steps[-1]))
        return 1 + last - max(self.first_step, int(self._counts_finished_steps))

    @cached_property
    def first_step(self) -> int:
        """The first step that the log covers.

        The norm tells the interval of logging, since other metrics also come at the ends of epochs. But the first steps may have
        no norm, as when they overflow: then other metrics are logged before it, or the steps are in the journal. A metric of one
        point does not count: TensorBoardLogger writes hp_metric at step 0, also in a resumed run.
        """
        measured = self.logged_norm or self.metric(SKIPPED_STEPS)
        others = [int(series.steps[0]) for series in self.run.metrics.values() if len(series) > 1]
        journalled = [int(bad["step"]) for bad in self.bad_steps]
        if measured or not journalled:
            others.append(measured.first_step)
        return min([*others, *journalled])

    @property
    def _counts_finished_steps(self) -> bool:
        """Whether steps are counted from 1, as by other packages that log the number of finished steps: 10, 20, 30."""
        steps = self.logged_norm.steps
        return not self.norm.is_ours and len(steps) > 1 and int(steps[0]) == int(np.median(np.diff(steps)))

    @property
    def bad_steps(self) -> list[Mapping[str, Any]]:
        """The journal's entries for this optimizer."""
        return [bad for bad in self.run.bad_steps if bad.get("optimizer", "") == self.suffix[1:]]

    @property
    def clipped_share(self) -> float:
        """Share of all optimizer steps that were clipped, whether they were logged or not; NaN if it is unknown."""
        return self.clip_fraction.mean

    def blocks(self) -> dict[str, Series]:
        """Return the norms of the blocks by the blocks' names."""
        named = {key: self.norm.block(key) for key in self.run.metrics}
        blocks = {block: self.run.metrics[key].finite for key, block in named.items() if block}
        return blocks or self.with_prefix(BLOCK_NORM)

    def with_prefix(self, prefix: str) -> dict[str, Series]:
        """Return the metrics of blocks or limits under a prefix, by the names of the blocks or limits."""
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
        """For each shadow limit, the share of optimizer steps that it would have clipped."""
        shares = {name: series.mean for name, series in self.with_prefix(SHADOW_CLIP_FRACTION.format("")).items()}
        return {name: share for name, share in shares.items() if not math.isnan(share)}
