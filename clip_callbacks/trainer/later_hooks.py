"""Who changes gradients after our hook before an optimizer step: later callbacks, and the module, whose own hook is the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.trainer.compat import CALLBACK, overrides
from clip_callbacks.trainer.extended_method import ExtendedHook
from clip_callbacks.trainer.gradient_fingerprints import Fingerprints, fingerprints, is_changed

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

HOOK = "on_before_optimizer_step"


class LastHook:
    """The module's hook before an optimizer step, which Lightning calls after those of all callbacks.

    A module that has one may change gradients there: the pass is then run right after it, which is where ``gradient_clip_val``
    clips. Otherwise, where later callbacks have one, the fingerprints of gradients tell whether they have changed them.

    Args:
        module: The module in training.
        later: The callbacks that come later in the Trainer's list, those of the family left out.
        run: Runs the pass for an optimizer.
    """

    def __init__(self, module: LightningModule, later: Sequence[Any], run: Callable[[Optimizer], None]) -> None:
        self._later = [callback for callback in later if overrides(callback, HOOK, CALLBACK)]
        self._run = run
        self._seen: tuple[TensorTable, Fingerprints] | None = None
        self.takes_over = overrides(module, HOOK)
        self.compares = bool(self._later) and not self.takes_over
        self._hook: ExtendedHook | None = None
        if self.takes_over or self.compares:
            self._hook = ExtendedHook(module, HOOK, self._after_all)

    def note(self, table: TensorTable) -> None:
        """Remember the gradients as the pass has left them."""
        self._seen = table, fingerprints(table)

    def _after_all(self, optimizer: Optimizer) -> None:
        if self.takes_over:
            self._run(optimizer)
        elif self._seen is not None:
            table, seen = self._seen
            self._seen = None
            if is_changed(table, seen):
                self._warn()

    def _warn(self) -> None:
        self.compares = False
        names = ", ".join(type(callback).__name__ for callback in self._later)
        rank_zero_warn(
            f"Gradients were changed in {HOOK} by a callback that comes later in the Trainer's list ({names}): what the optimizer "
            "steps with is not what was clipped, guarded and logged. Put it before the gradient callbacks, or have it change "
            "gradients in on_after_backward.",
            category=RuntimeWarning,
        )

    def detach(self) -> None:
        """Give the module its own hook back."""
        if self._hook:
            self._hook.detach()
            self._hook = None
