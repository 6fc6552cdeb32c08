r"""Norm of the weights before a step, and size of the update relative to it.

.. math::
    \text{weight\_norm}_b = \lVert w_b \rVert_p, \qquad
    \text{update\_ratio}_b = \frac{\lVert w^+_b - w_b \rVert_p}{\lVert w_b \rVert_p}
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clip_callbacks.core.blocks import OUTSIDE, Partition
from clip_callbacks.core.measurement import block_norms
from clip_callbacks.core.piecewise_norms import HALF_DTYPES
from clip_callbacks.core.tensor_norms import reliable_norms, unread_norms
from clip_callbacks.core.tensor_table import TensorTable, count_entries, learns


class WeightsBefore:
    """An optimizer's trainable parameters before a step: copies of them, or only their norms.

    Args:
        table: The parameters.
        blocks: Blocks whose parameters are read.
        norm_type: Order p of the norms.
        with_copies: If True, the parameters are copied, in float32 where they are of half precision, so that their change can be
            measured by :meth:`measure_update`. If False, their norms are computed at once, on their device and without a host sync.
    """

    @torch.no_grad()
    def __init__(self, table: TensorTable, blocks: Partition, norm_type: float, *, with_copies: bool) -> None:
        self._table = table
        self._blocks = blocks
        self._norm_type = norm_type
        # as the step sees them: a hook may freeze parameters before they are read
        trainable = [place for place, block in enumerate(blocks.index) if block != OUTSIDE and self._may_change(place)]
        self._trainable_blocks = sorted({blocks.index[place] for place in trainable})
        self._places = [place for place in trainable if count_entries(table.shards[place])]
        self._copies: list[Tensor] = []
        self._found: Tensor | None = None
        self._norms_and_moved: tuple[Tensor, Tensor] | None = None
        live = self._live()
        if with_copies:
            self._copies = [
                torch.empty_like(each, dtype=torch.float32 if each.dtype in HALF_DTYPES else each.dtype) for each in live
            ]
            if live:
                torch._foreach_copy_(self._copies, live)
        elif live:
            self._found = unread_norms(live, norm_type)

    def _may_change(self, place: int) -> bool:
        """Return whether the step may change a parameter, on whatever ranks its entries are."""
        return learns(self._table.tensors[place]) and 0 not in self._table.shapes[place]

    def norms(self) -> Tensor:
        """Return the norm of each block's parameters before the step.

        Where ranks hold parts of the parameters, this is a collective, and all ranks get equal norms.

        Returns:
            Norms, float64 of shape ``(B,)``, on the host; NaN for a block without trainable parameters.
        """
        return self._where_trainable(self._over_all_ranks(self._norms())[0])

    @torch.no_grad()
    def measure_update(self) -> None:
        """Measure how far the parameters have moved since the copies were made, and release the copies."""
        norms = self._norms()
        if self._copies:
            torch._foreach_sub_(self._copies, self._live())
        self._norms_and_moved = norms, self._norms()
        self._copies = []

    def norms_and_ratios(self) -> tuple[Tensor, Tensor]:
        """Return the norms, and the norm of each block's update divided by them.

        If nothing has called :meth:`measure_update`, because the step went around Lightning, the update is measured now. It is one
        collective where ranks hold parts of the parameters.

        Returns:
            Norms as from :meth:`norms`, and ratios, float64 of shape ``(B,)``, on the host; NaN for a block whose weights were all
            0, or are all frozen.
        """
        if self._norms_and_moved is None:
            self.measure_update()
        assert self._norms_and_moved is not None
        before, moved = self._over_all_ranks(*self._norms_and_moved)
        return self._where_trainable(before), torch.where(before > 0, moved / before, math.nan)

    def _live(self) -> list[Tensor]:
        return [self._table.shards[place].detach() for place in self._places]

    def _norms(self) -> Tensor:
        """Return the norms of this rank's shards, float64 of shape ``(N,)`` on the host; 0 for parameters that are not read."""
        if self._norms_and_moved is not None:
            return self._norms_and_moved[0]
        norms = torch.zeros(len(self._table), dtype=torch.float64, device="cpu")
        if self._copies:
            norms[self._places] = reliable_norms(self._copies, self._norm_type)
        elif self._found is not None:
            norms[self._places] = self._found.cpu()
        return norms

    def _over_all_ranks(self, *sets: Tensor) -> Tensor:
        """Return the norms of blocks for k sets of norms of this rank's shards, shape ``(k, B)``."""
        together = torch.cat(sets)
        if reduction := self._table.reduction:
            together = reduction.norms(together, self._norm_type)
        return block_norms(together.reshape(len(sets), -1), self._blocks, self._norm_type)

    def _where_trainable(self, norms: Tensor) -> Tensor:
        """Replace the norms of blocks without trainable parameters by NaN."""
        trainable = torch.zeros(len(norms), dtype=torch.bool, device="cpu")
        trainable[self._trainable_blocks] = True
        return torch.where(trainable, norms, math.nan)
