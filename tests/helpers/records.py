"""The engine's records of steps."""

from __future__ import annotations

import torch

from clip_callbacks import ClipRule
from clip_callbacks.core.actions import Action
from clip_callbacks.core.rules import NO_SPIKE_LIMITS, Plan
from clip_callbacks.core.step import apply_step, measure_step
from clip_callbacks.core.tensor_table import TensorTable


def record_of(report):
    """Return the engine's record behind a public report."""
    return report._record


@torch.no_grad()
def step(parameters, *, rules=None, action=Action.CLIP, fused=None, spikes=NO_SPIKE_LIMITS, **options):
    """Measure and apply a first step, with options that only the engine has, and return its record."""
    table = TensorTable.of(parameters)
    plan = Plan.of(table, [ClipRule(1.0)] if rules is None else rules, (), spikes)
    measured = measure_step(table, plan, plan.init(), **options)
    return apply_step(measured, plan.init(), action, fused=fused)[0]
