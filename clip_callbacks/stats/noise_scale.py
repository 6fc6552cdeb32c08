"""The gradient noise scale: how many samples a batch may hold before more of them stop to pay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

DECAY = 0.99
"""Of the running means: about the last hundred windows count."""


class WindowNorms(NamedTuple):
    """What one accumulation window tells: squared 2-norms of its micro-batches' gradients and of their mean, and b if known."""

    small: list[float]
    big: float
    samples: int | None


@dataclass
class NoiseScale:
    r"""Estimates the simple noise scale from gradients of micro-batches and of their mean.

    .. math:: B_{\text{simple}} = \frac{\operatorname{tr}(\Sigma)}{|G|^2}

    where :math:`G` is the true gradient and :math:`\Sigma` the covariance of the gradient of one sample. With k micro-batches of b
    samples, their gradients :math:`g_i` and the mean of these :math:`\bar g`,

    .. math::
        |\mathcal G|^2 = \frac{k |\bar g|^2 - \frac1k \sum_i |g_i|^2}{k - 1}, \qquad
        \mathcal S = \frac{k b}{k - 1} \Bigl(\frac1k \sum_i |g_i|^2 - |\bar g|^2\Bigr)

    are unbiased for :math:`|G|^2` and :math:`\operatorname{tr}(\Sigma)`. Both are noisy: running means are taken of each, and
    then their ratio. A batch much smaller than the noise scale gains from being larger nearly as much as from as many more steps;
    a much larger one wastes samples.

    Source: McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A.1, with
    :math:`B_{\text{small}} = b` and :math:`B_{\text{big}} = k b`; unlike there, all k small gradients of a window count.

    Attributes:
        decay: Of the running means.
        signal: Running mean for :math:`|G|^2`.
        noise: Running mean for :math:`\operatorname{tr}(\Sigma)`.
        windows: How many windows were seen.

    Example::

        >>> estimate = NoiseScale()
        >>> estimate.observe([5.0, 5.0], 3.0, samples=8)
        >>> estimate.value
        32.0
    """

    decay: float = DECAY
    signal: float = 0.0
    noise: float = 0.0
    windows: int = 0

    def observe(self, small: Sequence[float], big: float, samples: float) -> None:
        """Take in one window.

        Args:
            small: Squared 2-norms of the gradients of its k micro-batches, each a mean over its samples; fewer than 2 tell nothing.
            big: Squared 2-norm of their mean.
            samples: b, in a micro-batch.
        """
        count = len(small)
        if count <= 1:
            return
        mean = sum(small) / count
        self.signal += (1.0 - self.decay) * ((count * big - mean) / (count - 1) - self.signal)
        self.noise += (1.0 - self.decay) * (count * samples / (count - 1) * (mean - big) - self.noise)
        self.windows += 1

    @property
    def value(self) -> float | None:
        """The noise scale in samples; None before there is a positive estimate. The running means' bias cancels in it."""
        return self.noise / self.signal if self.signal > 0.0 < self.noise else None
