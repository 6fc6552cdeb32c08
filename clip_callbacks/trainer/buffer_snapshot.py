"""The buffers of a module, copied and put back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from clip_callbacks.trainer.snapshot import Snapshot

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def live_buffers(module: LightningModule) -> dict[str, dict[str, Any]]:
    """By the modules that own them: a forward pass may put another tensor there."""
    return {name: dict(owner._buffers) for name, owner in module.named_modules() if owner._buffers}


def put_back_buffers(memory: Snapshot, kept: Any, module: LightningModule) -> None:
    """Put buffers back where they stand now.

    A buffer that is new stays. So does one that no checkpoint would hold (``persistent=False``) and whose shape is another: it is
    a cache that has grown, and an attribute elsewhere may say how long it is.

    Args:
        memory: What copied them.
        kept: What it returned for :func:`live_buffers`.
        module: The module in training.
    """
    restored = memory.put_back(kept, live_buffers(module))
    for name, owner in module.named_modules():
        for key, buffer in restored.get(name, {}).items():
            if key not in owner._non_persistent_buffers_set or _are_alike(buffer, owner._buffers.get(key)):
                owner._buffers[key] = buffer


def _are_alike(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape)
