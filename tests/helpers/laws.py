"""Every limit, scope and norm type, and the network whose gradients they are tried on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clip_callbacks import (
    ClipRule,
    CosineLimit,
    EmaLimit,
    FixedLimit,
    LinearLimit,
    QuantileLimit,
    RatioLimit,
    RobustZScoreLimit,
    TightestLimit,
    WarmupLimit,
    ZScoreLimit,
    clip_step,
)
from clip_callbacks.core.blocks import SCOPES
from clip_callbacks.core.limits import label
from tests.helpers.matrix import matrix

NORM_TYPES = [1.0, 2.0, 3.0, math.inf]


# each as it is for gradients scaled by s, with which it must decide the same
LIMITS = [
    lambda s: FixedLimit(0.7 * s),
    lambda s: LinearLimit(5.0 * s, 0.5 * s, steps=3),
    lambda s: CosineLimit(0.5 * s, 5.0 * s, steps=3),
    lambda s: RatioLimit(0.1 * s),
    lambda s: QuantileLimit(0.3, window=50),
    lambda s: QuantileLimit(0.95, window=20, warmup=3),
    lambda s: ZScoreLimit(warmup=2),
    lambda s: ZScoreLimit(1.5, decay=0.9, warmup=5, clip_to="mean"),
    lambda s: ZScoreLimit(1.0, warmup=4, clip_to="threshold"),
    lambda s: RobustZScoreLimit(window=30, warmup=2),
    lambda s: RobustZScoreLimit(1.0, window=5, warmup=5, floor=0.0),
    lambda s: RobustZScoreLimit(1.0, window=20, warmup=4, scale="linear"),
    lambda s: EmaLimit(warmup=3, max_norm=0.7 * s),
    lambda s: EmaLimit(1.5, decay=0.9, warmup=0),
    lambda s: TightestLimit(0.7 * s, QuantileLimit(0.5, window=10), RatioLimit(0.5 * s)),
    lambda s: WarmupLimit(ZScoreLimit(warmup=2), steps=2, warmup_limit=0.7 * s),
]
ADAPTIVE = ZScoreLimit(0.5, warmup=2, clip_to="threshold")
"""For tests of what is around a limit that remembers."""

MAKERS = {label(make(1.0)): make for make in LIMITS}
NAMED = [pytest.param(make, id=name) for name, make in MAKERS.items()]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 1)))


def with_gradients(seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    module = model()
    for parameter in module.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)
    return module


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


every = matrix(make=MAKERS, scope=SCOPES, p=NORM_TYPES)
"""For each limit, scope and norm type."""


def run(module, limit, scope, p, state=None, **options):
    return clip_step(module.named_parameters(), state, rules=[ClipRule(limit, scope)], norm_type=p, **options)
