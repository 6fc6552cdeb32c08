"""A second clip of the gradients beside GradientClipping, by Lightning's ``clip_gradients``.

Trap: ``gradient_clip_val`` is refused at fit start, but may be set later, and a module may call ``self.clip_gradients`` itself. In
automatic optimization Lightning calls this method at each step, with the Trainer's value. Only if there is a value does it reach
``clip_grad_by_norm`` or ``clip_grad_by_value`` of the precision plugin: these are extended, so that a healthy step calls neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from clip_callbacks.trainer.extended_method import ExtendedMethod

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class SecondClip:
    """Warns once if the module, or the Trainer by a ``gradient_clip_val`` set after fit start, clips a second time.

    Args:
        module: The module in training.
        is_clipped: Function that tells whether GradientClipping has a limit for an optimizer.
    """

    def __init__(self, module: LightningModule, is_clipped: Callable[[Optimizer], bool]) -> None:
        self._module = module
        self._is_clipped = is_clipped
        self._has_warned = False
        plugin = module.trainer.precision_plugin
        self._methods = [ExtendedMethod(plugin, name, self._warn) for name in ("clip_grad_by_norm", "clip_grad_by_value")]

    def _warn(self, optimizer: Optimizer, clip_val: float, *_: Any, **__: Any) -> None:
        # in manual optimization the module passes the LightningOptimizer that wraps torch's
        if self._has_warned or not self._is_clipped(getattr(optimizer, "optimizer", optimizer)):
            return
        self._has_warned = True
        if self._module.trainer.gradient_clip_val:
            what = (
                f"trainer.gradient_clip_val was set to {clip_val!r} after the setup of the fit, beside GradientClipping, "
                "whose metrics describe the gradients before that clip. Leave it at None, or remove GradientClipping"
            )
        else:
            what = (
                f"{type(self._module).__name__} calls self.clip_gradients(gradient_clip_val={clip_val!r}) beside "
                "GradientClipping, which measures, clips and logs the result of that call. Remove the call, or GradientClipping"
            )
        rank_zero_warn(
            f"Gradients are clipped twice: {what}; NonFiniteGuard and GradientNormMonitor work with either.",
            category=RuntimeWarning,
        )

    def detach(self) -> None:
        """Restore the plugin's own methods."""
        for method in self._methods:
            method.detach()
