r"""Norm of each tensor, by one read of all tensors.

.. math::
    \lVert g \rVert_p = \Bigl(\sum_j |g_j|^p\Bigr)^{1/p}, \qquad \lVert g \rVert_\infty = \max_j |g_j|

Half-precision tensors accumulate in float32, others in their own precision. Norms of float32 tensors have the bits of
``torch.nn.utils.clip_grad_norm_``, which calls the same kernels in the same order. There is one exception: norms of CPU tensors of
2^13 entries and more, of other orders than 2 and infinity, whose powers torch adds up in one running sum. They are read by
:mod:`clip_callbacks.core.piecewise_norms`, and are closer to the true norm.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from clip_callbacks.core.buckets import Buckets
from clip_callbacks.core.piecewise_norms import (
    accumulation_dtype,
    chunks,
    has_slow_kernel,
    is_large,
    large_row_norms,
    largest_entry,
    norms_of_each,
    row_chunks,
)


def tensor_norms(tensors: list[Tensor], norm_type: float, *, is_uniform: bool = False, buckets: Buckets | None = None) -> Tensor:
    """Norm of each tensor, by one read of all.

    Args:
        tensors: At least one strided tensor, none of them empty; dtypes and devices may differ.
        norm_type: The order p.
        is_uniform: If True, all tensors are known to have one dtype on one device.
        buckets: The plan to read small tensors together; None reads each by itself.

    Returns:
        Norms of shape ``(n,)`` on the device of the first tensor; float64 if any tensor is, else float32.
    """
    if buckets:
        try:
            return buckets.norms(tensors, norm_type)
        except RuntimeError:  # parameters were given other shapes or dtypes since the buckets were planned
            is_uniform = False
    if is_uniform:
        return torch.stack(norms_of_each(tensors, norm_type))
    return _mixed_norms(tensors, norm_type)


def _mixed_norms(tensors: list[Tensor], norm_type: float) -> Tensor:
    """Norms of tensors of several dtypes or devices, each kind by one multi-tensor read."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(place)
    # read by kind, but kept in the order of the tensors: the total norm is added up in it
    norms: list[Tensor] = [tensors[0]] * len(tensors)
    for places in kinds.values():
        for place, norm in zip(places, norms_of_each([tensors[i] for i in places], norm_type), strict=True):
            norms[place] = norm
    dtype = torch.float64 if any(norm.dtype is torch.float64 for norm in norms) else torch.float32
    return torch.stack([norm.to(tensors[0].device, dtype) for norm in norms])


def row_norms(rows: Tensor, norm_type: float) -> Tensor:
    """Norm of each row, by one read.

    Args:
        rows: A tensor of shape ``(r, …)`` with at least one entry.
        norm_type: The order p.

    Returns:
        Norms of shape ``(r,)`` on the device of the tensor; float64 if it is of double precision, else float32.
    """
    if rows.ndim > 1 and is_large(rows) and has_slow_kernel(rows, norm_type):
        return large_row_norms(rows, norm_type)
    dtype = accumulation_dtype(rows.dtype)
    norms: Tensor
    if len(rows) == 1:
        norms = torch.linalg.vector_norm(rows, norm_type, dtype=dtype).reshape(1)
    else:
        norms = torch.linalg.vector_norm(rows, norm_type, dim=tuple(range(1, rows.ndim)), dtype=dtype)
    return norms


def row_norms_in_float64(rows: Tensor, norm_type: float) -> Tensor:
    """Norm of each row in float64, each scaled by its largest entry, as in :func:`norms_in_float64`; a second, slow read."""
    wide = torch.complex128 if rows.is_complex() else torch.float64
    return torch.cat([_scaled_row_norms(chunk.detach().flatten(1).to(wide), norm_type) for chunk in row_chunks(rows)])


