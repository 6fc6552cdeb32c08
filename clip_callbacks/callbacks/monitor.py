"""The callback GradientNormMonitor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from clip_callbacks.core.arguments import as_count_or_none, as_flag, as_norm_type
from clip_callbacks.core.blocks import SCOPES, Scope, Selection
from clip_callbacks.engine.base import GradientCallback
from clip_callbacks.engine.components import Parts
from clip_callbacks.engine.resume import State
from clip_callbacks.publishing.monitor_options import MonitorOptions
from clip_callbacks.publishing.norm_monitor import NormMonitor
from clip_callbacks.stats.advice import Advice, advise
from clip_callbacks.trainer.checks import CallbackFacts

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class GradientNormMonitor(GradientCallback):
    """Shows how large the gradients are: one norm per block on every logging step, and a suggested max_norm at the end of the fit.

    A block is a set of gradient entries that share one norm, for instance those of one layer. The callback changes nothing. Beside
    GradientClipping it costs no further read of the gradients; its norms are those before clipping.

    Metrics: ``grad_norm/<block>`` for each block of ``scope``, and the metrics of the total norm that every callback of this
    package logs. At the end of an epoch, over all its healthy steps, ``grad_norm_p50/<block>``, ``grad_norm_p90/<block>`` and
    ``grad_norm_p99/<block>``, each within 1 % (see :class:`~clip_callbacks.stats.sketch.NormSketch`). If a rule clips local norms,
    also ``grad_clip_fraction/<block>``, the fraction of these steps in which any rule made entries of the block smaller.

    One warning names each block that does not learn, once in a run, with likely causes: for an epoch, more than half of its entries
    had a gradient of exactly 0 in every step, although the backward pass reached their parameters; or their weights were bit for
    bit unchanged, although they had gradients and a learning rate above 0. An epoch of more than 1,000 healthy steps is judged
    every 1,000 steps, epochs of fewer than 100 together. ``grad_vanished/<block>`` at the end of an epoch is the share of these
    entries, the largest one if the epoch was judged several times. Frozen, unused and rarely used parameters do not count. A check
    reads 256 entries of each weight and gradient, on some of the logging steps, and needs 2 KiB of memory for each parameter.

    Args:
        scope: The gradient entries that share one norm: "global", "group", "layer" or "parameter". ("unit" would be thousands of
            metrics.)
        norm_type: The order p of the norm, above 0; "inf" is the maximum norm. Must be equal in all callbacks of one Trainer.
        every_n_steps: The least number of optimizer steps between two times that metrics of blocks are logged. None: they are
            logged on every logging step of the Trainer.
        include: A regular expression. If given, blocks have only those parameters in whose name ``re.search`` finds it.
        exclude: A regular expression. Parameters in whose name ``re.search`` finds it are in no block.
        top_k: The largest number of blocks to log: on each logging step those with the largest norms, at the end of an epoch those
            with the largest p99. None: all.
        log_update_ratio: If True, log ``update_ratio/<block>``: the norm of the change of the block's weights in the optimizer's
            step, divided by their norm before it. What hooks, averages or other optimizers change after the step does not count.
            Copies the parameters, on logging steps only. Nothing is logged for skipped steps, non-finite gradients, or weights
            that are all 0.
        log_weight_norm: If True, log ``weight_norm/<block>``: the norm of the block's trainable parameters before the step, of the
            order ``norm_type``. Reads the parameters, on logging steps only; beside ``log_update_ratio`` it costs no further read.
        log_statistics: If True, log statistics of the n entries g of the block's gradient before clipping:
            ``grad_mean/<block>``, the mean sum(g) / n; ``grad_std/<block>``, the population standard deviation
            sqrt(sum((g - mean)**2) / n); and ``grad_zeros/<block>``, the share of entries that are exactly 0, between 0 and 1.
            They are computed in float64, from the gradient after rescaling and without the loss scale. Entries that a sparse
            gradient does not store are zeros; parameters without a gradient have no entries; a complex entry counts as two, its
            real and its imaginary part. Nothing is logged for a block without a gradient, or with a non-finite one. Reads the
            gradients once more, on logging steps only, without a host sync before the step. Where ranks hold parts of the
            gradients, the statistics are those of whole tensors, by one collective; values of weights take another one.
        log_contributions: If True, log ``grad_contribution/<block>``, the fraction of the total norm (for p = 2, of the sum of
            squares) that is the block's, and ``grad_spill_over/<block>``, the fraction of the block's norm that clipping removed
            because of other blocks: 1 - a / b, where a is its norm after clipping, and b would be its norm after clipping with
            equal limits if all other gradients were 0.
        log_histograms: If True, log ``grad_histogram/<block>`` to TensorBoard and Weights & Biases: the numbers of entries of the
            block's gradient before clipping that lie between successive powers of 2. Reads the gradients once more, on logging
            steps only. Refused where ranks hold parts of the gradients.
        summary: If False, no callback of this package prints the messages that sum up a fit at its end. The table among them is
            printed after fits of at least 100 optimizer steps only.

    Raises:
        ValueError: If an argument is out of its range, or a pattern is no regular expression. At the start of fit, if a pattern
            matches no parameter.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientNormMonitor("parameter")], logger=False, enable_checkpointing=False)
    """

    _kind = "monitor"

    def __init__(
        self,
        scope: Scope = "layer",
        *,
        norm_type: float | Literal["inf"] = 2.0,
        every_n_steps: int | None = None,
        include: str | None = None,
        exclude: str | None = None,
        top_k: int | None = None,
        log_update_ratio: bool = False,
        log_weight_norm: bool = False,
        log_statistics: bool = False,
        log_contributions: bool = False,
        log_histograms: bool = False,
        summary: bool = True,
    ) -> None:
        if scope not in SCOPES or scope == "unit":
            raise ValueError(f"`scope` must be one of {', '.join(SCOPES[:-1])}, got {scope!r}.")
        self.scope: Scope = scope
        super().__init__()
        self.norm_type: float = as_norm_type(norm_type)
        self.every_n_steps = as_count_or_none(every_n_steps, "every_n_steps", least=1)
        self.include, self.exclude = include, exclude
        self.top_k = as_count_or_none(top_k, "top_k", least=1)
        self.log_update_ratio = as_flag(log_update_ratio, "log_update_ratio")
        self.log_weight_norm = as_flag(log_weight_norm, "log_weight_norm")
        self.log_statistics = as_flag(log_statistics, "log_statistics")
        self.log_contributions = as_flag(log_contributions, "log_contributions")
        self.log_histograms = as_flag(log_histograms, "log_histograms")
        self.summary = as_flag(summary, "summary")
        self._selection = Selection(include, exclude)

    @property
    def _stable_key(self) -> str:
        """The class with the scope: one Trainer may have several monitors, one for each scope."""
        return self._key(scope=self.scope)

    def _facts(self) -> CallbackFacts:
        options = {"log_histograms": self.log_histograms}
        return CallbackFacts(self._kind, self._stable_key, norm_type=self.norm_type, options=options)

    def _make_parts(self, trainer: Trainer, module: LightningModule, saved: dict[str, Any]) -> Parts:
        self._part = NormMonitor(self._monitor_options, saved)
        return Parts(monitor=self._part, norm_type=self.norm_type, summary=self.summary, histories=saved.get("history", {}))

    @property
    def _monitor_options(self) -> MonitorOptions:
        return MonitorOptions(
            scope=self.scope,
            selection=self._selection,
            norm_type=self.norm_type,
            every_n_steps=self.every_n_steps,
            top_k=self.top_k,
            log_update_ratio=self.log_update_ratio,
            log_weight_norm=self.log_weight_norm,
            log_statistics=self.log_statistics,
            log_contributions=self.log_contributions,
            log_histograms=self.log_histograms,
        )

    def _copy_for_search(self) -> None:
        """Steps of a search tell nothing about the run."""

    def _empty_state(self) -> dict[str, Any]:
        return {"norms": {}, "blocks": {}, "last_logged": {}, "vanished": {}}

    def _check_state(self, state: State) -> None:
        NormMonitor(self._monitor_options, state)

    def _carry_over(self, others: Sequence[State]) -> list[str]:
        # Total norms do not depend on the scope: a monitor without a state takes those of a monitor of another scope.
        reset = super()._carry_over(others)
        other = next((state for state in others if "norms" in state and "blocks" in state), None)
        if not self._saved and other:
            self._saved = {"history": {}, **self._empty_state(), "norms": other["norms"]}
        return reset

    def advice(self, index: int = 0) -> Advice | None:
        """Return a suggested max_norm, an adaptive limit, and the reason for both, from all healthy steps of the run.

        Args:
            index: The number of the optimizer.

        Returns:
            The advice; None before the first healthy step.
        """
        norms = self.state_dict()["norms"].get(index)
        return None if norms is None else advise(norms)
