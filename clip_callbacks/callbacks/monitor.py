"""GradientNormMonitor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from clip_callbacks.core.arguments import as_count_or_none, as_norm_type
from clip_callbacks.core.blocks import SCOPES, Scope, Selection
from clip_callbacks.engine.base import GradientCallback
from clip_callbacks.engine.components import Parts
from clip_callbacks.engine.resume import State
from clip_callbacks.publishing.monitor import Monitor, MonitorOptions
from clip_callbacks.stats.advice import Advice, advise
from clip_callbacks.trainer.checks import CallbackFacts

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

TWO = 2.0


class GradientNormMonitor(GradientCallback):
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
        summary: False leaves out the messages that sum up the run when a fit ends, those of the other callbacks of this package
            too. The table among them needs a fit of at least 100 optimizer steps.

    Raises:
        ValueError: If an argument is out of its range, a pattern is no regular expression, or ``noise_scale`` is asked for with
            another norm than the 2-norm. At the start of fit, if a pattern matches no parameter.

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
        noise_scale: bool = False,
        contributions: bool = False,
        params: str | None = None,
        exclude: str | None = None,
        top_k: int | None = None,
        update_ratio: bool = False,
        histograms: bool = False,
        summary: bool = True,
    ) -> None:
        if scope not in SCOPES or scope == "unit":
            raise ValueError(f"`scope` must be one of {', '.join(SCOPES[:-1])}, got {scope!r}.")
        self.scope: Scope = scope
        super().__init__()
        self.norm_type: float = as_norm_type(norm_type)
        if noise_scale and self.norm_type != TWO:
            raise ValueError(f"`norm_type` must be 2 beside noise_scale=True, got {norm_type!r}: the estimate is one of 2-norms.")
        self.every_n_steps = as_count_or_none(every_n_steps, "every_n_steps", least=1)
        self.noise_scale = noise_scale
        self.contributions = contributions
        self.params, self.exclude = params, exclude
        self.top_k = as_count_or_none(top_k, "top_k", least=1)
        self.update_ratio, self.histograms = update_ratio, histograms
        self.summary = summary
        self._selection = Selection(params, exclude)

    @property
    def _stable_key(self) -> str:
        """Several monitors may stand in one Trainer: one for each scope."""
        return self._key(scope=self.scope)

    def _facts(self) -> CallbackFacts:
        return CallbackFacts(self._kind, self._stable_key, norm_type=self.norm_type)

    def _make_parts(self, trainer: Trainer, module: LightningModule, saved: dict[str, Any]) -> Parts:
        self._part = Monitor(self._monitor_options, saved)
        return Parts(monitor=self._part, norm_type=self.norm_type, summary=self.summary, histories=saved.get("history", {}))

    @property
    def _monitor_options(self) -> MonitorOptions:
        return MonitorOptions(
            scope=self.scope,
            selection=self._selection,
            every_n_steps=self.every_n_steps,
            noise_scale=self.noise_scale,
            contributions=self.contributions,
            top_k=self.top_k,
            update_ratio=self.update_ratio,
            histograms=self.histograms,
        )

    def _copy_for_search(self) -> None:
        """Steps of a search tell nothing of the run."""

    def _empty_state(self) -> dict[str, Any]:
        return {"norms": {}, "blocks": {}, "last_logged": {}, "noise": {}}

    def _check_state(self, state: State) -> None:
        Monitor(self._monitor_options, state)

    def _carry_over(self, others: Sequence[State]) -> list[str]:
        """A monitor of another scope has seen the same norms of all gradients together."""
        anew = super()._carry_over(others)
        other = next((state for state in others if "norms" in state and "blocks" in state), None)
        if not self._saved and other:
            self._saved = {"history": {}, **self._empty_state(), "norms": other["norms"], "noise": other["noise"]}
        return anew

    def advice(self, index: int = 0) -> Advice | None:
        """A max_norm worth trying, a limit that sets itself, and why, from every healthy step of the run; None before the first.

        Args:
            index: The number of the optimizer.
        """
        norms = self.state_dict()["norms"].get(index)
        return None if norms is None else advise(norms)
