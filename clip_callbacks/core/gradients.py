"""Gradients of one optimizer step that are there now."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from clip_callbacks.core.buckets import Buckets
from clip_callbacks.core.reduction import shard_of_gradient
from clip_callbacks.core.tensor_table import TensorTable, count_entries
from clip_callbacks.core.units import Rows

GRADIENT_OF, LAYOUT_OF = attrgetter("grad"), attrgetter("layout")
"""Functions that return an attribute of a tensor, without a frame of Python for each."""


# Not frozen, as all that each step makes anew: a frozen dataclass sets every field by a call.
@dataclass(eq=False)
class Gradients:
    """Gradients of one step: strided tensors with at least one entry. A sparse gradient is represented by its coalesced values.

    Args:
        table: The table of the N parameters.
        positions: Positions in the table of the parameters that have a gradient.
        tensors: Views of those gradients; writing to them writes to the gradients.
        buckets: The plan to read the small ones together; None reads each by itself.
    """

    table: TensorTable
    positions: list[int]
    tensors: list[Tensor]
    buckets: Buckets | None

    @property
    def exist(self) -> bool:
        """Whether there are any; where ranks hold parts of them, here or on another rank."""
        return self.table.reduction is not None or bool(self.tensors)

    @property
    def device(self) -> torch.device:
        """The device of the first one."""
        return self.table.shards[0].device

    @property
    def is_complete(self) -> bool:
        """Whether every parameter has one."""
        return len(self.positions) == len(self.table.tensors)

    @cached_property
    def rows(self) -> list[Rows]:
        """All gradients by output rows."""
        rows: list[Rows] = []
        for position, tensor in zip(self.positions, self.tensors, strict=True):
            # the values of a sparse gradient do not show their rows; its indices do
            gradient = self.table.tensors[position].grad
            if gradient is None or gradient.layout is torch.strided:
                rows += self.table.rows(position, tensor)
            else:
                rows.append(_rows_of_sparse(self.table, position, gradient, tensor))
        return rows

    def fill(self, values: Tensor) -> Tensor:
        """Extend values of the gradients that are there, shape ``(len(positions),)``, to shape ``(N,)``, with 0 elsewhere."""
        if len(self.positions) == len(self.table.tensors):
            return values
        return values.new_zeros(len(self.table)).index_copy_(0, self.table.index(self.positions, values.device), values)

    def with_empty(self, values: Tensor) -> Tensor:
        """Extend values of the gradients that are there, shape ``(len(positions),)``, by a 0 for each gradient without entries."""
        empty = [place for place, tensor in enumerate(self.table.tensors) if tensor.grad is not None and not count_entries(tensor)]
        place_of = {position: place for place, position in enumerate(sorted([*self.positions, *empty]))}
        places = torch.tensor([place_of[position] for position in self.positions], dtype=torch.int64, device=values.device)
        return values.new_zeros(len(place_of)).index_copy_(0, places, values)


def gradients_of(table: TensorTable, *, bucketed: bool = True) -> Gradients:
    """Return the gradients that are there now. Sparse ones are coalesced in place, so that equal indices count as one entry.

    Args:
        table: The parameters.
        bucketed: If True, plan how to read small gradients together, which pays if the table is used more than once.
    """
    if table.awaited:
        table.renew()
    positions, parameters = table.nonempty
    found: list[Any]
    if table.is_sharded:
        # Also of parameters whose shard on this rank is empty: redistributing a gradient may need all ranks.
        every = [shard_of_gradient(tensor) for tensor in table.tensors]
        found = [every[position] for position in positions]
    else:
        found = list(map(GRADIENT_OF, parameters))
    try:
        # most steps end here: all gradients are there, and none is sparse
        if {torch.strided}.issuperset(map(LAYOUT_OF, found)):
            return Gradients(table, positions, found, table.buckets if bucketed else None)
    except AttributeError:  # of a None
        pass
    entries = [
        (position, gradient if gradient.layout is torch.strided else coalesced_values(table.tensors[position]))
        for position, gradient in zip(positions, found, strict=True)
        if gradient is not None
    ]
    # torch has no maximum norm of an empty tensor, as the values of a sparse gradient may be
    entries = [(position, values) for position, values in entries if values.numel()]
    # without buckets, which are planned for all gradients
    return Gradients(table, [position for position, _ in entries], [values for _, values in entries], None)


def _rows_of_sparse(table: TensorTable, position: int, gradient: Tensor, values: Tensor) -> Rows:
    """Rows in which a coalesced gradient has entries."""
    if gradient.ndim <= 1:
        return table.rows(position, values)[0]
    if gradient.layout is not torch.sparse_coo or gradient.sparse_dim() != 1:
        raise ValueError(
            '`scope` must not be "unit" beside sparse gradients other than those of embeddings (COO, one sparse dimension), '
            f'got {gradient.layout} for {table.names[position]}. Choose the scope "parameter" for all rules.'
        )
    if table.reduction is None:
        table.check_rows(position, gradient.shape[0])
    return Rows(values, gradient.indices()[0] + table.units.firsts[position], position)


def coalesced_values(parameter: Tensor) -> Tensor:
    """Return the entries of a sparse gradient, which is coalesced in place, so that no index occurs twice."""
    assert parameter.grad is not None
    # Assigned to the parameter, since `coalesce` may return another tensor, and a write must reach the gradient. Compressed layouts
    # hold each index once.
    if parameter.grad.layout is torch.sparse_coo:
        parameter.grad = parameter.grad.coalesce()
    return parameter.grad.values()
