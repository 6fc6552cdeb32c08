"""Limits: how large may each block's norm be now?"""

from clip_callbacks.limits.base import Limit, LimitState, MaxNorm, as_max_norm
from clip_callbacks.limits.fixed import FixedLimit

__all__ = ["FixedLimit", "Limit", "LimitState", "MaxNorm", "as_max_norm"]
