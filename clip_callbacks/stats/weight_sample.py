"""A sample of an optimizer's weights, which tells what share of them the updates change.

An entry is stalled if its gradient was not zero at some check, and its weight is bit for bit the one at the beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from clip_callbacks.core.tensor_table import TensorTable, count_entries

SAMPLED_ENTRIES = 256
"""Number of entries that are sampled of each larger parameter, or a few more; shares of them have an error of some 3 %."""

SAMPLED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Data types of weights that are sampled. Entries of others may be codes of a quantization, and have no updates of their own."""


class WeightSample:
    """Evenly spaced entries of each parameter, and what is known of them since the sample was taken.

    The memory is at most some 2 KiB for each parameter of 32 bits or fewer. Nothing is read on the host before
    :meth:`counts`.

    Args:
        table: The N parameters.
        places: Positions of the parameters to sample; others of a kind that cannot be sampled are passed over.

    Attributes:
        is_pending: True between :meth:`note_gradients` and :meth:`confirm` or :meth:`discard`.
    """

    @torch.no_grad()
    def __init__(self, table: TensorTable, places: Sequence[int]) -> None:
        self._table = table
        self.is_pending = self._has_new_gradients = False
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for place in places:
            shard = table.shards[place]
            if _can_be_sampled(shard):
                kinds.setdefault((shard.dtype, shard.device), []).append(place)
        self._parts = [_SamePart(table, members) for members in kinds.values()]

    @torch.no_grad()
    def note_gradients(self, gradients: Mapping[int, Tensor], rates: Sequence[Any]) -> None:
        """Record which gradients are not zero, as those of a step that :meth:`confirm` or :meth:`discard` must follow.

        Args:
            gradients: This rank's parts of the gradients, by the position of the parameter.
            rates: Learning rate of each parameter: a number, a tensor, or None if the optimizer chooses it. With 0, nothing is
                recorded.
        """
        self.is_pending = True  # also without entries to sample: ranks must agree on the number of checks
        for part in self._parts:
            part.note_gradients(gradients, rates)

    def confirm(self) -> None:
        """Take the recorded gradients for those of a healthy step; call it only while they are pending."""
        self.is_pending, self._has_new_gradients = False, True
        for part in self._parts:
            part.has_gradient |= part.pending

    def discard(self) -> None:
        """Discard the recorded gradients: their step was skipped."""
        self.is_pending = False

    def compare(self) -> bool:
        """Compare the weights with those at the beginning, if it is after a step whose gradients were confirmed.

        Returns:
            True if there was such a step since the last comparison.
        """
        is_new, self._has_new_gradients = self._has_new_gradients, False
        if is_new:
            self._compare()
        return is_new

    @torch.no_grad()
    def _compare(self) -> None:
        for part in self._parts:
            part.changed |= part.entries() != part.first

    def counts(self) -> tuple[Tensor, Tensor]:
        """Compare the weights once more, and estimate this rank's numbers of entries with a gradient, and of stalled ones.

        Returns:
            Two float64 tensors of shape ``(N,)``, read on the host.
        """
        self._compare()
        with_gradient, stalled = (torch.zeros(len(self._table), dtype=torch.float64, device="cpu") for _ in range(2))
        for part in self._parts:
            has_gradient, changed = part.has_gradient.cpu(), part.changed.cpu()
            owners, weights = part.owners(), part.entries_per_sample()
            with_gradient.index_add_(0, owners, has_gradient * weights)
            stalled.index_add_(0, owners, (has_gradient & ~changed) * weights)
        return with_gradient, stalled

    def typical_size(self, place: int) -> float:
        """Read the median size of a parameter's sampled entries; NaN if none is sampled."""
        for part in self._parts:
            if place in part.places:
                return float(part.first.cpu()[part.owners() == place].abs().double().median())
        return float("nan")

    @torch.no_grad()
    def is_copy_in_higher_precision(self, place: int, tensor: Tensor) -> bool:
        """Read whether a tensor holds a parameter's weights in a wider data type, as the float32 master weights of some optimizers.

        Args:
            place: Position of the parameter.
            tensor: This rank's part of a tensor in the optimizer's state.
        """
        shard = self._table.shards[place]
        if tensor.shape != shard.shape or not tensor.is_floating_point() or tensor.element_size() <= shard.element_size():
            return False
        stride = _stride(shard)
        return torch.equal(_spaced(tensor, stride).to(shard), _spaced(shard, stride))


