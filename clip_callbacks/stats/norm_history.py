"""Norms of a span of steps in bounded memory: as they were while there are few, then as quantiles within 1 %."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from clip_callbacks.stats.sketch import NormSketch

MAX_EXACT_STEPS = 1024
"""Largest number of norms that are kept as they were, in 8 KiB."""

MAX_WAITING_STEPS = 128
"""Largest number of steps that wait until their norms are processed together: most steps cost one list append."""

HistoryState: TypeAlias = "Tensor | Mapping[str, Any]"
"""All norms, float64 of shape ``(steps,)``; if there were too many, the length and the number of segments, and their sketches."""


class NormHistory:
    """Total norms of finite steps since the last reset, in bounded memory.

    Up to 1,024 norms are kept as they were, and percentiles are exact. When there are more, all of them are counted in a
    :class:`~clip_callbacks.stats.sketch.NormSketch`, and percentiles are within 1 %.

    To keep their order, the steps are divided into successive segments of equal length, each with a sketch of its own. When the
    last segment is full, each two become one, and segments are twice as long.

    Args:
        max_segments: Largest number of segments.
    """

    def __init__(self, max_segments: int = 1) -> None:
        self._max_segments = max_segments
        self._waiting: list[Tensor] = []
        self.reset()

    def reset(self) -> None:
        """Discard all norms."""
        self._waiting.clear()
        self._exact = torch.empty(0, dtype=torch.float64, device="cpu")
        self._segments: list[NormSketch] = []
        self._length = max(MAX_EXACT_STEPS // self._max_segments, 1)

    def add(self, total: Tensor) -> None:
        """Add one finite norm, 0-dim."""
        self._waiting.append(total)
        if len(self._waiting) >= MAX_WAITING_STEPS:
            self._flush()

    def values(self) -> Tensor:
        """Return all norms, float64 of shape ``(steps,)``.

        Those of more than 1,024 steps are each within 2 %, about in their order: only within a segment it is lost.
        """
        self._flush()
        if not self._segments:
            return self._exact
        # at random places within a segment, since in ascending order they would look like growth
        return torch.cat([_shuffled(segment.representatives()) for segment in self._segments])

    def percentiles(self, percents: Sequence[int]) -> Tensor | None:
        """Return percentiles with linear interpolation, shape ``(len(percents),)``; None without a step."""
        self._flush()
        shares = [percent / 100 for percent in percents]
        if self._segments:
            return self.sketch().quantiles(shares)[:, 0]
        if not len(self._exact):
            return None
        return torch.quantile(self._exact, torch.tensor(shares, dtype=torch.float64, device="cpu"))

    def sketch(self) -> NormSketch:
        """Return a sketch of all norms."""
        self._flush()
        sketch = NormSketch()
        sketch.add(self._exact[:, None])
        for segment in self._segments:
            sketch.merge(segment)
        return sketch

    def state(self) -> HistoryState:
        """Return all norms, or what is left of them, for a checkpoint."""
        self._flush()
        if not self._segments:
            return self._exact
        return {"length": self._length, "segments": len(self._segments), **NormSketch.joined(self._segments).state()}

    def load(self, state: HistoryState) -> None:
        """Continue from a state of :meth:`state`, or from any number of norms, as earlier releases saved them."""
        self.reset()
        if isinstance(state, Tensor):
            self._add(state.to("cpu", torch.float64).reshape(-1))
            return
        self._length = int(state["length"])
        if self._length < 1:
            raise ValueError(f"the length of a segment must be at least 1, got {self._length}")
        joined = NormSketch(int(state["segments"]))
        joined.load(state)
        self._segments = [joined.rows([place]) for place in range(joined.blocks)]
        while len(self._segments) > self._max_segments:
            self._merge_pairs()

    def _flush(self) -> None:
        if self._waiting:
            self._add(torch.stack(self._waiting).to("cpu", torch.float64))
            self._waiting.clear()

    def _add(self, norms: Tensor) -> None:
        if not self._segments:
            self._exact = torch.cat([self._exact, norms])
            if len(self._exact) <= MAX_EXACT_STEPS:
                return
            norms, self._exact = self._exact, self._exact[:0].clone()
            self._segments.append(NormSketch())
        while len(norms):
            room = self._length - int(self._segments[-1].count)
            self._segments[-1].add(norms[:room, None])
            norms = norms[room:]
            if len(norms):
                self._begin_segment()

    def _begin_segment(self) -> None:
        """Make room for norms after the last segment, which is full."""
        if len(self._segments) >= self._max_segments:
            self._merge_pairs()
        if int(self._segments[-1].count) >= self._length:
            self._segments.append(NormSketch())

    def _merge_pairs(self) -> None:
        """Make one segment of each two."""
        for first, second in zip(self._segments[::2], self._segments[1::2], strict=False):
            first.merge(second)
        self._segments = self._segments[::2]
        self._length *= 2


def _shuffled(values: Tensor) -> Tensor:
    order = torch.randperm(len(values), generator=torch.Generator("cpu").manual_seed(0), dtype=torch.int64, device="cpu")
    return values[order]
