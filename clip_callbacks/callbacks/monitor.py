"""GradientNormMonitor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from torch import Tensor

from clip_callbacks.core.arguments import as_norm_type
from clip_callbacks.core.blocks import SCOPES, Partition, Scope, Selection
from clip_callbacks.core.measurement import TRUE, block_norms
from clip_callbacks.core.step_report import BLOCK_NORM, CONTRIBUTION, HISTOGRAM, NOISE_SCALE, SPILL_OVER, UPDATE_RATIO, StepReport
from clip_callbacks.engine.base import Member
from clip_callbacks.publishing.histograms import block_codes
from clip_callbacks.stats.advice import Advice, advise
from clip_callbacks.stats.attribution import contributions, spill_over
from clip_callbacks.stats.block_history import BlockHistory, largest
from clip_callbacks.stats.histogram import Histogram
from clip_callbacks.stats.noise_scale import NoiseScale
from clip_callbacks.stats.norm_history import NormHistory
from clip_callbacks.stats.update_ratio import WeightsBefore
from clip_callbacks.trainer.optimizer_context import Lane

TWO = 2.0


class GradientNormMonitor(Member):
    """Shows how large the gradients are: a norm for each block on every logging step, and at the end a max_norm worth trying.

    Changes nothing. Beside a GradientClipping it costs no further read of the gradients; its norms are those before clipping.

    Metrics: ``grad_norm/<block>`` for each block of ``scope``, and those that the whole family logs. At the end of an epoch
    ``grad_norm_p50/<block>``, ``_p90`` and ``_p99`` over all its healthy steps, each within 1 % (see
    :class:`~clip_callbacks.stats.sketch.NormSketch`); and where a rule clips local norms ``grad_clip_fraction/<block>``, the share
    of these steps in which rules made any entry of the block smaller.

    Args:
        scope: Which entries share one norm: "global", "group", "layer" or "parameter". (A metric for each "unit" would be
            thousands.)
        norm_type: The order p of the norm, above 0; "inf" is the maximum norm. The same as GradientClipping's in the same Trainer.
        every_n_steps: Log what there is of blocks only every so many optimizer steps; None: on every logging step of the Trainer.
        noise_scale: Whether to estimate the gradient noise scale from the micro-batches of accumulation windows and log it as
            ``grad/noise_scale``, in samples (in micro-batches where a batch's tensors are of several lengths): about the batch
            beyond which more samples in a step stop to pay. Reads the gradients after each backward pass, and needs room for those
            of one micro-batch. McCandlish et al., arXiv 1812.06162; see :class:`~clip_callbacks.stats.noise_scale.NoiseScale`.
        contributions: Whether to log for each block ``grad_contribution/<block>``, its share of the total norm (of the sum of
            squares, for p = 2), and ``grad_spill_over/<block>``, the share of its norm that clipping took because of other blocks:
            1 less its norm after clipping over what that would be if all other gradients were 0, the limits being what they are.
        params: A regular expression; blocks are made of parameters in whose name ``re.search`` finds it. None: of all.
        exclude: A regular expression; parameters in whose name ``re.search`` finds it are in no block.
        top_k: Log only so many blocks: on each logging step those with the largest norms, at the end of an epoch those with the
            largest p99. None: all.
        update_ratio: Whether to log ``update_ratio/<block>``, how far the step moved the block's weights as a share of their norm
            before it. Copies the parameters, on logging steps only. Nothing is logged for a step that is skipped or whose
            gradients are not finite, nor for weights of 0.
        histograms: Whether to log ``grad_histogram/<block>``, how many entries of the block's gradient before clipping lie between
            which powers of two, to TensorBoard and Weights & Biases. Reads the gradients once more, on logging steps only. Not
            where ranks hold parts of them.

    Raises:
        ValueError: If an argument is out of its range, a pattern is no regular expression, or ``noise_scale`` is asked for with
            another norm than the 2-norm. At the start of fit, if a pattern matches no parameter.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientNormMonitor("parameter")], logger=False, enable_checkpointing=False)
    """

    kind = "monitor"

    def __init__(
        self,
        scope: Scope = "layer",
        *,
        norm_type: float | Literal["inf"] = 2.0,
        every_n_steps: int | None = None,
        noise_scale: bool = False,
        contributions: bool = False,
        params: str | None = None,
        exclude: str | None = None,
        top_k: int | None = None,
        update_ratio: bool = False,
        histograms: bool = False,
    ) -> None:
        if scope not in SCOPES or scope == "unit":
            raise ValueError(f"`scope` must be one of {', '.join(SCOPES[:-1])}, got {scope!r}.")
        self.scope: Scope = scope
        super().__init__()
        for argument, value in (("every_n_steps", every_n_steps), ("top_k", top_k)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{argument}` must be a whole number of at least 1, or None, got {value!r}.")
        self.norm_type: float = as_norm_type(norm_type)
        if noise_scale and self.norm_type != TWO:
            raise ValueError(f"`norm_type` must be 2 beside noise_scale=True, got {norm_type!r}: the estimate is one of 2-norms.")
        self.every_n_steps = every_n_steps
        self.noise_scale = noise_scale
        self.contributions = contributions
        self.params, self.exclude, self.top_k = params, exclude, top_k
        self.update_ratio, self.histograms = update_ratio, histograms
        self._selection = Selection(params, exclude)
        self._selected: dict[int, Selection | None] = {}
        self._noise: dict[int, NoiseScale] = {}
        self._norms: dict[int, NormHistory] = {}
        self._blocks: dict[int, BlockHistory] = {}
        self._last_logged: dict[int, int] = {}
        self.release()

    @property
    def _stable_key(self) -> str:
        """Several monitors may stand in one Trainer: one for each scope."""
        return self._generate_state_key(scope=self.scope)

    def bind(self, lanes: Sequence[Lane], names: Sequence[str], *, renew: bool = False) -> None:
        """Have a history for each optimizer.

        Raises:
            ValueError: If a pattern matches no parameter.
        """
        super().bind(lanes, names, renew=renew)
        if not renew:
            self._selection.check(list(dict.fromkeys([*names, *(name for lane in lanes for name in lane.table.names)])))
        for lane in lanes:
            self._selected[lane.index] = self._selection.among(lane.table.names)
            self._norms.setdefault(lane.index, NormHistory())
            self._blocks.setdefault(lane.index, self._new_blocks()).bind(lane.table)
            self._noise.setdefault(lane.index, NoiseScale())

    def _new_blocks(self) -> BlockHistory:
        return BlockHistory(self.scope, self._selection)

    def forget(self) -> None:
        """Begin a new run."""
        super().forget()
        self._norms, self._blocks, self._last_logged, self._noise = {}, {}, {}, {}

    def release(self) -> None:
        """Let go of what is kept from before a step until it is logged."""
        self._before: dict[int, WeightsBefore] = {}
        self._codes: dict[int, Tensor] = {}

    @property
    def looks(self) -> bool:
        """Whether anything is to be kept from before a step that will be logged."""
        return self.update_ratio or self.histograms

    def look(self, lane: Lane, loss_scale: Tensor | None) -> None:
        """Keep what a step that will be logged is about to change.

        Args:
            lane: The optimizer, its gradients not yet written.
            loss_scale: What they are still multiplied by, 0-dim; None is 1.
        """
        blocks = self._partition(lane)
        if blocks is None or not self._is_due(lane, lane.history.steps + 1):
            return
        if self.update_ratio:
            self._before[lane.index] = WeightsBefore(lane.table, blocks)
        if self.histograms:
            self._codes[lane.index] = block_codes(lane, blocks, loss_scale)

    def observe(self, lane: Lane, report: StepReport, *, healthy: bool) -> None:
        """Remember the norms of a healthy step."""
        super().observe(lane, report, healthy=healthy)
        if healthy:
            self._norms[lane.index].add(report.total)
            self._blocks[lane.index].add(report, lane.table)
        if healthy and self.noise_scale and lane.noise:
            self._noise[lane.index].observe(lane.noise.small, lane.noise.big, lane.noise.samples or 1)

    def readings(self, lane: Lane, report: StepReport) -> tuple[dict[str, float], dict[str, Histogram]]:
        """Metrics and histograms of the blocks, if it is time to log them, and the noise scale if there is an estimate."""
        noise = self._noise[lane.index].value if self.noise_scale else None
        metrics, histograms = self._of_blocks(lane, report)
        return metrics | ({} if noise is None else {NOISE_SCALE: noise}), histograms

    def _of_blocks(self, lane: Lane, report: StepReport) -> tuple[dict[str, float], dict[str, Histogram]]:
        before, codes = self._before.pop(lane.index, None), self._codes.pop(lane.index, None)
        blocks = self._partition(lane)
        if blocks is None or not self._is_due(lane, lane.history.steps):
            return {}, {}
        self._last_logged[lane.index] = lane.history.steps
        norms = block_norms(report.parameter_norms, blocks, report.norm_type)
        values = {BLOCK_NORM: norms} | (self._contributions(lane, report, norms) if self.contributions else {})
        if before and report.finite is TRUE and report.skipped is not TRUE:
            values[UPDATE_RATIO] = before.ratios(report.norm_type)
        chosen = {place: blocks.names[place] for place in largest(norms, self.top_k)}
        numbers = {prefix: each.tolist() for prefix, each in values.items()}
        metrics = {prefix + name: each[place] for prefix, each in numbers.items() for place, name in chosen.items()}
        counts = (
            {} if codes is None else {HISTOGRAM + name: Histogram.of_codes(codes[place].cpu()) for place, name in chosen.items()}
        )
        return metrics, {tag: histogram for tag, histogram in counts.items() if histogram}

    def end_epoch(self, lane: Lane) -> dict[str, float]:
        """The metrics of the epoch, before another one begins."""
        metrics = self._blocks[lane.index].metrics(self.top_k)
        self._blocks[lane.index].end_epoch()
        return metrics

    def _is_due(self, lane: Lane, steps: int) -> bool:
        return not self.every_n_steps or steps - self._last_logged.get(lane.index, 0) >= self.every_n_steps

    def _partition(self, lane: Lane, *, by_unit: bool = False) -> Partition | None:
        selection = self._selected[lane.index]
        return None if selection is None else lane.table.partition(self.scope, selection, by_unit=by_unit)

    def _contributions(self, lane: Lane, report: StepReport, norms: Tensor) -> dict[str, Tensor]:
        parts = report.parameter_norms if report.unit_norms is None else report.unit_norms
        blocks = self._partition(lane, by_unit=report.unit_norms is not None)
        assert blocks is not None
        return {
            CONTRIBUTION: contributions(norms, report.total, report.norm_type),
            SPILL_OVER: spill_over(report.outcomes, parts, report.factors, blocks, report.norm_type),
        }

    def advice(self, index: int = 0) -> Advice | None:
        """A max_norm worth trying, a limit that sets itself, and why, from every healthy step of the run; None before the first.

        Args:
            index: Number of the optimizer.
        """
        return advise(self._norms[index].values()) if index in self._norms else None

    def summary(self, lanes: Sequence[Lane]) -> list[str]:
        """The advice for each optimizer."""
        advice = {lane.suffix: self.advice(lane.index) for lane in lanes}
        return [f"GradientNormMonitor{suffix}: {each.describe()}" for suffix, each in advice.items() if each]

    def state_dict(self) -> dict[str, Any]:
        """The norms of the run, 8 bytes a step, and of the epoch's blocks, of one size."""
        state = super().state_dict()
        norms = {index: history.values() for index, history in self._norms.items()}
        noise = {index: asdict(estimate) for index, estimate in self._noise.items()}
        blocks = {index: history.state_dict() for index, history in self._blocks.items()}
        return state | {"norms": norms, "blocks": blocks, "last_logged": dict(self._last_logged), "noise": noise}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is not one of this callback.
        """
        super().load_state_dict(state_dict)
        for index, values in state_dict["norms"].items():
            self._norms[int(index)] = NormHistory()
            self._norms[int(index)].load(values)
        for index, counted in state_dict["blocks"].items():
            self._blocks[int(index)] = self._new_blocks()
            self._blocks[int(index)].load_state_dict(counted)
        self._last_logged = {int(index): step for index, step in state_dict["last_logged"].items()}
        self._noise = {int(index): NoiseScale(**estimate) for index, estimate in state_dict["noise"].items()}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without what is kept in the middle of a step."""
        return super().__getstate__() | {"_before": {}, "_codes": {}}
