"""What 16-mixed precision's GradScaler knows."""

from __future__ import annotations

from inspect import signature

import torch
from lightning.pytorch import Trainer
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer


def grad_scaler(trainer: Trainer) -> GradScaler | None:
    """The scaler of 16-mixed precision, if there is one at work."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if isinstance(scaler, GradScaler) and scaler.is_enabled():
        return scaler
    return None


def is_still_scaled(scaler: GradScaler | None, optimizer: Optimizer) -> bool:
    """Whether the gradients are still multiplied by the loss scale: asked of the scaler, not of the optimizer's type."""
    if scaler is None:
        return False
    state = scaler._per_optimizer_states.get(id(optimizer))
    return state is None or state["stage"] is OptState.READY


def takes_scaler_argument(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer of the old kind unscales for itself, by the scaler that its step is given."""
    return getattr(optimizer, "_step_supports_amp_scaling", False) and "grad_scaler" in signature(optimizer.step).parameters


def loss_scale(scaler: GradScaler) -> torch.Tensor:
    """What the loss was multiplied by, where it is and unread, 0-dim; the scaler changes it in place."""
    scale = scaler._get_scale_async()
    assert scale is not None, "a loss was scaled before"
    return scale


def take_over(scaler: GradScaler, optimizer: Optimizer, finite: torch.Tensor) -> None:
    """Tell the scaler that an optimizer's gradients are seen to: unscaled, or about to be on a fused optimizer's way.

    What it would otherwise do in its step, a further pass that reads and writes all of them, is done already.

    Args:
        scaler: The scaler.
        optimizer: The optimizer, whose gradients it has not unscaled.
        finite: Whether all of them are finite, 0-dim bool; if not, the scaler lowers the scale and no step is taken.
    """
    state = scaler._per_optimizer_states[id(optimizer)]
    device = loss_scale(scaler).device
    state["found_inf_per_device"] = {device: finite.logical_not().float().to(device)}
    state["stage"] = OptState.UNSCALED


def has_overflowed(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether the scaler itself has found non-finite gradients, and so will not step; what came later it does not see."""
    found: dict[torch.device, torch.Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return any(bool(flag) for flag in found.values())


def mark_overflow(scaler: GradScaler, optimizer: Optimizer) -> None:
    """Have the scaler lower the scale and take no step, as those of other ranks do: not every rank may hold what is not finite."""
    found: dict[torch.device, torch.Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    for flag in found.values():
        flag.fill_(1.0)
