"""What watches the norms of blocks in one fit: the part that GradientNormMonitor makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from clip_callbacks.core.actions import StepOutcome
from clip_callbacks.core.blocks import Partition, Scope, Selection
from clip_callbacks.core.measurement import block_norms
from clip_callbacks.core.metric_names import BLOCK_NORM, CONTRIBUTION, HISTOGRAM, NOISE_SCALE, SPILL_OVER, UPDATE_RATIO
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.publishing.histograms import block_codes
from clip_callbacks.stats.advice import advise
from clip_callbacks.stats.attribution import contributions, spill_over
from clip_callbacks.stats.block_history import BlockHistory, largest
from clip_callbacks.stats.histogram import Histogram
from clip_callbacks.stats.noise_scale import NoiseScale, WindowNorms
from clip_callbacks.stats.norm_history import NormHistory
from clip_callbacks.stats.update_ratio import WeightsBefore
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext


@dataclass(frozen=True)
class MonitorOptions:
    """The arguments of :class:`~clip_callbacks.GradientNormMonitor`, which documents them."""

    scope: Scope
    selection: Selection
    every_n_steps: int | None
    noise_scale: bool
    contributions: bool
    top_k: int | None
    update_ratio: bool
    histograms: bool


class Monitor:
    """Remembers the norms of one fit, and makes metrics of them.

    Args:
        options: What the monitor was told.
        saved: What :meth:`state_dict` returned, in a checkpoint; empty at the beginning of a run.
    """

    def __init__(self, options: MonitorOptions, saved: Mapping[str, Any]) -> None:
        self.options = options
        self._selected: dict[int, Selection | None] = {}
        self._norms: dict[int, NormHistory] = {}
        self._blocks: dict[int, BlockHistory] = {}
        self._noise = {int(index): NoiseScale(**estimate) for index, estimate in saved.get("noise", {}).items()}
        self._last_logged = {int(index): step for index, step in saved.get("last_logged", {}).items()}
        self._weights_before: dict[int, WeightsBefore] = {}
        self._codes: dict[int, Tensor] = {}
        for index, values in saved.get("norms", {}).items():
            self._norms[int(index)] = NormHistory()
            self._norms[int(index)].load(values)
        for index, counted in saved.get("blocks", {}).items():
            self._blocks[int(index)] = self._new_blocks()
            self._blocks[int(index)].load_state_dict(counted)

    def _new_blocks(self) -> BlockHistory:
        return BlockHistory(self.options.scope, self.options.selection)

    def attach(self, contexts: Sequence[OptimizerContext], names: Sequence[str], *, renewed: bool) -> None:
        """Have a history for each optimizer.

        Args:
            contexts: The optimizers that are new, or hold other parameters.
            names: The names of all parameters of the module.
            renewed: Whether an optimizer changed in the middle of a fit.

        Raises:
            ValueError: If a pattern matches no parameter.
        """
        if not renewed:
            held = [name for context in contexts for name in context.table.names]
            self.options.selection.check(list(dict.fromkeys([*names, *held])))
        for context in contexts:
            self._selected[context.index] = self.options.selection.among(context.table.names)
            self._norms.setdefault(context.index, NormHistory())
            self._blocks.setdefault(context.index, self._new_blocks()).attach(context.table)
            self._noise.setdefault(context.index, NoiseScale())

    @property
    def reads_before_write(self) -> bool:
        """Whether anything is to be kept from before a step that will be logged."""
        return self.options.update_ratio or self.options.histograms

    def before_write(self, step: StepContext) -> None:
        """Keep what a step that will be logged is about to change; its gradients are not yet written."""
        context = step.optimizer
        blocks = self._partition(context)
        if blocks is None or not self._is_due(context, context.history.steps + 1):
            return
        if self.options.update_ratio:
            self._weights_before[context.index] = WeightsBefore(context.table, blocks)
        if self.options.histograms:
            self._codes[context.index] = block_codes(step, blocks)

    def end_step(self, context: OptimizerContext, report: StepRecord, noise: WindowNorms | None) -> None:
        """Remember the norms of a healthy step.

        Args:
            context: The optimizer.
            report: What came of its step.
            noise: Norms of the window's micro-batches and of their mean, if they are known.
        """
        if report.outcome is not StepOutcome.TAKEN:
            return
        self._norms[context.index].add(report.total)
        self._blocks[context.index].add(report, context.table)
        if self.options.noise_scale and noise:
            self._noise[context.index].observe(noise.small, noise.big, noise.samples or 1)

    def readings(self, context: OptimizerContext, report: StepRecord) -> tuple[dict[str, float], dict[str, Histogram]]:
        """Metrics and histograms of the blocks, if it is time to log them, and the noise scale if there is an estimate."""
        metrics, histograms = self._of_blocks(context, report)
        if self.options.noise_scale and (noise := self._noise[context.index].value) is not None:
            metrics[NOISE_SCALE] = noise
        return metrics, histograms

    def _of_blocks(self, context: OptimizerContext, report: StepRecord) -> tuple[dict[str, float], dict[str, Histogram]]:
        before, codes = self._weights_before.pop(context.index, None), self._codes.pop(context.index, None)
        blocks = self._partition(context)
        if blocks is None or not self._is_due(context, context.history.steps):
            return {}, {}
        self._last_logged[context.index] = context.history.steps
        norms = block_norms(report.parameter_norms, blocks, report.norm_type)
        values = {BLOCK_NORM: norms}
        if self.options.contributions:
            values |= self._contributions(context, report, norms)
        if before and report.outcome is StepOutcome.TAKEN:
            values[UPDATE_RATIO] = before.ratios(report.norm_type)
        chosen = {place: blocks.names[place] for place in largest(norms, self.options.top_k)}
        numbers = {prefix: each.tolist() for prefix, each in values.items()}
        metrics = {prefix + name: each[place] for prefix, each in numbers.items() for place, name in chosen.items()}
        if codes is None:
            return metrics, {}
        counts = {HISTOGRAM + name: Histogram.of_codes(codes[place].cpu()) for place, name in chosen.items()}
        return metrics, {tag: histogram for tag, histogram in counts.items() if histogram}

    def end_epoch(self, context: OptimizerContext) -> dict[str, float]:
        """The metrics of the epoch, before another one begins."""
        metrics = self._blocks[context.index].metrics(self.options.top_k)
        self._blocks[context.index].end_epoch()
        return metrics

    def _is_due(self, context: OptimizerContext, steps: int) -> bool:
        every = self.options.every_n_steps
        return not every or steps - self._last_logged.get(context.index, 0) >= every

    def _partition(self, context: OptimizerContext, *, by_unit: bool = False) -> Partition | None:
        selection = self._selected[context.index]
        if selection is None:
            return None
        return context.table.partition(self.options.scope, selection, by_unit=by_unit)

    def _contributions(self, context: OptimizerContext, report: StepRecord, norms: Tensor) -> dict[str, Tensor]:
        # The factors of a step are those of its units where a rule clips units: norms and blocks must be of units then, too.
        parts, by_unit = report.parameter_norms, False
        if report.unit_norms is not None:
            parts, by_unit = report.unit_norms, True
        blocks = self._partition(context, by_unit=by_unit)
        assert blocks is not None
        return {
            CONTRIBUTION: contributions(norms, report.total, report.norm_type),
            SPILL_OVER: spill_over(report.outcomes, parts, report.factors, blocks, report.norm_type),
        }

    def reason_against_deferral(self, context: OptimizerContext) -> str | None:
        """Why the host must decide on steps of an optimizer, if it must."""
        if self.options.noise_scale:
            return "a GradientNormMonitor with noise_scale looks at the gradients after each backward pass"
        return None

    def summary(self, contexts: Sequence[OptimizerContext]) -> list[str]:
        """The advice for each optimizer."""
        advice = {context.suffix: advise(self._norms[context.index].values()) for context in contexts}
        return [f"GradientNormMonitor{suffix}: {each.describe()}" for suffix, each in advice.items() if each]

    def detach(self) -> None:
        """Let go of what is kept from before a step until it is logged."""
        self._weights_before.clear()
        self._codes.clear()

    def state_dict(self) -> dict[str, Any]:
        """The norms of the run, 8 bytes a step, and of the epoch's blocks, of one size."""
        return {
            "norms": {index: history.values() for index, history in self._norms.items()},
            "blocks": {index: history.state_dict() for index, history in self._blocks.items()},
            "last_logged": dict(self._last_logged),
            "noise": {index: asdict(estimate) for index, estimate in self._noise.items()},
        }
