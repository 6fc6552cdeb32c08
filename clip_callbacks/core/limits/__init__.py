"""Limits: the largest allowed norm of each block in a step. One file for each limit, or for several similar ones."""

from clip_callbacks.core.limits._contract import checked_step, initial_state
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitOfOne, LimitState, MaxNorm, as_state, of_one
from clip_callbacks.core.limits.ema import EmaLimit
from clip_callbacks.core.limits.fixed import FixedLimit, as_limit, as_loss_limit
from clip_callbacks.core.limits.label import kind, label, labels
from clip_callbacks.core.limits.quantile import QuantileLimit
from clip_callbacks.core.limits.ratio import RatioLimit
from clip_callbacks.core.limits.robust_zscore import RobustZScoreLimit
from clip_callbacks.core.limits.schedule import CosineLimit, LinearLimit
from clip_callbacks.core.limits.tightest import TightestLimit
from clip_callbacks.core.limits.warmup import WarmupLimit
from clip_callbacks.core.limits.zscore import ZScoreLimit

__all__ = [
    "BlockNorms",
    "CosineLimit",
    "EmaLimit",
    "FixedLimit",
    "Limit",
    "LimitOfOne",
    "LimitState",
    "LinearLimit",
    "MaxNorm",
    "QuantileLimit",
    "RatioLimit",
    "RobustZScoreLimit",
    "TightestLimit",
    "WarmupLimit",
    "ZScoreLimit",
    "as_limit",
    "as_loss_limit",
    "as_state",
    "checked_step",
    "initial_state",
    "kind",
    "label",
    "labels",
    "of_one",
]
