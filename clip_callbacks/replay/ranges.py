"""What there is to say of tensors in one line: their least and greatest entry, how many are NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_callbacks.bundles.batch_tensors import tensors_in


@dataclass(frozen=True)
class Range:
    """The entries of one tensor or of several.

    Args:
        low: The least finite entry; NaN if there is none.
        high: The greatest.
        nan: How many entries are NaN.
        inf: How many are infinite.
        count: How many there are.
        shape: Of the only tensor, or of the first with an entry that is not finite.
    """

    low: float
    high: float
    nan: int
    inf: int
    count: int
    shape: tuple[int, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, value: Any) -> Range | None:
        """Of the floating-point tensors anywhere in a value; None if there are none with entries.

        Args:
            value: A tensor, or mappings, sequences and data classes of such.
        """
        ranges = [cls._of_tensor(tensor) for tensor in floats_in(value) if tensor.numel()]
        return cls.joined(ranges) if ranges else None

    @classmethod
    def joined(cls, ranges: list[Range]) -> Range:
        """Of all together."""
        first = next((span for span in ranges if not span.is_finite), ranges[0])
        lows, highs = [span.low for span in ranges], [span.high for span in ranges]
        nan, inf, count = (sum(getattr(span, name) for span in ranges) for name in ("nan", "inf", "count"))
        return cls(_unless_nan(min, lows), _unless_nan(max, highs), nan, inf, count, first.shape)

    @classmethod
    def _of_tensor(cls, tensor: Tensor) -> Range:
        shape = tuple(tensor.shape)
        entries = entries_of(tensor)
        finite = entries.isfinite()
        nan, inf = 0, 0
        if not bool(finite.all()):
            nan, inf = int(entries.isnan().sum()), int(entries.isinf().sum())
            entries = entries[finite]
        low, high = (float(extreme) for extreme in entries.aminmax()) if entries.numel() else (math.nan, math.nan)
        return cls(low, high, nan, inf, finite.numel(), shape)

    @property
    def is_finite(self) -> bool:
        """Whether all entries are."""
        return not self.nan and not self.inf

    @property
    def largest(self) -> float:
        """The greatest magnitude of a finite entry; NaN if there is none."""
        return max(abs(self.low), abs(self.high))

    def faults(self) -> str:
        """Such as "12 NaN and 1 inf of 64x128"; empty if all entries are finite."""
        if self.is_finite:
            return ""
        counts = [f"{count} {kind}" for kind, count in self._faults()]
        return f"{' and '.join(counts)} of {'x'.join(map(str, self.shape)) or '1'}"

    def facts(self) -> dict[str, Any]:
        """For JSON; None stands for NaN."""
        low, high = (None if math.isnan(end) else end for end in (self.low, self.high))
        return {"min": low, "max": high, "nan": self.nan, "inf": self.inf, "count": self.count, "shape": list(self.shape)}

    def __str__(self) -> str:
        """The interval, and what is not in it."""
        if math.isnan(self.low):
            return f"all {' or '.join(kind for kind, _ in self._faults())}"
        return " + ".join([f"[{self.low:.3g}, {self.high:.3g}]", *(f"{count} {kind}" for kind, count in self._faults())])

    def _faults(self) -> list[tuple[str, int]]:
        """The kinds of entries that are not finite, and how many there are of each."""
        return [(kind, count) for kind, count in (("NaN", self.nan), ("inf", self.inf)) if count]


def _unless_nan(choose: Any, numbers: list[float]) -> float:
    return float(choose((number for number in numbers if not math.isnan(number)), default=math.nan))


def entries_of(tensor: Tensor) -> Tensor:
    """The entries as they are stored, real, and at least in float32."""
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
    if tensor.layout is not torch.strided or tensor.is_nested:
        tensor = tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def floats_in(value: Any) -> Iterator[Tensor]:
    """The tensors of real or complex numbers in a value."""
    return (tensor for tensor in tensors_in(value) if tensor.is_floating_point() or tensor.is_complex())
