"""The write that rides on a fused optimizer: no pass over the gradients of its own, and no host sync.

The kernels of a fused ``torch.optim`` optimizer read two tensors from the optimizer object: gradients are divided by
``grad_scale``, and written back so; where ``found_inf`` is 1 they return at once, and parameters, moments and step counters stay as
they are. The GradScaler hands its loss scale over in the same way.
"""

from __future__ import annotations

from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from clip_callbacks.core.tensor_table import Gradients

CARRIERS = (Adam, AdamW, SGD, Adagrad)
"""Whose fused kernels do all of this; a subclass may have another ``step``."""

DEVICES = ("cpu", "cuda")
"""Where they do: on others some releases of torch take the two tensors and ignore them (pytorch/pytorch#186360)."""


def is_fused(optimizer: Optimizer) -> bool:
    """Whether an optimizer's next step can carry a factor: of ``torch.optim``, and fused in every parameter group.

    A checkpoint of an unfused run, loaded into a fused optimizer, makes its groups unfused.
    """
    return type(optimizer) in CARRIERS and all(group["fused"] for group in optimizer.param_groups)


def can_carry(optimizer: Optimizer | None, gradients: Gradients) -> bool:
    """Whether the next step can carry a factor for these gradients, and has no others; the kernels take it in float32."""
    if optimizer is None or not is_fused(optimizer) or not gradients.exist or not gradients.table.covers(optimizer):
        return False
    some = gradients.table.shards[:1] if gradients.is_uniform else gradients.table.shards
    return all(tensor.dtype is not torch.float64 and tensor.device.type in DEVICES for tensor in some)


def starts_momentum(optimizer: Optimizer) -> bool:
    """Whether the next step makes momentum buffers: it leaves them uninitialized if it is skipped through ``found_inf``."""
    return isinstance(optimizer, SGD) and any(
        group["momentum"] and "momentum_buffer" not in optimizer.state.get(tensor, ())
        for group in optimizer.param_groups
        for tensor in group["params"]
        if tensor.grad is not None
    )


def board(optimizer: Optimizer, grad_scale: Tensor | None, found_inf: Tensor | None = None) -> None:
    """Have an optimizer's next step divide its gradients, or stand still; and no later step.

    A GradScaler that calls the step takes up ``grad_scale``, sets a ``found_inf`` of its own, and takes both back itself.

    Args:
        optimizer: A fused one.
        grad_scale: What the gradients are divided by, 0-dim; None is 1.
        found_inf: 1.0 to stand still, 0.0 to step, 0-dim float32; None steps.
    """
    if optimizer not in _RIDES:
        _RIDES[optimizer] = _Ride(optimizer)
    _RIDES[optimizer].begin(optimizer, {"grad_scale": grad_scale, "found_inf": found_inf})


def clear(optimizer: Optimizer | None) -> None:
    """Take back what has not ridden: the step for which it was set has not been taken."""
    if optimizer is not None and optimizer in _RIDES:
        _RIDES[optimizer].end(optimizer)


def take_back(optimizer: Optimizer) -> None:
    """Leave nothing on an optimizer of what did not ride, as after an exception."""
    if ride := _RIDES.pop(optimizer, None):
        ride.end(optimizer)
        ride.close()


class _Ride:
    """Sees to it that what was set for one step is there for no other.

    A step hook before and one after stay on the optimizer. If a step raises, the one after does not run; then the next one
    before finds out.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._stage: Literal["off", "boarded", "riding"] = "off"
        self._found_inf: Tensor | None = None
        self._hooks: tuple[RemovableHandle, ...] = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def begin(self, optimizer: Optimizer, values: dict[str, Tensor | None]) -> None:
        self.end(optimizer)
        for name, value in values.items():
            if value is not None:
                setattr(optimizer, name, value)
        self._stage, self._found_inf = "boarded", values["found_inf"]

    def end(self, optimizer: Optimizer) -> None:
        if self._stage != "off":
            self._stage, self._found_inf = "off", None
            for name in ("grad_scale", "found_inf"):
                optimizer.__dict__.pop(name, None)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        if self._stage == "riding":
            self.end(optimizer)
        elif self._stage == "boarded":
            self._stage = "riding"

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if getattr(optimizer, "found_inf", None) is self._found_inf:
            self.end(optimizer)
        else:
            self._stage = "off"  # a GradScaler's


_RIDES: WeakKeyDictionary[Optimizer, _Ride] = WeakKeyDictionary()
