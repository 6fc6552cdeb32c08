"""Copies of a module's buffers, which a rollback restores.

Trap: a forward pass may assign another tensor to a buffer's name, so that buffers are restored by owner and name, not by tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from clip_callbacks.trainer.snapshot import Snapshot

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def live_buffers(module: LightningModule) -> dict[str, dict[str, Any]]:
    """Return the buffers of a module by the name of the submodule that owns them."""
    return {name: dict(owner._buffers) for name, owner in module.named_modules() if owner._buffers}


def restore_module_buffers(memory: Snapshot, saved: Any, module: LightningModule) -> None:
    """Restore the buffers of a module.

    Buffers registered since the copy stay. So does a buffer with ``persistent=False`` whose shape has changed: it is a cache that
    has grown, and an attribute elsewhere may hold its length.

    Args:
        memory: The snapshot that has made the copy.
        saved: The return value of ``memory.keep`` for :func:`live_buffers`.
        module: The module in training.
    """
    restored = memory.restore(saved, live_buffers(module))
    for name, owner in module.named_modules():
        for key, buffer in restored.get(name, {}).items():
            if key not in owner._non_persistent_buffers_set or _are_alike(buffer, owner._buffers.get(key)):
                owner._buffers[key] = buffer


def _are_alike(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape)
