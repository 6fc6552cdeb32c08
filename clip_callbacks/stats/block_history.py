"""Percentiles and clip fractions of each block over an epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clip_callbacks.core.blocks import Partition, Scope, Selection
from clip_callbacks.core.measurement import block_norms
from clip_callbacks.core.metric_names import BLOCK_CLIP_FRACTION, BLOCK_PERCENTILES
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.stats.norm_history import MAX_WAITING_STEPS
from clip_callbacks.stats.sketch import NormSketch

MAX_WAITING_FACTORS = 1 << 20
"""Largest number of clipping factors that wait for the flush: with millions of output rows, fewer steps wait."""


class BlockHistory:
    """Norms of the blocks of one optimizer over the healthy steps of an epoch, and in how many of them each was clipped.

    A step costs one list append: the norms of many steps are added to a sketch together. The memory does not grow with the number
    of steps.

    Args:
        scope: Scope of the blocks.
        selection: Patterns for the names of the parameters that blocks are made of.
    """

    def __init__(self, scope: Scope, selection: Selection) -> None:
        self._scope: Scope = scope
        self._selection = selection
        self._names: list[str] = []
        self._sketch = NormSketch(0)
        self._clipped = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._is_local = False
        self._norms: list[Tensor] = []
        self._clips: list[tuple[Tensor, Tensor]] = []
        self._blocks: Partition | None = None
        self._parts: Partition | None = None
        self._norm_type = 2.0

    def attach(self, table: TensorTable) -> None:
        """Take up the parameters of an optimizer; blocks whose names were there before keep their norms and counts."""
        self._flush()
        selection = self._selection.among(table.names)
        self._blocks, self._parts = None, None
        names: list[str] = []
        if selection is not None:
            self._blocks = table.partition(self._scope, selection)
            names = list(self._blocks.names)
        if names != self._names:
            known = {name: place for place, name in enumerate(self._names)}
            places = [known.get(name) for name in names]
            self._sketch = self._sketch.rows(places)
            counts = [0 if place is None else int(self._clipped[place]) for place in places]
            self._names, self._clipped = names, torch.tensor(counts, dtype=torch.int64, device="cpu")

    def add(self, report: StepRecord, table: TensorTable) -> None:
        """Record a healthy step."""
        if self._blocks is None:
            return
        if not self._parts:
            self._form_parts(report, table)
        self._norms.append(report.parameter_norms)
        if self._is_local and report.factors is not None:
            parts = report.parameter_norms if report.unit_norms is None else report.unit_norms
            self._clips.append((report.factors, parts))
            if len(self._clips) * len(parts) >= MAX_WAITING_FACTORS:
                self._flush()
        if len(self._norms) >= MAX_WAITING_STEPS:
            self._flush()

    def metrics(self, top_k: int | None) -> dict[str, float]:
        """Return percentiles of each block's norms in the epoch and, if rules clip local norms, its clip fraction.

        Args:
            top_k: Largest number of blocks, those with the largest p99; None stands for all.
        """
        self._flush()
        found = self._sketch.quantiles([percent / 100 for percent in BLOCK_PERCENTILES])
        values = dict(zip(BLOCK_PERCENTILES.values(), found, strict=True))
        if self._is_local:
            values[BLOCK_CLIP_FRACTION] = self._clipped.double() / self._sketch.count
        places = largest(found[-1], top_k)
        return {prefix + self._names[place]: float(each[place]) for prefix, each in values.items() for place in places}

    def end_epoch(self) -> None:
        """Discard the norms and counts of the epoch."""
        self._norms.clear()
        self._clips.clear()
        self._sketch.reset()
        self._clipped.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the blocks, their norms and their counts."""
        self._flush()
        return {"names": self._names, "norms": self._sketch.state(), "clipped": self._clipped.clone(), "is_local": self._is_local}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`; call :meth:`attach` afterwards."""
        self._names, self._is_local = list(state["names"]), state["is_local"]
        self._sketch = NormSketch(len(self._names))
        self._sketch.load(state["norms"])
        self._clipped = state["clipped"].cpu().clone()

    def _form_parts(self, report: StepRecord, table: TensorTable) -> None:
        """Find out from the first step whether factors are those of tensors or of output rows, and which blocks they belong to."""
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
    """Return in which steps clipping made any entry of which block smaller, bool of shape ``(steps, B)``."""
    factors = torch.stack([factor.reshape(-1).expand(len(parts)) for factor, parts in clips])
    # A norm of 0 stays 0 whatever its factor is, so that nothing was made smaller.
    smaller = (factors < 1.0) & (torch.stack([parts for _, parts in clips]) > 0)
    hits = torch.zeros(len(clips), len(blocks.names), dtype=torch.int32, device="cpu")
    inside = smaller
    if not blocks.is_total:
        inside = smaller[:, blocks.members]
    return hits.scatter_add_(1, blocks.member_blocks.expand(inside.shape), inside.int()) > 0


def largest(values: Tensor, count: int | None) -> list[int]:
    """Return the indices of the largest finite values, in ascending order.

    Args:
        values: Values, shape ``(B,)``.
        count: Largest number of indices; None stands for B.
    """
    if count is None or count >= len(values):
        return list(range(len(values)))
    return sorted(values.nan_to_num(nan=-1.0, posinf=-1.0).topk(count).indices.tolist())
