"""Hooks of other code that run after this package's hook, and may change gradients before the optimizer step.

Trap: Lightning calls ``on_before_optimizer_step`` of all callbacks in their order, then the module's own
(``plugins/precision/precision.py``). Gradients that are changed there are not what was measured and clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.trainer.compat import CALLBACK, overrides
from clip_callbacks.trainer.extended_method import ExtendedMethod
from clip_callbacks.trainer.fingerprints import GradientFingerprints, gradient_fingerprints, gradients_changed

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

HOOK = "on_before_optimizer_step"


class LaterHooks:
    """Hooks before an optimizer step that Lightning calls after the one of this package.

    If the module has such a hook, it may change gradients, and the engine's step runs right after it: where ``gradient_clip_val``
    clips, too. If not, and later callbacks have one, fingerprints of the gradients tell whether these were changed.

    Args:
        module: The module in training.
        later: The callbacks of other packages that come later in the Trainer's list.
        run_step: Function that runs the engine's step for an optimizer; called under ``torch.no_grad()``.

    Attributes:
        runs_after_module: True if the engine's step runs after the module's hook, and not in the callback's.
        compares_gradients: True if gradients are compared after all hooks.
    """

    def __init__(self, module: LightningModule, later: Sequence[Any], run_step: Callable[[Optimizer], None]) -> None:
        self._later = [callback for callback in later if overrides(callback, HOOK, CALLBACK)]
        self._run_step = run_step
        self._recorded: tuple[TensorTable, GradientFingerprints] | None = None
        self.runs_after_module = overrides(module, HOOK)
        self.compares_gradients = bool(self._later) and not self.runs_after_module
        self._method: ExtendedMethod | None = None
        if self.runs_after_module or self.compares_gradients:
            self._method = ExtendedMethod(module, HOOK, self._after_all_hooks)

    def record_gradients(self, table: TensorTable) -> None:
        """Record the gradients as the engine's step has left them."""
        self._recorded = table, gradient_fingerprints(table)

    def _after_all_hooks(self, optimizer: Optimizer) -> None:
        if self.runs_after_module:
            with torch.no_grad():
                self._run_step(optimizer)
        elif self._recorded is not None:
            table, before = self._recorded
            self._recorded = None
            if gradients_changed(table, before):
                self._warn()

    def _warn(self) -> None:
        self.compares_gradients = False
        names = ", ".join(type(callback).__name__ for callback in self._later)
        rank_zero_warn(
            f"Gradients were changed in {HOOK} by a callback that comes later in the Trainer's list ({names}): the optimizer "
            "uses other gradients than those that were clipped, guarded and logged. Put that callback before the gradient "
            "callbacks, or change gradients in on_after_backward.",
            category=RuntimeWarning,
        )

    def detach(self) -> None:
        """Restore the module's own hook."""
        if self._method:
            self._method.detach()
            self._method = None
