"""The gradient noise scale: about the number of samples beyond which a larger batch hardly speeds up training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

DECAY_PER_WINDOW = 0.99
"""Decay of the running means: about the last hundred windows count."""


class WindowNorms(NamedTuple):
    """Norms of the gradients in one accumulation window.

    Attributes:
        small: Squared 2-norm of the gradient of each micro-batch.
        big: Squared 2-norm of their mean.
        samples: Number b of samples in each micro-batch, if it is known.
    """

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

    are unbiased estimates of :math:`|G|^2` and :math:`\operatorname{tr}(\Sigma)`. Both are noisy, so that the noise scale is the
    ratio of their running means. Far below the noise scale, a batch twice as large trains about as well as twice as many steps; far
    above it, most additional samples are wasted.

    Source: McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A.1, with
    :math:`B_{\text{small}} = b` and :math:`B_{\text{big}} = k b`; unlike there, all k small gradients of a window count.

    Attributes:
        decay: Decay of the running means per window.
        signal: Running mean of the estimates of :math:`|G|^2`.
        noise: Running mean of the estimates of :math:`\operatorname{tr}(\Sigma)`.
        windows: Number of windows so far.

    Example::

        >>> estimate = NoiseScale()
        >>> estimate.observe([5.0, 5.0], 3.0, samples=8)
        >>> estimate.value
        32.0
    """

    decay: float = DECAY_PER_WINDOW
    signal: float = 0.0
    noise: float = 0.0
    windows: int = 0

    def observe(self, small: Sequence[float], big: float, samples: float) -> None:
        """Update the running means; a window with fewer than 2 micro-batches is ignored.

        Args:
            small: Squared 2-norm of the gradient of each of k micro-batches, which is a mean over its samples.
            big: Squared 2-norm of the mean of these gradients.
            samples: Number b of samples in each micro-batch.
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
        """Return the noise scale in samples; None unless both running means are positive."""
        if self.signal <= 0.0 or self.noise <= 0.0:
            return None
        return self.noise / self.signal  # both means began at 0, and that bias cancels
