"""A plugin of pytest that gives every Trainer all callbacks, for the tests of Lightning itself.

They join when a fit starts, so that tests of what a Trainer makes of its arguments see what they would see without.
"""

from __future__ import annotations

import functools
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.connectors.callback_connector import _CallbackConnector

from clip_callbacks import AccumulationRescaling, GradientClipping, GradientNormMonitor, NonFiniteGuard

NEVER_REACHED = 1e6
"""A limit that no gradient of those tests reaches: what they expect of weights and losses stays as it is."""


def family(trainer: Trainer, module: LightningModule) -> list[Callback]:
    """All callbacks that go with this Trainer and module: two things that clip are refused."""
    is_clipped = trainer.gradient_clip_val is not None or _overrides(module, "configure_gradient_clipping")
    clipping = [] if is_clipped else [GradientClipping(NEVER_REACHED)]
    return [AccumulationRescaling(), NonFiniteGuard(), *clipping, GradientNormMonitor()]


def _overrides(module: Any, method: str) -> bool:
    return getattr(type(module), method, None) is not getattr(LightningModule, method)


def _joined(fit: Any) -> Any:
    @functools.wraps(fit)
    def with_family(self: Trainer, model: Any, *arguments: Any, **options: Any) -> Any:
        if not any(isinstance(callback, GradientNormMonitor) for callback in self.callbacks):
            self.callbacks = _CallbackConnector._reorder_callbacks([*self.callbacks, *family(self, model)])
        return fit(self, model, *arguments, **options)

    return with_family


def pytest_configure() -> None:
    """Before any module of tests is imported."""
    Trainer.fit = _joined(Trainer.fit)  # type: ignore[method-assign]
