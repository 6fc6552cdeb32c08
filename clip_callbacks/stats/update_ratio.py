r"""Size of an update relative to the weights.

.. math::
    \text{update\_ratio}_b = \frac{\lVert w^+_b - w_b \rVert_p}{\lVert w_b \rVert_p}
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clip_callbacks.core.blocks import Partition
from clip_callbacks.core.measurement import block_norms
from clip_callbacks.core.tensor_norms import HALF_DTYPES, norms_in_float64, smallest_reliable_norm, tensor_norms
from clip_callbacks.core.tensor_table import TensorTable, count_entries, learns


class WeightsBefore:
    """Copies of an optimizer's trainable parameters before a step, in float32 where the parameters are of half precision.

    Args:
        table: The parameters.
        blocks: Blocks whose parameters are copied.
    """

    @torch.no_grad()
    def __init__(self, table: TensorTable, blocks: Partition) -> None:
        self._table = table
        self._blocks = blocks
        self._places = [place for place in blocks.members.tolist() if self._takes(table, place)]
        live = self._live()
        self._copies = [torch.empty_like(each, dtype=torch.float32 if each.dtype in HALF_DTYPES else each.dtype) for each in live]
        if live:
            torch._foreach_copy_(self._copies, live)

    @staticmethod
    def _takes(table: TensorTable, place: int) -> bool:
        return learns(table.tensors[place]) and count_entries(table.shards[place]) > 0

    @torch.no_grad()
    def ratios(self, norm_type: float) -> Tensor:
        """Return the norm of the change of each block's parameters since then, divided by their norm then; overwrites the copies.

        Where ranks hold parts of the parameters, this is a collective, and all ranks get equal ratios.

        Args:
            norm_type: Order p of the norms.

        Returns:
            Ratios, float64 of shape ``(B,)``, on the host; NaN for a block whose weights were all 0, or are all frozen.
        """
        norms = [self._norms(norm_type)]
        if self._copies:
            torch._foreach_sub_(self._copies, self._live())
        norms.append(self._norms(norm_type))
        both = torch.cat(norms)
        if reduction := self._table.reduction:
            both = reduction.norms(both, norm_type)
        before, moved = block_norms(both.reshape(2, -1), self._blocks, norm_type)
        return torch.where(before > 0, moved / before, math.nan)

    def _live(self) -> list[Tensor]:
        return [self._table.shards[place].detach() for place in self._places]

    def _norms(self, norm_type: float) -> Tensor:
        """Return the norms of the copies, float64 of shape ``(N,)`` on the host; 0 for parameters without a copy."""
        norms = torch.zeros(len(self._table), dtype=torch.float64)
        if self._copies:
            found = tensor_norms(self._copies, norm_type).cpu().double()
            smallest = smallest_reliable_norm(norm_type, torch.float32)
            suspects = [place for place, norm in enumerate(found.tolist()) if norm != 0 and not smallest <= norm < math.inf]
            if suspects:
                found[suspects] = norms_in_float64([self._copies[place] for place in suspects], norm_type).cpu()
            norms[self._places] = found
        return norms
