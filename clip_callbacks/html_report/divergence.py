"""Runs that went out of control: their training loss doubled for a quarter of the run, or was far above all before at its end."""

from __future__ import annotations

import math

import numpy as np
import torch

from clip_callbacks.html_report.losses import TrainingLoss
from clip_callbacks.stats.advice import MIN_NORMS_FOR_QUARTERS, QUARTER_COUNT, robust_sigma

END_RISE = 10.0
"""Least ratio of each of the last losses to the median of those before, in a run whose log ends while the loss explodes."""
LEAST_AT_END = 3
"""Least number of such losses. Of stationary losses, whatever their distribution, the last three are the largest three of 40 once
in 10,000 runs."""

START_LOSSES = (1, 5, 20)
"""Numbers of losses whose median is a start of the run: the first alone, because a run may explode in its second step."""
RISE = 2.0
"""Least ratio of the median of a quarter to that at a start in a run that went out of control."""
RISE_SIGMAS = 3.5
"""Least rise of the logarithm of the loss, in standard errors. Of 1000 stationary lognormal runs each, with a sigma from 0.3 to 1,
at most 8 rise as much by chance with 40 losses, 4 with 100, and 1 with 400."""
SMALL_SAMPLE = 6.0
"""Losses of a quarter by whose reciprocal more is asked for, because the spread of few losses is uncertain."""
MEDIAN_ERROR = math.sqrt(math.pi / 2)
"""Standard error of the median of n normal numbers, in units of sigma / sqrt(n)."""


def out_of_control(loss: TrainingLoss | None) -> str | None:
    """Say that the training loss doubled: from a start of the run to the quarter where it was highest, by more than its noise.

    Args:
        loss: The training loss; None if it is not known, which gives no verdict.

    Returns:
        Sentences that say so; None otherwise, and for losses that are not all above 0 or too few.
    """
    if loss is None or len(loss.logged) < MIN_NORMS_FOR_QUARTERS or not bool((loss.logged.values > 0).all()):
        return None
    logs = np.log(loss.logged.values)
    quarter = max(np.array_split(logs, QUARTER_COUNT), key=lambda part: float(np.median(part)))
    worst, sigma = float(np.median(quarter)), robust_sigma(torch.from_numpy(quarter))
    least = RISE_SIGMAS * (1.0 + SMALL_SAMPLE / len(quarter))
    for count in START_LOSSES:
        start = float(np.median(logs[:count]))
        error = sigma * math.hypot(_error_of(count), _error_of(len(quarter)))
        if worst - start > max(math.log(RISE), least * error):
            return (
                f"{loss.name} rose from {math.exp(start):.3g}{_median_of(count)} to {math.exp(worst):.3g} (the median of a "
                "quarter of the run): the training went out of control, and its norms tell little about a healthy run. Lower the "
                "learning rate, or start with QuantileLimit(0.1), which needs no number, and take the suggestion from the log of "
                "that run."
            )
    return None


def explodes_at_end(loss: TrainingLoss | None) -> str | None:
    """Say that the last few losses, less than a quarter of the run, are all far above every loss before.

    Args:
        loss: The training loss; None if it is not known, which gives no verdict.

    Returns:
        A sentence that says so; None otherwise, and for losses that are not all above 0 or too few.
    """
    if loss is None or len(loss.logged) < MIN_NORMS_FOR_QUARTERS or not bool((loss.logged.values > 0).all()):
        return None
    values = loss.logged.values
    for count in range(len(values) // QUARTER_COUNT, LEAST_AT_END - 1, -1):
        before, last = values[:-count], values[-count:]
        usual = float(np.median(before[-len(values) // QUARTER_COUNT :]))
        if last.min() > max(before.max(), END_RISE * usual):
            return (
                f"{loss.name} was around {usual:.3g}, and rose to {last[-1]:.3g} in the last {count} logged values, above "
                "all values before: the training may have gone out of control where the log ends."
            )
    return None


def _error_of(count: int) -> float:
    """Return the standard error of the median of so many normal numbers of standard deviation 1."""
    if count == 1:
        return 1.0
    return MEDIAN_ERROR / math.sqrt(count)


def _median_of(count: int) -> str:
    """Say of how many losses a start is the median; nothing for the first loss alone."""
    if count == 1:
        return ""
    return f" (the median of the first {count} values)"