def _scaled_row_norms(rows: Tensor, norm_type: float) -> Tensor:
    peaks = rows.abs().amax(1)
    if math.isinf(norm_type):
        return peaks
    # rows of zeros, and rows with an inf or a NaN, are not scaled: 0 / 0 and inf / inf are NaN
    scales = torch.where(torch.isfinite(peaks) & (peaks > 0), peaks, 1.0)
    norms: Tensor = torch.linalg.vector_norm(rows / scales[:, None], norm_type, dim=1)
    return norms * scales


def norms_in_float64(tensors: list[Tensor], norm_type: float) -> Tensor:
    """Norm of each tensor in float64, scaled by its largest entry, so that p-th powers neither overflow nor underflow.

    This is a second, slow read, made only where the first came out non-finite or too small to be reliable.

    Returns:
        Norms of shape ``(n,)``, float64; non-finite only where a tensor holds a non-finite entry.
    """
    return torch.stack([_norm_in_float64(tensor, norm_type).to(tensors[0].device) for tensor in tensors])


def _norm_in_float64(tensor: Tensor, norm_type: float) -> Tensor:
    peak = largest_entry(tensor).double()
    # a host sync for each tensor, on a path that only unreliable norms take
    if not bool(peak > 0) or math.isinf(norm_type):  # 0, or NaN
        return peak
    scale = torch.where(torch.isfinite(peak), peak, 1.0)
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    # chunk by chunk, because a float64 copy of the whole tensor would take up to four times its memory
    parts = torch.stack([torch.linalg.vector_norm(chunk.to(wide) / scale, norm_type) for chunk in chunks(tensor.detach())])
    return total_norm(parts, norm_type) * scale


def reliable_norms(tensors: list[Tensor], norm_type: float) -> Tensor:
    """Norm of each tensor on the host, float64. Those that are not reliable are read a second time, in float64.

    Args:
        tensors: At least one strided tensor, none of them empty.
        norm_type: The order p.
    """
    norms = tensor_norms(tensors, norm_type).cpu().double()
    smallest = smallest_reliable_norm(norm_type, torch.float32)
    # 0 is among them: all powers may have underflowed
    suspects = [place for place, norm in enumerate(norms.tolist()) if not (norm > 0 and smallest <= norm < math.inf)]
    if suspects:
        norms[suspects] = norms_in_float64([tensors[place] for place in suspects], norm_type).cpu()
    return norms


def unread_norms(tensors: list[Tensor], norm_type: float) -> Tensor:
    """Norm of each tensor, float64, without a host sync.

    Other devices than a CPU accumulate in float64, in which powers of float32 numbers up to the fourth stay in range: no norm needs
    a second read, for which the host would have to look at the first one.

    Args:
        tensors: At least one strided tensor, none of them empty.
        norm_type: The order p.
    """
    if all(float64_device(tensor.device).type == "cpu" for tensor in tensors):
        return reliable_norms(tensors, norm_type)
    norms = torch._foreach_norm(
        [tensor.abs() if tensor.is_complex() else tensor for tensor in tensors], norm_type, dtype=torch.float64
    )
    return torch.stack([norm.to(tensors[0].device) for norm in norms])


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or a CPU if the device has no float64 numbers."""
    return torch.device("cpu") if device.type == "mps" else device


@cache
def smallest_reliable_norm(norm_type: float, dtype: torch.dtype) -> float:
    """The norm below which p-th powers of entries may have lost digits to underflow: (tiny / eps)^(1/p).

    Args:
        norm_type: The order p.
        dtype: The dtype in which the powers were accumulated.
    """
    # the maximum norm takes no powers; orders of 0 and below are passed on to torch as they are
    if norm_type <= 0 or math.isinf(norm_type):
        return 0.0
    info = torch.finfo(dtype)
    # Powers that add up to tiny / eps or more lose less than a share of eps by each power below tiny, even if it becomes 0.
    return float((info.tiny / info.eps) ** (1.0 / norm_type))


def total_norm(norms: Tensor, norm_type: float) -> Tensor:
    """The p-norm of all entries from the p-norms of the tensors, 0-dim."""
    total: Tensor = torch.linalg.vector_norm(norms, norm_type)
    return total
