"""Percentiles of total_norm and clip fractions over a run and its epochs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clip_callbacks.core.decisions import Outcome
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
from clip_callbacks.stats.norm_history import NormHistory
from clip_callbacks.stats.sketch import NormSketch


class ClipCounts:
    """Numbers of steps and of clipped steps, over the run, this epoch, and since the last logged step.

    Attributes:
        steps: Number of steps of the run.
        clipped: Number of those that were clipped.
    """

    def __init__(self) -> None:
        self.steps = self.clipped = 0
        # both numbers as they were at the last logged step, and when the epoch began, so that a step raises two numbers only
        self._at_log = self._at_epoch = (0, 0)

    @property
    def fraction(self) -> float:
        """The fraction of the run's steps that were clipped; 0 without steps."""
        return self._fraction_since((0, 0))

    @property
    def fraction_since_logged(self) -> float:
        """The fraction of the steps since the last logged one that were clipped; 0 without steps."""
        return self._fraction_since(self._at_log)

    @property
    def fraction_of_epoch(self) -> float:
        """The fraction of this epoch's steps that were clipped; 0 without steps."""
        return self._fraction_since(self._at_epoch)

    @property
    def steps_since_logged(self) -> int:
        """The number of steps since the last logged one."""
        return self.steps - self._at_log[0]

    def begin_log(self) -> None:
        """Count from here as since the last logged step."""
        self._at_log = self.steps, self.clipped

    def begin_epoch(self) -> None:
        """Count from here as this epoch."""
        self._at_epoch = self.steps, self.clipped

    def _fraction_since(self, start: tuple[int, int]) -> float:
        steps, clipped = self._since(start)
        return clipped / steps if steps else 0.0

    def _since(self, start: tuple[int, int]) -> tuple[int, int]:
        return self.steps - start[0], self.clipped - start[1]

    def state(self) -> list[int]:
        """Return the numbers of steps and of clipped steps since the last logged step, of this epoch, and of the run."""
        return [*self._since(self._at_log), *self._since(self._at_epoch), self.steps, self.clipped]

    def load(self, state: Sequence[int]) -> None:
        """Continue from the counts of :meth:`state`."""
        logged_steps, logged_clipped, epoch_steps, epoch_clipped, self.steps, self.clipped = state
        self._at_log = self.steps - logged_steps, self.clipped - logged_clipped
        self._at_epoch = self.steps - epoch_steps, self.clipped - epoch_clipped


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
        self.clips = ClipCounts()
        self.rules: dict[str, ClipCounts] = {}
        self.shadows: dict[str, ClipCounts] = {}
        self.steps = 0
        self.last: StepRecord | None = None

    def add(self, report: StepRecord, *, is_new: bool, is_healthy: bool) -> None:
        """Count a step, and record its norms.

        Args:
            report: The report.
            is_new: True if the step is new; False if it is a further closure call.
            is_healthy: If True, the step's norms are recorded.
        """
        self.steps += is_new
        if not is_healthy:
            return
        self.last = report
        self.epoch_norms.add(report.total_norm)
        # counted here, since every step comes by: a method of ClipCounts and StepRecord.clipped are calls of Python
        self.clips.steps += 1
        self.clips.clipped += report.factors is not None
        for outcome in report.outcomes:
            if outcome.name:
                _count(outcome, self.rules)
        for outcome in report.shadows:
            if outcome.name:
                _count(outcome, self.shadows)

    def fractions(self) -> dict[str, float]:
        """Return the clip fractions since the last logged step, overall, by named rule, by shadow limit; empty without one."""
        if not self.clips.steps_since_logged:
            return {}
        fractions = {CLIP_FRACTION: self.clips.fraction_since_logged}
        fractions |= {RULE_CLIP_FRACTION.format(name): counts.fraction_since_logged for name, counts in self.rules.items()}
        fractions |= {SHADOW_CLIP_FRACTION.format(name): counts.fraction_since_logged for name, counts in self.shadows.items()}
        return fractions

    def epoch_metrics(self, *, clipping: bool) -> dict[str, float]:
        """Return the percentiles of total_norm and the clip fractions of this epoch; empty without a healthy step.

        Percentiles are exact up to 1,024 healthy steps an epoch, then within 1 %.

        Args:
            clipping: If True, the fraction over all rules is included.
        """
        percentiles = self.epoch_norms.percentiles(tuple(PERCENTILES))
        if percentiles is None:
            return {}
        metrics = dict(zip(PERCENTILES.values(), percentiles.tolist(), strict=True))
        if clipping:
            metrics[CLIP_FRACTION_EPOCH] = self.clips.fraction_of_epoch
        metrics |= {RULE_CLIP_FRACTION_EPOCH.format(name): counts.fraction_of_epoch for name, counts in self.rules.items()}
        metrics |= {SHADOW_CLIP_FRACTION_EPOCH.format(name): counts.fraction_of_epoch for name, counts in self.shadows.items()}
        return metrics

    def run_percentiles(self) -> list[float]:
        """Return the percentiles of total_norm over the run, each within 1 %; NaN without a healthy step."""
        norms = self.epoch_norms.sketch()
        norms.merge(self.run_norms)
        return [share.item() for share in norms.quantiles([percent / 100 for percent in PERCENTILES])]

    def keep_only(self, rules: Sequence[str], shadows: Sequence[str]) -> None:
        """Discard the counts of rules and shadow limits that only an earlier run had.

        Args:
            rules: Names of the rules to keep.
            shadows: Names of the shadow limits to keep.
        """
        self.rules = {name: counts for name, counts in self.rules.items() if name in rules}
        self.shadows = {name: counts for name, counts in self.shadows.items() if name in shadows}

    def begin_log(self) -> None:
        """Set the counts since the last logged step to 0."""
        for counts in self._all_counts():
            counts.begin_log()

    def end_epoch(self) -> None:
        """Add the norms of the epoch to those of the run, and set its counts to 0."""
        self.run_norms.merge(self.epoch_norms.sketch())
        self.epoch_norms.reset()
        for counts in self._all_counts():
            counts.begin_epoch()

    def _all_counts(self) -> Iterator[ClipCounts]:
        yield self.clips
        yield from self.rules.values()
        yield from self.shadows.values()

    def state_dict(self) -> dict[str, Any]:
        """Return all norms and counts, as tensors and numbers; how many does not depend on the length of the epoch."""
        return {
            "steps": self.steps,
            "counts": self.clips.state(),
            "norms": self.epoch_norms.state(),
            "run_norms": self.run_norms.state(),
            "rules": {name: counts.state() for name, counts in self.rules.items()},
            "shadows": {name: counts.state() for name, counts in self.shadows.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`."""
        self.steps = int(state["steps"])
        self.epoch_norms.load(state["norms"])
        self.run_norms.load(state["run_norms"])
        self.clips.load(state["counts"])
        for name, counts in state["rules"].items():
            self.rules.setdefault(name, ClipCounts()).load(counts)
        for name, counts in state["shadows"].items():
            self.shadows.setdefault(name, ClipCounts()).load(counts)


def _count(outcome: Outcome, counted: dict[str, ClipCounts]) -> None:
    """Count a healthy step of a rule or of a shadow limit, by its name."""
    assert outcome.name is not None
    counts = counted.get(outcome.name)
    if counts is None:
        counts = counted[outcome.name] = ClipCounts()
    counts.steps += 1
    counts.clipped += outcome.clips
