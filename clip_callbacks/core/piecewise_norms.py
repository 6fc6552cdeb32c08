r"""Norms of large CPU tensors for which torch has no fast kernel, read chunk by chunk in the cache.

Only for p = 2 does torch reduce with vector instructions, and only to the dtype of the tensor. For any other finite order it adds
one power at a time to one running sum: it takes four (p = 1) to forty times as long, and over ten million entries a float32 sum is
off by per cent. Half-precision tensors it converts as a whole into new memory. Here each chunk is converted, raised and added up by
vector instructions, and the sums of the chunks are added in float64:

.. math::
    \lVert g \rVert_p = \Bigl(\sum_{\text{chunks}} \sum_j |g_j|^p\Bigr)^{1/p}

Powers of integer and half-integer orders are taken by squaring, others as :math:`2^{p \log_2 |g_j|}`, with an error of at most
1e-5. Whatever lies between :math:`|g_j|` and :math:`|g_j|^p` neither overflows nor underflows before :math:`|g_j|^p` does, so that
norms are reliable in the same range as those of torch's kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

CHUNK_ENTRIES = 1 << 18
"""Number of entries that are read at a time: 1 MiB in float32, which stays in a cache."""

MIN_ENTRIES = 1 << 13
"""Smallest number of entries of a tensor that is read in this way. Those below it keep the bits of torch's kernel."""

FAST_ORDER = 2.0
"""The order for which torch reduces with vector instructions."""

HALF_DTYPES = (torch.float16, torch.bfloat16)

REAL_DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which to accumulate norms of tensors of a dtype; None for their own."""
    return torch.float32 if dtype in HALF_DTYPES else None


def norms_of_each(tensors: list[Tensor], norm_type: float) -> tuple[Tensor, ...]:
    """Norm of each tensor, 0-dim; with the bits of ``torch._foreach_norm`` except for large tensors of :func:`has_slow_kernel`.

    Args:
        tensors: At least one strided tensor, none of them empty, all of one dtype on one device.
        norm_type: The order p.
    """
    dtype = accumulation_dtype(tensors[0].dtype)
    if not has_slow_kernel(tensors[0], norm_type):
        return torch._foreach_norm(tensors, norm_type, dtype=dtype)
    norms: list[Tensor | None] = [None] * len(tensors)
    small = [place for place, tensor in enumerate(tensors) if not is_large(tensor)]
    if small:
        for place, norm in zip(
            small, torch._foreach_norm([tensors[place] for place in small], norm_type, dtype=dtype), strict=True
        ):
            norms[place] = norm
    workspace = Workspace(max(tensor.numel() for tensor in tensors), dtype or tensors[0].dtype)
    return tuple(
        _large_norm(tensor.detach(), norm_type, workspace) if norm is None else norm
        for tensor, norm in zip(tensors, norms, strict=True)
    )


def has_slow_kernel(tensor: Tensor, norm_type: float) -> bool:
    """Return whether norms of large tensors of this dtype and device are better read by chunks than by torch's kernel."""
    if not tensor.is_cpu or tensor.dtype not in REAL_DTYPES:
        return False
    # orders of 0 and below are passed on to torch as they are
    return norm_type > 0 and (norm_type != FAST_ORDER or tensor.dtype in HALF_DTYPES)


def is_large(tensor: Tensor) -> bool:
    """Return whether a tensor has so many entries that reading it by chunks pays."""
    # subclasses of Tensor may have no more functions than those that has_arithmetic tries
    return tensor.numel() >= MIN_ENTRIES and type(tensor) in {Tensor, nn.Parameter}


