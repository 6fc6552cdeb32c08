"""Running statistics of batch normalization, kept and put back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from clip_callbacks.core.nonfinite import all_finite
from clip_callbacks.core.reduction import shard_of


def layers_with_statistics(module: nn.Module) -> list[nn.Module]:
    """The normalization layers of a module that keep running statistics."""
    return [layer for layer in module.modules() if isinstance(layer, _NormBase) and layer.running_mean is not None]


class BatchStatistics:
    """Copies of running means, variances and counts, made in place.

    Args:
        layers: The layers that keep them.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for buffer in [buffer for layer in layers for buffer in layer.buffers(recurse=False)]:
            kinds.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        self._kinds = [_Buffers(buffers) for buffers in kinds.values()]
        self._source: BatchStatistics | None = None
        self.keep()

    def keep(self) -> None:
        """Copy the statistics as they are."""
        for buffers in self._kinds:
            buffers.keep()

    def keep_from(self, other: BatchStatistics) -> None:
        """Take the copies that others have of the same layers."""
        if other is not self._source:
            self._source, copies = other, other.copies()
            for buffers in self._kinds:
                buffers.pair(copies)
        for buffers in self._kinds:
            buffers.keep_from_pairs()

    def restore(self) -> None:
        """Put the statistics back to the copies."""
        for buffers in self._kinds:
            buffers.restore()

    def restore_where(self, flag: Tensor) -> None:
        """Put the statistics back to the copies if a flag is set, 0-dim bool, which stays unread."""
        for buffers in self._kinds:
            buffers.restore_where(flag)

    def copies(self) -> dict[int, Tensor]:
        """The copies, by the ``id`` of the buffer."""
        return {key: copy for buffers in self._kinds for key, copy in buffers.copies().items()}

    @property
    def is_finite(self) -> bool:
        """Whether the copies are; asked on bad steps only."""
        return all_finite(buffers.kept for buffers in self._kinds)


class _Buffers:
    """Buffers of one dtype on one device, and their copies side by side in one tensor.

    They are put back around their version counters: batch normalization in training saves them for its backward pass but does not
    read them there, and a graph that another optimizer is still to use must not raise for a skipped step.
    """

    def __init__(self, buffers: list[Tensor]) -> None:
        self._keys = list(map(id, buffers))
        self._live = list(map(shard_of, buffers))
        self.kept, self._copies = self._room()
        self._others: list[Tensor] = []
        self._scratch: tuple[Tensor, list[Tensor]] | None = None

    def _room(self) -> tuple[Tensor, list[Tensor]]:
        flat = torch.empty(sum(buffer.numel() for buffer in self._live), dtype=self._live[0].dtype, device=self._live[0].device)
        parts = flat.split([buffer.numel() for buffer in self._live])  # type: ignore[no-untyped-call]
        return flat, [part.view_as(buffer) for part, buffer in zip(parts, self._live, strict=True)]

    def copies(self) -> dict[int, Tensor]:
        return dict(zip(self._keys, self._copies, strict=True))

    @torch.no_grad()
    def keep(self) -> None:
        torch._foreach_copy_(self._copies, self._live)

    def pair(self, copies: Mapping[int, Tensor]) -> None:
        """Find the copies of the same buffers among those of others."""
        self._others = [copies[key] for key in self._keys]

    @torch.no_grad()
    def keep_from_pairs(self) -> None:
        torch._foreach_copy_(self._copies, self._others)

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_([live.data for live in self._live], self._copies)

    @torch.no_grad()
    def restore_where(self, flag: Tensor) -> None:
        """By selection, no arithmetic: what is not chosen may be NaN."""
        flat, chosen = self._scratch = self._scratch or self._room()
        torch._foreach_copy_(chosen, self._live)
        torch.where(flag, self.kept, flat, out=flat)
        torch._foreach_copy_([live.data for live in self._live], chosen)
