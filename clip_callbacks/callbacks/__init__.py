"""The public callbacks: options, docstrings, states."""

from clip_callbacks.callbacks.accumulation import AccumulationRescaling
from clip_callbacks.callbacks.clipping import GradientClipping
from clip_callbacks.callbacks.fault_injection import FaultInjection
from clip_callbacks.callbacks.guard import NonFiniteGuard
from clip_callbacks.callbacks.monitor import GradientNormMonitor
from clip_callbacks.callbacks.noise_scale import GradientNoiseScale

__all__ = [
    "AccumulationRescaling",
    "FaultInjection",
    "GradientClipping",
    "GradientNoiseScale",
    "GradientNormMonitor",
    "NonFiniteGuard",
]
