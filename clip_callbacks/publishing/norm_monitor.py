"""The norms of blocks in one fit: the part that GradientNormMonitor makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from clip_callbacks.core.actions import StepOutcome
from clip_callbacks.core.blocks import Partition, Selection
from clip_callbacks.core.measurement import block_norms
from clip_callbacks.core.metric_names import BLOCK_NORM, CONTRIBUTION, HISTOGRAM, SPILL_OVER, VANISHED
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.publishing.before_write import StateBeforeWrite
from clip_callbacks.publishing.histograms import check_histograms
from clip_callbacks.publishing.monitor import Monitor
from clip_callbacks.publishing.monitor_options import MonitorOptions
from clip_callbacks.stats.advice import advise
from clip_callbacks.stats.attribution import contributions, spill_over
from clip_callbacks.stats.block_history import BlockHistory, largest
from clip_callbacks.stats.histogram import Histogram
from clip_callbacks.stats.noise_scale import WindowNorms
from clip_callbacks.stats.norm_history import NormHistory
from clip_callbacks.stats.vanished_block import VanishedBlock, describe
from clip_callbacks.stats.vanishing import VanishingDetector
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

MAX_SEGMENTS = 16
"""Largest number of segments of a run whose norms are told apart, for a suggestion that sees whether the norm grew."""


class NormMonitor(Monitor):
    """Records the norms of blocks, makes metrics of them, and warns of blocks that do not learn.

    Args:
        options: The options of the callback.
        saved: A state from :meth:`state_dict`; empty at the beginning of a run.
    """

    reads_before_write = True

    def __init__(self, options: MonitorOptions, saved: Mapping[str, Any]) -> None:
        self.options = options
        self._selected: dict[int, Selection | None] = {}
        self._norms: dict[int, NormHistory] = {}
        self._blocks: dict[int, BlockHistory] = {}
        self._last_logged = {int(index): step for index, step in saved.get("last_logged", {}).items()}
        self._vanishing = {int(index): self._new_detector(named) for index, named in saved.get("vanished", {}).items()}
        self._vanished: dict[int, dict[str, VanishedBlock]] = {}  # of the current epoch, by the block's name
        self._before: dict[int, tuple[int, StateBeforeWrite]] = {}  # with the number of the step
        for index, values in saved.get("norms", {}).items():
            self._norms[int(index)] = NormHistory(MAX_SEGMENTS)
            self._norms[int(index)].load(values)
        for index, counted in saved.get("blocks", {}).items():
            self._blocks[int(index)] = self._new_blocks()
            self._blocks[int(index)].load_state_dict(counted)

    def _new_blocks(self) -> BlockHistory:
        return BlockHistory(self.options.scope, self.options.selection)

    def _new_detector(self, named: Iterable[str] = ()) -> VanishingDetector:
        return VanishingDetector(self.options.scope, self.options.selection, named)

    @override
    def check(self, trainer: Trainer, contexts: Sequence[OptimizerContext]) -> None:
        if self.options.log_histograms:
            check_histograms(trainer, contexts)

    @override
    def attach(self, contexts: Sequence[OptimizerContext], names: Sequence[str], *, renewed: bool) -> None:
        if not renewed:
            held = [name for context in contexts for name in context.table.names]
            self.options.selection.check(list(dict.fromkeys([*names, *held])))
        for context in contexts:
            self._selected[context.index] = self.options.selection.among(context.table.names)
            self._norms.setdefault(context.index, NormHistory(MAX_SEGMENTS))
            self._blocks.setdefault(context.index, self._new_blocks()).attach(context.table)
            self._vanishing.setdefault(context.index, self._new_detector()).attach(context.table, context.optimizer)

    @override
    def before_write(self, step: StepContext) -> None:
        context = step.optimizer
        self._vanishing[context.index].note_gradients()
        blocks = self._partition(context)
        if not self.options.read_before_write or blocks is None or not self._is_due(context, context.history.steps + 1):
            return
        self._discard_before(context.index)
        self._before[context.index] = context.steps + 1, StateBeforeWrite(step, blocks, self.options)

    def _discard_before(self, index: int) -> None:
        _, before = self._before.pop(index, (0, None))
        if before is not None:
            before.detach()

    @override
    def end_step(self, context: OptimizerContext, report: StepRecord, window: WindowNorms | None) -> None:
        if report.outcome is StepOutcome.TAKEN:
            self._norms[context.index].add(report.total_norm)
            self._blocks[context.index].add(report, context.table)
            self._vanishing[context.index].add(report)
        else:
            self._vanishing[context.index].discard()

    @override
    def readings(self, context: OptimizerContext, report: StepRecord) -> tuple[dict[str, float], dict[str, Histogram]]:
        number, before = self._before.pop(context.index, (0, None))
        if number != context.steps:  # against expectation, another step was taken before the log
            before = None
        detector = self._vanishing[context.index]
        detector.compare_weights()
        if detector.is_complete:
            self._judge(context)
        blocks = self._partition(context)
        if blocks is None or not self._is_due(context, context.history.steps):
            return {}, {}
        self._last_logged[context.index] = context.history.steps
        norms = block_norms(report.parameter_norms, blocks, report.norm_type)
        values = {BLOCK_NORM: norms}
        if self.options.log_contributions:
            values |= self._contributions(context, report, norms)
        if before is not None:
            values |= before.metrics(report.outcome)
        chosen = {place: blocks.names[place] for place in largest(norms, self.options.top_k)}
        numbers = {prefix: each.tolist() for prefix, each in values.items()}
        metrics = {prefix + name: each[place] for prefix, each in numbers.items() for place, name in chosen.items()}
        if before is None or before.codes is None:
            return metrics, {}
        counts = {HISTOGRAM + name: Histogram.of_codes(before.codes[place].cpu()) for place, name in chosen.items()}
        return metrics, {tag: histogram for tag, histogram in counts.items() if histogram}

    @override
    def end_epoch(self, context: OptimizerContext) -> Mapping[str, float]:
        metrics = self._blocks[context.index].metrics(self.options.top_k)
        self._blocks[context.index].end_epoch()
        if self._vanishing[context.index].is_due:
            self._judge(context)
        found = self._vanished.pop(context.index, {}).values()
        largest_shares = sorted(found, key=lambda block: -block.share)[: self.options.top_k]
        return metrics | {VANISHED + block.name: block.share for block in largest_shares}

    def _judge(self, context: OptimizerContext) -> None:
        """Find the blocks that did not learn in the span, and warn of those that are new."""
        detector = self._vanishing[context.index]
        steps = detector.steps
        found = detector.judge()
        of_epoch = self._vanished.setdefault(context.index, {})
        for block in found:  # a long epoch has several spans, of which the worst counts
            known = of_epoch.setdefault(block.name, block)
            of_epoch[block.name] = max(known, block, key=lambda each: each.share)
        if new := detector.name_new(found):
            text = describe(new, steps, context.history.steps)
            rank_zero_warn(f"GradientNormMonitor{context.suffix}: {text}", category=RuntimeWarning)

    def _is_due(self, context: OptimizerContext, steps: int) -> bool:
        every = self.options.every_n_steps
        return not every or steps - self._last_logged.get(context.index, 0) >= every

    def _partition(self, context: OptimizerContext, *, by_unit: bool = False) -> Partition | None:
        selection = self._selected[context.index]
        if selection is None:
            return None
        return context.table.partition(self.options.scope, selection, by_unit=by_unit)

    def _contributions(self, context: OptimizerContext, report: StepRecord, norms: Tensor) -> dict[str, Tensor]:
        # If a rule clips units, a step has one factor for each unit, so that the norms and the blocks must be those of units, too.
        parts, by_unit = report.parameter_norms, False
        if report.unit_norms is not None:
            parts, by_unit = report.unit_norms, True
        blocks = self._partition(context, by_unit=by_unit)
        assert blocks is not None
        return {
            CONTRIBUTION: contributions(norms, report.total_norm, report.norm_type),
            SPILL_OVER: spill_over(report.outcomes, parts, report.factors, blocks, report.norm_type),
        }

    @override
    def summary(self, contexts: Sequence[OptimizerContext]) -> list[str]:
        advice = {context.suffix: advise(self._norms[context.index].values()) for context in contexts}
        return [f"GradientNormMonitor{suffix}: {each.describe()}" for suffix, each in advice.items() if each]

    @override
    def detach(self) -> None:
        for index in list(self._before):
            self._discard_before(index)
        for detector in self._vanishing.values():
            detector.detach()

    @override
    def state_dict(self) -> dict[str, Any]:
        # No entry grows with the number of steps. A span of `VanishingDetector` begins anew after a resume: only the names of
        # blocks that were warned of are kept.
        return {
            "norms": {index: history.state() for index, history in self._norms.items()},
            "blocks": {index: history.state_dict() for index, history in self._blocks.items()},
            "last_logged": dict(self._last_logged),
            "vanished": {index: list(detector.named) for index, detector in self._vanishing.items()},
        }
