"""What 16-mixed precision's GradScaler knows."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer


def grad_scaler(trainer: Trainer) -> GradScaler | None:
    """The scaler of 16-mixed precision, if there is one at work."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, GradScaler) and scaler.is_enabled() else None


def is_still_scaled(scaler: GradScaler | None, optimizer: Optimizer) -> bool:
    """Whether the gradients are still multiplied by the loss scale: asked of the scaler, not of the optimizer's type."""
    if scaler is None:
        return False
    state = scaler._per_optimizer_states.get(id(optimizer))
    return state is None or state["stage"] is OptState.READY


def has_overflowed(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether the scaler itself has found non-finite gradients, and so will not step; what came later it does not see."""
    found: dict[torch.device, torch.Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return any(bool(flag) for flag in found.values())
