"""Gradient health for PyTorch Lightning: clipping, guarding, rescaling and watching gradients in one pass."""

from clip_callbacks._version import __version__ as __version__
from clip_callbacks.accumulation.weights import BatchSize, LabelTokens
from clip_callbacks.callbacks import (
    AccumulationRescaling,
    FaultInjection,
    GradientClipping,
    GradientNoiseScale,
    GradientNormMonitor,
    NonFiniteGuard,
)
from clip_callbacks.core.clip_grad import clip_grad_norm_
from clip_callbacks.core.clip_step import clip_step
from clip_callbacks.core.limits import (
    BlockNorms,
    CosineLimit,
    EmaLimit,
    FixedLimit,
    Limit,
    LinearLimit,
    QuantileLimit,
    RatioLimit,
    RobustZScoreLimit,
    TightestLimit,
    WarmupLimit,
    ZScoreLimit,
)
from clip_callbacks.core.nonfinite import NonFiniteGradientError
from clip_callbacks.core.parameter_table import ParameterTable
from clip_callbacks.core.rules import ClipRule
from clip_callbacks.core.step_report import StepReport
from clip_callbacks.guard.options import Bundles, Rollback

__all__ = [
    "AccumulationRescaling",
    "BatchSize",
    "BlockNorms",
    "Bundles",
    "ClipRule",
    "CosineLimit",
    "EmaLimit",
    "FaultInjection",
    "FixedLimit",
    "GradientClipping",
    "GradientNoiseScale",
    "GradientNormMonitor",
    "LabelTokens",
    "Limit",
    "LinearLimit",
    "NonFiniteGradientError",
    "NonFiniteGuard",
    "ParameterTable",
    "QuantileLimit",
    "RatioLimit",
    "RobustZScoreLimit",
    "Rollback",
    "StepReport",
    "TightestLimit",
    "WarmupLimit",
    "ZScoreLimit",
    "clip_grad_norm_",
    "clip_step",
]
