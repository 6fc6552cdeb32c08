"""Histograms whose bins end at powers of 2: one read of a tensor, no sorting, and entries that underflow are visible."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CODE_COUNT = 512
"""Number of codes. A code is the nine highest bits of a float32 number: its sign and its exponent."""

MANTISSA_BITS = 23
MAX_ENTRIES_AT_ONCE = 1 << 22
"""Largest number of entries that are converted to float32 together, in 16 MiB."""

_LARGEST = torch.finfo(torch.float32).max
# float64: powers with whole exponents would have torch's default dtype, in which they may be 0
_EXPONENTS = torch.arange(-126, 129, dtype=torch.float64, device="cpu")
_POWERS = torch.ldexp(torch.ones(255, dtype=torch.float64, device="cpu"), _EXPONENTS)
_EDGES = torch.cat([-_POWERS.flip(0), _POWERS])
_NEGATIVE = torch.arange(510, 256, -1, dtype=torch.int64, device="cpu")
_POSITIVE = torch.arange(1, 255, dtype=torch.int64, device="cpu")


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of entries in bins.

    Args:
        counts: Number of entries in each of K bins, int64 of shape ``(K,)``.
        edges: Ends of the bins in ascending order, float64 of shape ``(K + 1,)``: negative and positive powers of 2. The bin around
            0 ends at the smallest normal float32 numbers.
    """

    counts: Tensor
    edges: Tensor

    @classmethod
    def of_codes(cls, codes: Tensor) -> Histogram | None:
        """Make a histogram, without empty bins at its ends.

        Args:
            codes: Number of entries of each code, from :func:`code_counts`.

        Returns:
            The histogram; None without a finite entry.
        """
        counts = torch.cat([codes[_NEGATIVE], (codes[0] + codes[CODE_COUNT // 2]).reshape(1), codes[_POSITIVE]])
        filled = counts.nonzero().reshape(-1).tolist()
        if not filled:
            return None
        first, last = filled[0], filled[-1]
        return cls(counts[first : last + 1], _EDGES[first : last + 2])

    @property
    def middles(self) -> Tensor:
        """Return the middle of each bin, shape ``(K,)``."""
        return (self.edges[:-1] + self.edges[1:]) / 2


@torch.no_grad()
def code_counts(tensor: Tensor, factor: float | Tensor = 1.0) -> Tensor:
    """Count the entries of a tensor by their sign and exponent as float32 numbers.

    Args:
        tensor: A strided tensor of any floating or complex dtype. Entries outside of float32's range count at its ends.
        factor: Factor by which the entries are multiplied first, a number or a 0-dim tensor.

    Returns:
        Number of entries of each code, int64 of shape ``(512,)``, on the device of the tensor. The sign is the highest bit of the
        code. NaN and inf have the codes with the highest exponent, 255.
    """
    entries = tensor
    if tensor.is_complex():
        entries = torch.view_as_real(tensor)
    counts = torch.zeros(CODE_COUNT, dtype=torch.int64, device=tensor.device)
    for piece in entries.detach().reshape(-1).split(MAX_ENTRIES_AT_ONCE):  # type: ignore[no-untyped-call]
        bits = _as_float32(piece, factor).view(torch.int32)
        counts += torch.bincount((bits >> MANTISSA_BITS) & (CODE_COUNT - 1), minlength=CODE_COUNT)
    return counts


def _as_float32(entries: Tensor, factor: float | Tensor) -> Tensor:
    if entries.dtype is not torch.float64:
        wide = entries.float()
        return wide if isinstance(factor, float) and factor == 1.0 else wide * factor
    wide = entries * factor
    return torch.where(wide.isfinite(), wide.clamp(-_LARGEST, _LARGEST), torch.nan).float()
