"""The callback GradientNoiseScale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clip_callbacks.engine.base import GradientCallback
from clip_callbacks.engine.components import Parts
from clip_callbacks.engine.resume import State
from clip_callbacks.publishing.noise_scale_monitor import NoiseScaleMonitor
from clip_callbacks.trainer.checks import CallbackFacts

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

NORM_TYPE = 2.0
"""The order of the norms of which the estimate is made."""


class GradientNoiseScale(GradientCallback):
    r"""Estimates how large a batch is worth using: the gradient noise scale, in samples.

    Far below the noise scale a batch twice as large trains about as well as twice as many steps; far above it most of the
    additional samples are wasted. The estimate compares the gradients :math:`g_i` of the k micro-batches of an accumulation window
    with their mean :math:`\bar g`. It is

    .. math:: B_{\text{simple}} = \frac{\operatorname{tr}(\Sigma)}{|G|^2},

    where :math:`G` is the true gradient and :math:`\Sigma` the covariance matrix of the gradient of one sample; numerator and
    denominator are running means over about the last hundred windows. :class:`~clip_callbacks.stats.noise_scale.NoiseScale` has
    the formulas.

    The callback changes no gradient. It measures the gradients after each backward pass, and needs memory for those of one
    micro-batch. The Trainer must accumulate (``accumulate_grad_batches`` above 1), and all micro-batches of a window must have the
    same number of samples; other windows are left out.

    Metric: ``grad/noise_scale`` on logging steps, as soon as the estimate is positive. Its unit is one sample, or one micro-batch
    where the tensors of a batch have different lengths.

    Source: McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A.1.

    Raises:
        ValueError: At the start of fit, with several ranks, manual optimization, LBFGS, ``training_step(dataloader_iter)``, a
            ``weight`` of AccumulationRescaling, or a ``norm_type`` other than 2 of another callback.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> callbacks = [GradientNoiseScale()]
        >>> trainer = Trainer(accumulate_grad_batches=8, callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    _kind = "noise scale"

    def _facts(self) -> CallbackFacts:
        return CallbackFacts(self._kind, self._stable_key, norm_type=NORM_TYPE)

    def _make_parts(self, trainer: Trainer, module: LightningModule, saved: dict[str, Any]) -> Parts:
        self._part = NoiseScaleMonitor(saved)
        return Parts(monitor=self._part, norm_type=NORM_TYPE, histories=saved.get("history", {}))

    def _copy_for_search(self) -> None:
        """Steps of a search tell nothing about the run."""

    def _empty_state(self) -> dict[str, Any]:
        return {"noise": {}}

    def _check_state(self, state: State) -> None:
        NoiseScaleMonitor(state)
