"""Gradients that Lightning's ``clip_gradients`` clips beside GradientClipping: the module calls it, or the Trainer does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from clip_callbacks.trainer.extended_method import ExtendedHook

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class SecondClip:
    """Warns once of a second clip that nothing told of at fit start: by the module itself, or by a ``gradient_clip_val`` set later.

    In automatic optimization Lightning itself calls the method at each step, with the Trainer's value, and without one it does
    nothing.

    Args:
        module: The module in training.
        is_clipped: Whether GradientClipping has a limit for an optimizer of torch.
    """

    def __init__(self, module: LightningModule, is_clipped: Callable[[Optimizer], bool]) -> None:
        self._module = module
        self._is_clipped = is_clipped
        self._has_warned = False
        self._hook = ExtendedHook(module, "clip_gradients", self._note)

    def _note(self, optimizer: Optimizer, gradient_clip_val: float | None = None, *_: Any, **__: Any) -> None:
        if not gradient_clip_val or self._has_warned or not self._is_clipped(getattr(optimizer, "optimizer", optimizer)):
            return
        self._has_warned = True
        if self._module.trainer.gradient_clip_val:
            what = (
                f"trainer.gradient_clip_val was set to {gradient_clip_val!r} after the setup of the fit, beside GradientClipping, "
                "whose metrics are those before that clip. Leave it at None, or remove GradientClipping"
            )
        else:
            what = (
                f"{type(self._module).__name__} calls self.clip_gradients(gradient_clip_val={gradient_clip_val!r}) beside "
                "GradientClipping, which measures, clips and logs what that call leaves. Remove the call, or GradientClipping"
            )
        rank_zero_warn(
            f"Gradients are clipped twice: {what}; NonFiniteGuard and GradientNormMonitor go with either.", category=RuntimeWarning
        )

    def detach(self) -> None:
        """Give the module its own method back."""
        self._hook.detach()
