"""Histograms of tensors whose bins end at powers of two: one read, no sorting, and what underflows can be seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CODES = 512
"""Sign and exponent of a float32 number, its nine highest bits."""

MANTISSA_BITS = 23
PIECE = 1 << 22
"""Entries that are looked at together: 16 MiB of them."""

_LARGEST = torch.finfo(torch.float32).max
_POWERS = torch.ldexp(torch.ones(255, dtype=torch.float64, device="cpu"), torch.arange(-126, 129, device="cpu"))
_EDGES = torch.cat([-_POWERS.flip(0), _POWERS])
_NEGATIVE, _POSITIVE = torch.arange(510, 256, -1, device="cpu"), torch.arange(1, 255, device="cpu")


@dataclass(frozen=True, eq=False)
class Histogram:
    """How many entries lie where.

    Args:
        counts: Of K bins, int64.
        edges: Where they begin and end, ascending, float64 of shape ``(K + 1,)``: powers of two, negative and positive; the bin
            around 0 ends at the smallest normal float32 numbers.
    """

    counts: Tensor
    edges: Tensor

    @classmethod
    def of_codes(cls, codes: Tensor) -> Histogram | None:
        """From counts of codes, as :func:`code_counts` makes them; None without a finite entry. Empty ends are left out."""
        counts = torch.cat([codes[_NEGATIVE], (codes[0] + codes[CODES // 2]).reshape(1), codes[_POSITIVE]])
        filled = counts.nonzero().reshape(-1).tolist()
        if not filled:
            return None
        first, last = filled[0], filled[-1]
        return cls(counts[first : last + 1], _EDGES[first : last + 2])

    @property
    def middles(self) -> Tensor:
        """Of the bins, ``(K,)``."""
        return (self.edges[:-1] + self.edges[1:]) / 2


@torch.no_grad()
def code_counts(tensor: Tensor, factor: float | Tensor = 1.0) -> Tensor:
    """How many entries have which sign and exponent as float32 numbers.

    Args:
        tensor: Strided, of any floating dtype. Entries of a wider one count at the ends of float32's range.
        factor: What they are multiplied by before, a number or a 0-dim tensor.

    Returns:
        Shape ``(512,)``, int64, on the device of the tensor: the sign is the highest bit of the index. NaN and inf are among those
        of the highest exponent, 255.
    """
    entries = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    counts = torch.zeros(CODES, dtype=torch.int64, device=tensor.device)
    for piece in entries.detach().reshape(-1).split(PIECE):  # type: ignore[no-untyped-call]
        bits = _as_float32(piece, factor).view(torch.int32)
        counts += torch.bincount((bits >> MANTISSA_BITS) & (CODES - 1), minlength=CODES)
    return counts


def _as_float32(entries: Tensor, factor: float | Tensor) -> Tensor:
    if entries.dtype is not torch.float64:
        wide = entries.float()
        return wide if isinstance(factor, float) and factor == 1.0 else wide * factor
    wide = entries * factor
    return torch.where(wide.isfinite(), wide.clamp(-_LARGEST, _LARGEST), torch.nan).float()
