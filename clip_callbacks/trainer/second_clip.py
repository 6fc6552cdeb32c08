"""Gradients that the module clips itself beside GradientClipping, by Lightning's ``self.clip_gradients``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from clip_callbacks.trainer.extended_hook import ExtendedHook

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class SecondClip:
    """Warns once of a module that clips its gradients itself: in manual optimization nothing at fit start tells that it will.

    In automatic optimization Lightning itself calls the method at each step, without a value, and it does nothing then.

    Args:
        module: The module in training.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._has_warned = False
        self._hook = ExtendedHook(module, "clip_gradients", self._note)

    def _note(self, optimizer: Optimizer, gradient_clip_val: float | None = None, *_: Any, **__: Any) -> None:
        if not gradient_clip_val or self._has_warned:
            return
        self._has_warned = True
        rank_zero_warn(
            f"Gradients are clipped twice: {type(self._module).__name__} calls self.clip_gradients(gradient_clip_val="
            f"{gradient_clip_val!r}) beside GradientClipping, which measures, clips and logs what that call leaves. Remove the "
            "call, or GradientClipping; NonFiniteGuard and GradientNormMonitor go with either.",
            category=RuntimeWarning,
        )

    def detach(self) -> None:
        """Give the module its own method back."""
        self._hook.detach()
