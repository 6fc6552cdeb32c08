"""What a step is compared with: torch, what users write by hand, and peers that pip installs."""

from __future__ import annotations

from collections.abc import Callable

import smartclip
import torch
from lightning.pytorch.utilities import grad_norm
from pytorch_optimizer.optimizer import agc

from benchmarks.gradient_sets import Holder


def bare_read(holder: Holder) -> Callable[[], object]:
    """The floor: one multi-tensor norm, its result unused."""
    return lambda: torch._foreach_norm(holder.gradients)


def copy(holder: Holder) -> Callable[[], object]:
    """A copy of the same bytes, where they are: one read and one write."""
    copies = [torch.empty_like(gradient) for gradient in holder.gradients]
    return lambda: torch._foreach_copy_(copies, holder.gradients)


def torch_clip(holder: Holder, max_norm: float) -> Callable[[], object]:
    """``torch.nn.utils.clip_grad_norm_``."""
    parameters = list(holder.parameters())
    return lambda: torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def by_hand(holder: Holder, max_norm: float) -> Callable[[], object]:
    """What many write: Lightning's ``grad_norm``, a loop over ``isfinite``, then the clip."""

    def step() -> None:
        grad_norm(holder, 2)
        if all(torch.isfinite(parameter.grad).all() for parameter in holder.parameters()):
            torch.nn.utils.clip_grad_norm_(holder.parameters(), max_norm)

    return step


def smartclip_autoclip(holder: Holder) -> Callable[[], object]:
    """``smartclip.AutoClip`` once its history is long enough to clip."""
    clipper = smartclip.AutoClip(warmup_steps=0, min_history=0)
    return lambda: smartclip.apply(holder, clipper)


def smartclip_agc(holder: Holder) -> Callable[[], object]:
    """``smartclip.AGC``."""
    clipper = smartclip.AGC()
    return lambda: smartclip.apply(holder, clipper)


def pytorch_optimizer_agc(holder: Holder) -> Callable[[], object]:
    """The AGC of ``pytorch_optimizer``, as its optimizers call it for each parameter."""

    @torch.no_grad()
    def step() -> None:
        for parameter in holder.parameters():
            parameter.grad.copy_(agc(parameter, parameter.grad))

    return step
