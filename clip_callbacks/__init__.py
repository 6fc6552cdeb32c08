"""Gradient health for PyTorch Lightning: clipping, guarding, rescaling and watching gradients in one pass."""

from clip_callbacks.callbacks import AccumulationRescaling, FaultInjection, GradientClipping, GradientNormMonitor, NonFiniteGuard
from clip_callbacks.clip_grad import clip_grad_norm_
from clip_callbacks.limits import (
    BlockNorms,
    CosineLimit,
    EmaLimit,
    FixedLimit,
    Limit,
    LinearLimit,
    QuantileLimit,
    RatioLimit,
    RobustZScoreLimit,
    Tightest,
    Warmup,
    ZScoreLimit,
)
from clip_callbacks.nonfinite import NonFiniteGradientError
from clip_callbacks.parameters import ParameterTable
from clip_callbacks.report import StepReport
from clip_callbacks.rules import ClipRule
from clip_callbacks.step import clip_step
from clip_callbacks.weights import BatchSize, LabelTokens

__version__ = "0.1.0"

__all__ = [
    "AccumulationRescaling",
    "BatchSize",
    "BlockNorms",
    "ClipRule",
    "CosineLimit",
    "EmaLimit",
    "FaultInjection",
    "FixedLimit",
    "GradientClipping",
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
    "StepReport",
    "Tightest",
    "Warmup",
    "ZScoreLimit",
    "clip_grad_norm_",
    "clip_step",
]
