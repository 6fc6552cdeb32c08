"""The GradScaler of 16-mixed precision: its stages, its overflow flags, its scale.

Traps: Lightning does not unscale for optimizers that support scaling (fused Adam, AdamW, SGD, Adagrad), nor if the last
``training_step`` of a window returned None: gradients are then still multiplied by the loss scale. What becomes non-finite after
``unscale_`` is invisible to the scaler. And a NaN loss halves the scale at each step, although no scale would cure it. The
scaler has no public methods for any of this, so that its attributes are read and written here, and nowhere else.
"""

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
    """Return the enabled GradScaler of a Trainer; None without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if isinstance(scaler, GradScaler) and scaler.is_enabled():
        return scaler
    return None


def is_still_scaled(scaler: GradScaler | None, optimizer: Optimizer) -> bool:
    """Return whether an optimizer's gradients are still multiplied by the loss scale.

    The scaler's stage decides, not the type of the optimizer: after a ``training_step`` that returned None, Lightning does not
    unscale for any.
    """
    if scaler is None:
        return False
    state = scaler._per_optimizer_states.get(id(optimizer))
    return state is None or state["stage"] is OptState.READY


def takes_scaler_argument(optimizer: Optimizer) -> bool:
    """Return whether an optimizer unscales in its ``step(grad_scaler=...)``, the older interface of fused optimizers."""
    return getattr(optimizer, "_step_supports_amp_scaling", False) and "grad_scaler" in signature(optimizer.step).parameters


def loss_scale(scaler: GradScaler) -> torch.Tensor:
    """Return the loss scale as a 0-dim tensor on its device. The scaler changes this tensor in place."""
    scale = scaler._get_scale_async()
    assert scale is not None, "a loss was scaled before"
    return scale


def mark_unscaled(scaler: GradScaler, optimizer: Optimizer, finite: torch.Tensor) -> None:
    """Tell the scaler that an optimizer's gradients are unscaled, or will be by the fused optimizer's step.

    Its own step would otherwise read and write all gradients once more.

    Args:
        scaler: The scaler.
        optimizer: The optimizer, whose gradients the scaler has not unscaled.
        finite: True if all gradients are finite, 0-dim bool. If not, the scaler lowers the scale and skips the step.
    """
    state = scaler._per_optimizer_states[id(optimizer)]
    device = loss_scale(scaler).device
    state["found_inf_per_device"] = {device: finite.logical_not().float().to(device)}
    state["stage"] = OptState.UNSCALED


def keep_scale(scaler: GradScaler, optimizer: Optimizer) -> None:
    """Leave the scale and its growth counter unchanged by a skipped step whose gradients no other scale would make finite.

    The state of the scaler is set to "no overflow found". The scaler then calls the optimizer, whose gradients are None, and counts
    one good step, which is subtracted beforehand.
    """
    state = scaler._per_optimizer_states[id(optimizer)]
    device = loss_scale(scaler).device
    state["found_inf_per_device"] = {device: torch.zeros((), dtype=torch.float32, device=device)}
    state["stage"] = OptState.UNSCALED
    _growth_counter(scaler).sub_(1)


def keep_scale_where(scaler: GradScaler, optimizer: Optimizer, flag: torch.Tensor) -> None:
    """Leave the scale and its growth counter unchanged if a flag is set, without a host sync.

    The overflow flag is cleared after the step of the fused optimizer, which needs it to skip, and before ``scaler.update``.

    Args:
        scaler: The scaler.
        optimizer: The fused optimizer.
        flag: The flag, 0-dim bool.
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
    """Return whether no lower loss scale would make a bad step good: a loss is non-finite, or the scale is at most 1.

    Args:
        losses: The losses of the step.
        scale: The loss scale.

    Returns:
        A 0-dim bool tensor; nothing is read on the host.
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
    """Return whether the scaler itself has found non-finite gradients, and will skip the step. Costs a host sync."""
    found: dict[torch.device, torch.Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return any(bool(flag) for flag in found.values())


def mark_overflow(scaler: GradScaler, optimizer: Optimizer) -> None:
    """Make the scaler lower the scale and skip the step, as on the ranks whose gradients are non-finite."""
    found: dict[torch.device, torch.Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    for flag in found.values():
        flag.fill_(1.0)
