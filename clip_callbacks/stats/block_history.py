"""What an epoch remembers of each block's norms: for percentiles and clip fractions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clip_callbacks.core.blocks import Partition, Scope, Selection
from clip_callbacks.core.measurement import block_norms
from clip_callbacks.core.metric_names import BLOCK_CLIP_FRACTION, BLOCK_PERCENTILES
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.stats.norm_history import FLUSH
from clip_callbacks.stats.sketch import NormSketch

ROOM = 1 << 20
"""Factors that wait at most: where millions of output rows are clipped, steps wait for fewer others."""


class BlockHistory:
    """Norms of the blocks of one optimizer over the healthy steps of an epoch, and in how many of them each was clipped.

    A step costs a list append; norms go into a sketch together. The room it takes does not grow with the steps.

    Args:
        scope: What a block is.
        selection: Which parameters are in blocks.
    """

    def __init__(self, scope: Scope, selection: Selection) -> None:
        self._scope: Scope = scope
        self._selection = selection
        self._names: list[str] = []
        self._sketch = NormSketch(0)
        self._clipped = torch.zeros(0, dtype=torch.int64)
        self._is_local = False
        self._norms: list[Tensor] = []
        self._clips: list[tuple[Tensor, Tensor]] = []
        self._blocks: Partition | None = None
        self._parts: Partition | None = None
        self._norm_type = 2.0

    def attach(self, table: TensorTable) -> None:
        """Meet the parameters, or other ones; blocks that stay, by their names, keep what was counted."""
        self._flush()
        selection = self._selection.among(table.names)
        self._blocks = None if selection is None else table.partition(self._scope, selection)
        self._parts = None
        names = [] if self._blocks is None else list(self._blocks.names)
        if names != self._names:
            known = {name: place for place, name in enumerate(self._names)}
            places = [known.get(name) for name in names]
            self._sketch = self._sketch.rows(places)
            counts = [0 if place is None else int(self._clipped[place]) for place in places]
            self._names, self._clipped = names, torch.tensor(counts, dtype=torch.int64)

    def add(self, report: StepRecord, table: TensorTable) -> None:
        """Take in a healthy step."""
        if self._blocks is None:
            return
        if not self._parts:
            self._meet(report, table)
        self._norms.append(report.parameter_norms)
        if self._is_local and report.factors is not None:
            parts = report.parameter_norms if report.unit_norms is None else report.unit_norms
            self._clips.append((report.factors, parts))
            if len(self._clips) * len(parts) >= ROOM:
                self._flush()
        if len(self._norms) >= FLUSH:
            self._flush()

    def metrics(self, top_k: int | None) -> dict[str, float]:
        """Percentiles of the epoch for each block and, under local norms, the share of its steps in which it was made smaller.

        Args:
            top_k: Only for so many blocks, those with the largest p99.
        """
        self._flush()
        found = self._sketch.quantiles([percent / 100 for percent in BLOCK_PERCENTILES])
        values = dict(zip(BLOCK_PERCENTILES.values(), found, strict=True))
        if self._is_local:
            values[BLOCK_CLIP_FRACTION] = self._clipped.double() / self._sketch.count
        places = largest(found[-1], top_k)
        return {prefix + self._names[place]: float(each[place]) for prefix, each in values.items() for place in places}

    def end_epoch(self) -> None:
        """Begin a new epoch."""
        self._norms.clear()
        self._clips.clear()
        self._sketch.reset()
        self._clipped.zero_()

    def state_dict(self) -> dict[str, Any]:
        """What was counted, and of which blocks."""
        self._flush()
        return {"names": self._names, "norms": self._sketch.state(), "clipped": self._clipped.clone(), "is_local": self._is_local}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; to be attached afterwards."""
        self._names, self._is_local = list(state["names"]), state["is_local"]
        self._sketch = NormSketch(len(self._names))
        self._sketch.load(state["norms"])
        self._clipped = state["clipped"].cpu().clone()

    def _meet(self, report: StepRecord, table: TensorTable) -> None:
        """Learn from the first step what the norms and factors of the others will be of."""
        assert self._blocks is not None
        self._norm_type = report.norm_type
        self._is_local = any(not outcome.partition.is_whole for outcome in report.outcomes)
        selection = self._selection.among(table.names)
        assert selection is not None
        self._parts = table.partition(self._scope, selection, by_unit=report.unit_norms is not None)

    def _flush(self) -> None:
        if self._norms:
            assert self._blocks is not None
            steps = torch.cat(self._norms).double().reshape(len(self._norms), -1)
            self._sketch.add(block_norms(steps, self._blocks, self._norm_type))
            self._norms.clear()
        if self._clips:
            assert self._parts is not None
            self._clipped += _smaller(self._clips, self._parts).sum(0)
            self._clips.clear()


def _smaller(clips: list[tuple[Tensor, Tensor]], blocks: Partition) -> Tensor:
    """In which steps which blocks had an entry made smaller, bool of shape ``(steps, B)``; a 0 stays one whatever its factor."""
    factors = torch.stack([factor.reshape(-1).expand(len(parts)) for factor, parts in clips])
    smaller = (factors < 1.0) & (torch.stack([parts for _, parts in clips]) > 0)
    hits = torch.zeros(len(clips), len(blocks.names), dtype=torch.int32)
    inside = smaller if blocks.is_total else smaller[:, blocks.members]
    return hits.scatter_add_(1, blocks.member_blocks.expand(inside.shape), inside.int()) > 0


def largest(values: Tensor, count: int | None) -> list[int]:
    """Where the largest finite values are, or all of them, in their order.

    Args:
        values: Shape ``(B,)``.
        count: How many; None is all.
    """
    if count is None or count >= len(values):
        return list(range(len(values)))
    return sorted(values.nan_to_num(nan=-1.0, posinf=-1.0).topk(count).indices.tolist())
