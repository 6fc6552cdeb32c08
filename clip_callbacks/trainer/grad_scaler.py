"""What 16-mixed precision's GradScaler knows."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING

import torch
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from clip_callbacks.core.losses import sum_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


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


def hold(scaler: GradScaler, optimizer: Optimizer) -> None:
    """Leave the scale and its growth counter as they are through a step that is skipped, and that no other scale would cure.

    The scaler is told that nothing was found, calls the optimizer, whose gradients are gone, and counts one good step; that one is
    taken off beforehand.
    """
    state = scaler._per_optimizer_states[id(optimizer)]
    device = loss_scale(scaler).device
    state["found_inf_per_device"] = {device: torch.zeros((), dtype=torch.float32, device=device)}
    state["stage"] = OptState.UNSCALED
    _growth_counter(scaler).sub_(1)


def hold_where(scaler: GradScaler, optimizer: Optimizer, flag: torch.Tensor) -> None:
    """Do as :func:`hold` if a flag is set, 0-dim bool, which stays unread.

    It takes effect after the step of a fused optimizer, which stands still for what was found, and before the scaler's update.
    """

    def after_step(*_: object) -> None:
        hook.remove()
        found: dict[torch.device, torch.Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        for each in found.values():
            each.mul_(flag.logical_not().to(each.device))
        counter = _growth_counter(scaler)
        counter.sub_(flag.to(counter))

    hook = optimizer.register_step_post_hook(after_step)


def is_incurable(losses: Sequence[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
    """Whether no lower loss scale would make a bad step good: a loss is not finite, or the scale is at 1; 0-dim bool, unread.

    Args:
        losses: The losses of the step.
        scale: What they were multiplied by.
    """
    incurable = scale <= 1.0
    if losses:
        incurable = incurable.reshape(()) | torch.isfinite(sum_of(losses)).logical_not().reshape(())
    return incurable


def _growth_counter(scaler: GradScaler) -> torch.Tensor:
    counter = scaler._growth_tracker
    assert counter is not None, "a loss was scaled before"
    return counter


def has_overflowed(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether the scaler itself has found non-finite gradients, and so will not step; what came later it does not see."""
    found: dict[torch.device, torch.Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return any(bool(flag) for flag in found.values())


def mark_overflow(scaler: GradScaler, optimizer: Optimizer) -> None:
    """Have the scaler lower the scale and take no step, as those of other ranks do: not every rank may hold what is not finite."""
    found: dict[torch.device, torch.Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    for flag in found.values():
        flag.fill_(1.0)