class Workspace:
    """Memory for a converted chunk and for powers of it, which all chunks use one after the other."""

    def __init__(self, entries: int, dtype: torch.dtype) -> None:
        """Allocate memory.

        Args:
            entries: Number of entries of the largest tensor.
            dtype: The dtype to accumulate in.
        """
        self.dtype = dtype
        self._first, self._second = (torch.empty(min(entries, CHUNK_ENTRIES), dtype=dtype, device="cpu") for _ in range(2))

    def like(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """Two contiguous tensors of the shape of a chunk."""
        if chunk.shape == self._first.shape:
            return self._first, self._second
        return self._first[: chunk.numel()].view(chunk.shape), self._second[: chunk.numel()].view(chunk.shape)


def _large_norm(tensor: Tensor, norm_type: float, workspace: Workspace) -> Tensor:
    if math.isinf(norm_type):
        return largest_entry(tensor).to(workspace.dtype)
    sums = []
    for chunk in chunks(tensor):
        a, b = _factors(chunk, norm_type, *workspace.like(chunk))
        sums.append(a.sum() if b is None else torch.dot(a, b))
    return torch.stack(sums).double().sum().pow(1.0 / norm_type).to(workspace.dtype)


def large_row_norms(rows: Tensor, norm_type: float) -> Tensor:
    """Norm of each row, shape ``(r,)``.

    Args:
        rows: A tensor of shape ``(r, …)``, at least two-dimensional, for which :func:`has_slow_kernel` holds.
        norm_type: The order p.
    """
    workspace = Workspace(rows.numel(), accumulation_dtype(rows.dtype) or rows.dtype)
    return torch.cat([_chunk_row_norms(chunk.flatten(1), norm_type, workspace) for chunk in row_chunks(rows.detach())])


def _chunk_row_norms(rows: Tensor, norm_type: float, workspace: Workspace) -> Tensor:
    norms: Tensor
    if rows.numel() > CHUNK_ENTRIES:  # a single row
        norms = _large_norm(rows, norm_type, workspace).reshape(1)
    elif math.isinf(norm_type):
        smallest, largest = torch.aminmax(rows, dim=1)
        norms = torch.maximum(smallest.neg_(), largest).abs_().to(workspace.dtype)
    elif norm_type == FAST_ORDER:
        norms = torch.linalg.vector_norm(workspace.like(rows)[0].copy_(rows), norm_type, dim=1)
    else:
        a, b = _factors(rows, norm_type, *workspace.like(rows))
        powers = a if b is None else torch.mul(a, b, out=workspace.like(rows)[1])
        norms = powers.sum(1).double().pow(1.0 / norm_type).to(workspace.dtype)
    return norms


def _factors(entries: Tensor, norm_type: float, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return two tensors whose product is ``|entries| ** norm_type``; None for a second one of ones.

    Args:
        entries: Numbers of any sign.
        norm_type: The order p, finite and above 0.
        first: Memory for the result, of the dtype to accumulate in.
        second: More such memory.
    """
    if entries.dtype is not first.dtype:
        entries = first.copy_(entries)
    if norm_type % 2.0:
        entries = torch.abs(entries, out=first)
    if (2.0 * norm_type) % 1.0:
        # 0 and inf come out right: exp2(p log2(0)) = exp2(-inf) = 0
        return entries.log2_().mul_(norm_type).exp2_(), None
    order = int(norm_type)
    if order != norm_type:
        order, entries = int(2.0 * norm_type), entries.sqrt_()
    if order == 1:
        return entries, None
    # the power of half the order by squaring, from the highest binary digit down
    power = entries
    for digit in f"{order // 2:b}"[1:]:
        power = torch.mul(power, power, out=second)
        if digit == "1":
            power = power.mul_(entries)
    if order % 2 == 0:
        return power, power
    return torch.mul(power, power, out=second), entries


def chunks(tensor: Tensor) -> Sequence[Tensor]:
    """One-dimensional contiguous tensors that hold the entries of a tensor, at most ``CHUNK_ENTRIES`` each, in any order."""
    # dimensions from the slowest to the fastest: a transposed tensor is one block of memory too
    ordered = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    if ordered.is_contiguous():
        parts: tuple[Tensor, ...] = ordered.view(-1).split(CHUNK_ENTRIES)  # type: ignore[no-untyped-call]
        return parts
    if tensor.numel() <= CHUNK_ENTRIES:
        return [tensor.contiguous().view(-1)]
    return [chunk for part in row_chunks(tensor) for chunk in chunks(part.squeeze(0))]


def row_chunks(rows: Tensor) -> tuple[Tensor, ...]:
    """Slices of a tensor along its first dimension, which are views whatever its strides."""
    if rows.numel() <= CHUNK_ENTRIES:
        return (rows,)
    # a row longer than a chunk is a chunk by itself: torch does not split by 0
    parts: tuple[Tensor, ...] = rows.split(max(1, _rows_of_chunk(rows)))  # type: ignore[no-untyped-call]
    return parts


def _rows_of_chunk(rows: Tensor) -> int:
    return CHUNK_ENTRIES * len(rows) // rows.numel()


def largest_entry(tensor: Tensor) -> Tensor:
    """Largest absolute value of the entries, 0-dim; NaN if an entry is NaN.

    On a CPU ``aminmax`` takes a tenth of the time of ``vector_norm(x, inf)``.
    """
    if tensor.is_complex():
        return tensor.abs().amax()
    smallest, largest = torch.aminmax(tensor)
    return torch.maximum(-smallest, largest).abs_()  # no -0.0
