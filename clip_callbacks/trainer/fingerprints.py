"""Fingerprints of tensors, which tell that a tensor has changed without a copy of it.

Trap: ``tensor._version`` rises with each in-place write, but ``tensor.data`` goes around it, and writes to a DTensor do not raise
the version of its shard. The content fingerprint therefore sums the bits, too. Gradients are only asked where they are and how
often they were written to, which reads no entry: Lightning does not tell which backward pass has reached which gradient.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from clip_callbacks.core.reduction import shard_of
from clip_callbacks.core.tensor_table import TensorTable

ENTRIES_PER_SUM = 1 << 22
"""Entries that are summed at a time: torch converts them to int64, which takes 8 bytes for each."""

INTEGER_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer dtype as which entries can be read, by their size in bytes."""

GradientFingerprints: TypeAlias = dict[int, tuple[int, int, int]]
"""Fingerprints of the gradients that are not None, by the position of their parameter in the table."""


def version_of(tensor: Tensor) -> int | None:
    """Return how often a tensor was written to in place; None if it was made in inference mode, where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def fingerprint(tensor: Tensor) -> tuple[int | None, int | None]:
    """Return the version of a tensor and the sum of its bits, of this rank's shard.

    Together they detect most changes: ``tensor.data`` goes around the version, and a permutation of the entries leaves the sum
    as it is. Either may be None: a tensor made in inference mode has no version, a subclass of another package may not show its
    bits, and an uninitialized parameter of a lazy module has neither.
    """
    if is_lazy(tensor):
        return None, None
    return version_of(tensor), sum_of_bits(tensor)


@torch.no_grad()
def sum_of_bits(tensor: Tensor) -> int | None:
    """Return the sum of a tensor's entries, read as integers, of this rank's shard; None if they cannot be read as such.

    It takes any dtype, also those without norms, and distinguishes 0.0 from -0.0 and one NaN from another.
    """
    try:
        shard = shard_of(tensor).detach()
        if shard.is_quantized:
            shard = shard.int_repr()
        if shard.is_complex():
            shard = torch.view_as_real(shard)
        integers = shard.view(INTEGER_DTYPES[shard.element_size()])
        return sum(int(piece.sum(dtype=torch.int64)) for piece in _pieces(integers))
    except Exception:  # subclasses of other packages may raise anything
        return None


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.numel() <= ENTRIES_PER_SUM:
        return (tensor,)
    rows = max(1, ENTRIES_PER_SUM * len(tensor) // tensor.numel())
    pieces: tuple[Tensor, ...] = tensor.split(rows)  # type: ignore[no-untyped-call]
    return pieces


def gradient_fingerprints(table: TensorTable) -> GradientFingerprints:
    """Return the addresses of the gradients and their counts of in-place writes. No entry is read.

    Args:
        table: The parameters.
    """
    gradients = [tensor.grad for tensor in table.tensors]
    return {place: _gradient_fingerprint(gradient) for place, gradient in enumerate(gradients) if gradient is not None}


def gradients_changed(table: TensorTable, before: GradientFingerprints) -> bool:
    """Return whether any gradient has another fingerprint than before; stops at the first one.

    Args:
        table: The parameters.
        before: Fingerprints from :func:`gradient_fingerprints`.
    """
    for place, tensor in enumerate(table.tensors):
        gradient = tensor.grad
        now = None if gradient is None else _gradient_fingerprint(gradient)
        if now != before.get(place):
            return True
    return False


def _gradient_fingerprint(gradient: Tensor) -> tuple[int, int, int]:
    shard = shard_of(gradient)
    entries = shard if shard.layout is torch.strided else shard._values()
    # an in-place write to a DTensor does not raise the version of its shard: both versions are needed
    return entries.data_ptr(), gradient._version, shard._version
