"""Runs that went out of control: their training loss doubled, and stayed there until the end."""

from __future__ import annotations

import math

import numpy as np
import torch

from clip_callbacks.html_report.losses import TrainingLoss
from clip_callbacks.stats.advice import MIN_NORMS_FOR_QUARTERS, QUARTER_COUNT, robust_sigma

START_LOSSES = (1, 5, 20)
"""Numbers of losses whose median is a start of the run: the first alone, because a run may explode in its second step."""
RISE = 2.0
"""Least ratio of the median at the end to that at a start in a run that went out of control."""
RISE_SIGMAS = 3.5
"""Least rise of the logarithm of the loss, in standard errors. Of stationary lognormal losses with a sigma from 0.3 to 1, at most
1 run in 50 rises as much by chance with 40 losses, 1 in 150 with 100, and 1 in 500 with 400."""
MEDIAN_ERROR = math.sqrt(math.pi / 2)
"""Standard error of the median of n normal numbers, in units of sigma / sqrt(n)."""


def out_of_control(loss: TrainingLoss | None) -> str | None:
    """Say that the training loss doubled: from a start of the run to its last quarter, by more than its noise.

    Args:
        loss: The training loss; None if it is not known, which gives no verdict.

    Returns:
        Sentences that say so; None otherwise, and for losses that are not all above 0 or too few.
    """
    if loss is None or len(loss.logged) < MIN_NORMS_FOR_QUARTERS or not bool((loss.logged.values > 0).all()):
        return None
    logs = np.log(loss.logged.values)
    quarter = np.array_split(logs, QUARTER_COUNT)[-1]
    end, sigma = float(np.median(quarter)), robust_sigma(torch.from_numpy(quarter))
    for count in START_LOSSES:
        start = float(np.median(logs[:count]))
        error = MEDIAN_ERROR * sigma * math.sqrt(1 / count + 1 / len(quarter))
        if end - start > max(math.log(RISE), RISE_SIGMAS * error):
            return (
                f"{loss.name} rose from {math.exp(start):.3g}{_median_of(count)} to {math.exp(end):.3g} (the median of the last "
                "quarter of the run): the training went out of control, and its norms tell little about a healthy run. Lower the "
                "learning rate, or start with QuantileLimit(0.1), which needs no number, and take the suggestion from the log of "
                "that run."
            )
    return None


def _median_of(count: int) -> str:
    """Say of how many losses a start is the median; nothing for the first loss alone."""
    if count == 1:
        return ""
    return f" (the median of the first {count} values)"
