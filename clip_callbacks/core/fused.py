"""Clipping and skipping by the kernels of a fused optimizer, without an extra pass over the gradients and without a host sync.

The kernels of a fused ``torch.optim`` optimizer read two tensors from the optimizer object. Gradients are divided by
``grad_scale`` and written back. Where ``found_inf`` is 1, the kernels return at once, and parameters, moments and step counters
stay as they are. The GradScaler hands over its loss scale in the same way.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, Literal, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from clip_callbacks.core.gradients import Gradients

FUSED_OPTIMIZERS = (Adam, AdamW, SGD, Adagrad)
"""Optimizers whose fused kernels read both tensors. Subclasses are excluded: they may have another ``step``."""

FUSED_DEVICES = ("cpu", "cuda")
"""Devices whose fused kernels read both tensors. On others some releases of torch ignore them (pytorch/pytorch#186360)."""


def is_fused(optimizer: Optimizer) -> bool:
    """Return whether an optimizer's next step can apply a factor: it is of ``torch.optim``, and fused in every parameter group.

    This is asked at every step, because a checkpoint of an unfused run, loaded into a fused optimizer, makes its groups unfused.
    """
    return type(optimizer) in FUSED_OPTIMIZERS and all(map(itemgetter("fused"), optimizer.param_groups))


def accepts_factors(optimizer: Optimizer | None, gradients: Gradients) -> TypeGuard[Optimizer]:
    """Return whether an optimizer's next step can apply a factor to these gradients, and has no others.

    Float64 gradients are excluded, because the kernels take the factor in float32.
    """
    table = gradients.table
    if optimizer is None or not is_fused(optimizer) or not gradients.exist or not table.is_held_by(optimizer):
        return False
    for tensor in table.shards:
        if tensor.dtype is torch.float64 or tensor.device.type not in FUSED_DEVICES:
            return False
        if table.is_uniform:  # the first one tells of all
            break
    return True


def starts_momentum(optimizer: Optimizer) -> bool:
    """Return whether the next step allocates momentum buffers, which a skip through ``found_inf`` would leave uninitialized."""
    return isinstance(optimizer, SGD) and any(
        # `get`, because `state` is a defaultdict, to which an index would add an entry
        group["momentum"] and "momentum_buffer" not in optimizer.state.get(tensor, ())
        for group in optimizer.param_groups
        for tensor in group["params"]
        if tensor.grad is not None
    )


def set_fused_factors(optimizer: Optimizer, grad_scale: Tensor | None, found_inf: Tensor | None = None) -> None:
    """Set the factors of an optimizer's next step, and of no later one.

    If a GradScaler calls the step, it takes over ``grad_scale``, sets its own ``found_inf``, and removes both.

    Args:
        optimizer: A fused optimizer.
        grad_scale: The divisor of the gradients, 0-dim; None is 1.
        found_inf: A flag to skip the step: 1.0 skips, 0.0 steps, 0-dim float32; None steps.
    """
    # keys are weak, so that FusedFactors must hold no reference to its optimizer: each of its methods is passed it
    factors = _FACTORS.get(optimizer)
    if factors is None:
        factors = _FACTORS[optimizer] = FusedFactors(optimizer)
    factors.set(optimizer, grad_scale, found_inf)


def clear_fused_factors(optimizer: Optimizer | None) -> None:
    """Remove factors whose step was not taken."""
    # looked for on the optimizer first, which costs no call
    if optimizer is None or ("grad_scale" not in optimizer.__dict__ and "found_inf" not in optimizer.__dict__):
        return
    if optimizer in _FACTORS:
        _FACTORS[optimizer].clear(optimizer)


def detach_fused_factors(optimizer: Optimizer) -> None:
    """Remove factors and step hooks from an optimizer, for example after an exception."""
    if factors := _FACTORS.pop(optimizer, None):
        factors.clear(optimizer)
        factors.detach()


class FusedFactors:
    """The factors on one fused optimizer, which apply to exactly one step.

    Two step hooks stay on the optimizer, one before and one after its step. If a step raises, the hook after it does not run, and
    the hook before the next step removes what is left.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Register the two hooks."""
        self._stage: Literal["unset", "set", "in use"] = "unset"
        self._found_inf: Tensor | None = None
        self._hooks: tuple[RemovableHandle, ...] = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    def set(self, optimizer: Optimizer, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Set the factors of the next step."""
        if self._stage != "unset":  # what is left of a step that was not taken would apply to this one
            self.clear(optimizer)
        if grad_scale is not None:
            optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
        if found_inf is not None:
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self._stage, self._found_inf = "set", found_inf

    def clear(self, optimizer: Optimizer) -> None:
        """Remove the factors, if there are any."""
        if self._stage != "unset":
            self._stage, self._found_inf = "unset", None
            for name in ("grad_scale", "found_inf"):
                # either may be missing: only one was set, or a GradScaler has deleted both
                optimizer.__dict__.pop(name, None)

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        # Without a GradScaler Lightning's hooks run inside `optimizer.step(closure)`, after this one: then the stage stays "set".
        if self._stage == "in use":  # the step before has raised
            self.clear(optimizer)
        elif self._stage == "set":
            self._stage = "in use"

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if getattr(optimizer, "found_inf", None) is self._found_inf:
            self.clear(optimizer)
        else:  # a GradScaler has replaced it, and deletes both itself, which would fail if they were gone
            self._stage = "unset"


_FACTORS: WeakKeyDictionary[Optimizer, FusedFactors] = WeakKeyDictionary()