class _SamePart:
    """The sampled entries of the parameters of one data type on one device, one after another."""

    def __init__(self, table: TensorTable, places: list[int]) -> None:
        self._table = table
        self.places = places
        self._strides = [_stride(table.shards[place]) for place in places]
        self.sizes = [-(-count_entries(table.shards[place]) // stride) for place, stride in zip(places, self._strides, strict=True)]
        self.first = self.entries()
        self.changed, self.has_gradient, self.pending = (torch.zeros_like(self.first, dtype=torch.bool) for _ in range(3))

    def entries(self) -> Tensor:
        """Return a copy of the sampled weights as they are now."""
        pairs = zip(self.places, self._strides, strict=True)
        return torch.cat([_spaced(self._table.shards[place], stride) for place, stride in pairs])

    def owners(self) -> Tensor:
        """Return the position of each sampled entry's parameter, int64 on the host."""
        return torch.tensor(self.places, dtype=torch.int64, device="cpu").repeat_interleave(
            torch.tensor(self.sizes, dtype=torch.int64, device="cpu")
        )

    def entries_per_sample(self) -> Tensor:
        """Return the number of entries that each sampled one stands for, float64 on the host."""
        sizes = torch.tensor(self.sizes, dtype=torch.int64, device="cpu")
        counts = [count_entries(self._table.shards[place]) for place in self.places]
        return (torch.tensor(counts, dtype=torch.float64, device="cpu") / sizes).repeat_interleave(sizes)

    def split(self, entries: Tensor) -> tuple[Tensor, ...]:
        """Return views of the entries of each parameter."""
        return entries.split(self.sizes)  # type: ignore[no-any-return, no-untyped-call]

    def note_gradients(self, gradients: Mapping[int, Tensor], rates: Sequence[Any]) -> None:
        """Record which of the parameters' gradients are not zero, except where the learning rate is 0."""
        self.pending.zero_()
        flags, found = [], []
        for place, stride, flag in zip(self.places, self._strides, self.split(self.pending), strict=True):
            gradient, rate = gradients.get(place), rates[place]
            # the values of a sparse gradient have another shape, and do not tell which rows they are of
            if gradient is None or gradient.shape != self._table.shards[place].shape:
                continue
            entries = _spaced(gradient, stride)
            if isinstance(rate, Tensor):
                # a product on the device, because to read the rate would be a host sync
                entries = entries * (rate != 0).to(entries.device, non_blocking=True)
            elif rate == 0:
                continue
            flags.append(flag)
            found.append(entries)
        if flags:
            torch._foreach_copy_(flags, found)  # a copy into bool is True where an entry is not zero, or is NaN


def _can_be_sampled(shard: Tensor) -> bool:
    # a subclass may be a quantized weight that merely claims to be of a floating-point type
    is_plain = type(shard) in {Tensor, nn.Parameter}
    return is_plain and shard.layout is torch.strided and shard.dtype in SAMPLED_DTYPES and count_entries(shard) > 0


def _stride(shard: Tensor) -> int:
    """The distance of sampled entries, without a common divisor with the row length: otherwise a few columns would be sampled."""
    columns = shard.shape[-1] if shard.ndim else 1
    stride = -(-count_entries(shard) // SAMPLED_ENTRIES)
    while gcd(stride, columns) > 1:
        stride -= 1
    return stride


def _spaced(tensor: Tensor, stride: int) -> Tensor:
    """Return every so many entries, as a view if the tensor is contiguous. Call it without autograd."""
    if tensor.is_contiguous():  # one call in place of two
        return tensor.as_strided((-(-tensor.numel() // stride),), (stride,))
    return tensor.reshape(-1)[::stride]
