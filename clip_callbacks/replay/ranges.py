"""Ranges of the values of tensors, and the number of NaN and infinite ones among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_callbacks.bundles.batch_tensors import tensors_in


@dataclass(frozen=True)
class ValueRange:
    """The range of the values of one or several tensors; a complex number counts as two values.

    Args:
        low: Smallest finite value; NaN if no value is finite.
        high: Largest finite value; NaN if no value is finite.
        nan: Number of values that are NaN.
        inf: Number of values that are infinite.
        count: Number of all values.
        shape: Shape of the first tensor with a non-finite value; if all values are finite, of the first tensor.
    """

    low: float
    high: float
    nan: int
    inf: int
    count: int
    shape: tuple[int, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, value: Any) -> ValueRange | None:
        """Return the range of all floating-point tensors in a value; None if they hold no values.

        Args:
            value: A tensor, or mappings, sequences and data classes of tensors.
        """
        ranges = [cls._of_tensor(tensor) for tensor in float_tensors_in(value) if tensor.numel()]
        return cls.joined(ranges) if ranges else None

    @classmethod
    def joined(cls, ranges: list[ValueRange]) -> ValueRange:
        """Return the range that covers all the given ones."""
        first = next((values for values in ranges if not values.is_finite), ranges[0])
        low = _ignoring_nan(min, [values.low for values in ranges])
        high = _ignoring_nan(max, [values.high for values in ranges])
        nan, inf, count = (sum(getattr(values, name) for values in ranges) for name in ("nan", "inf", "count"))
        return cls(low, high, nan, inf, count, first.shape)

    @classmethod
    def _of_tensor(cls, tensor: Tensor) -> ValueRange:
        values = real_values(tensor)
        finite = values.isfinite()
        nan, inf = 0, 0
        if not bool(finite.all()):
            nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
            values = values[finite]
        low = high = math.nan
        if values.numel():
            low, high = map(float, values.aminmax())
        return cls(low, high, nan, inf, finite.numel(), tuple(tensor.shape))

    @property
    def is_finite(self) -> bool:
        """Whether all values are finite."""
        return not self.nan and not self.inf

    @property
    def largest(self) -> float:
        """The largest absolute value among the finite ones; NaN if no value is finite."""
        return max(abs(self.low), abs(self.high))

    def describe_nonfinite(self) -> str:
        """Return a text such as "12 NaN and 1 inf in 64x128 values"; empty if all values are finite."""
        if self.is_finite:
            return ""
        counts = [f"{count} {kind}" for kind, count in self.nonfinite_counts()]
        return f"{' and '.join(counts)} in {'x'.join(map(str, self.shape)) or '1'} values"

    def nonfinite_counts(self) -> list[tuple[str, int]]:
        """Return "NaN" and "inf", as far as there are such values, each with their number."""
        return [(kind, count) for kind, count in (("NaN", self.nan), ("inf", self.inf)) if count]

    def facts(self) -> dict[str, Any]:
        """Return all attributes for JSON, in which None stands for NaN."""
        low, high = (None if math.isnan(end) else end for end in (self.low, self.high))
        return {"min": low, "max": high, "nan": self.nan, "inf": self.inf, "count": self.count, "shape": list(self.shape)}

    def __str__(self) -> str:
        """Return a text such as "[-1.5, 2] + 3 NaN"."""
        if math.isnan(self.low):
            return f"all {' or '.join(kind for kind, _ in self.nonfinite_counts())}"
        return " + ".join([f"[{self.low:.3g}, {self.high:.3g}]", *(f"{count} {kind}" for kind, count in self.nonfinite_counts())])


def _ignoring_nan(choose: Callable[..., float], numbers: list[float]) -> float:
    return choose((number for number in numbers if not math.isnan(number)), default=math.nan)


def real_values(tensor: Tensor) -> Tensor:
    """Return the stored values of a tensor as real numbers in float32 or float64."""
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
    if tensor.layout is not torch.strided or tensor.is_nested:
        tensor = tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def float_tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors of real or complex numbers in a value."""
    return (tensor for tensor in tensors_in(value) if tensor.is_floating_point() or tensor.is_complex())
