r"""Norm of each tensor, by one read of all.

.. math::
    \lVert g \rVert_p = \Bigl(\sum_j |g_j|^p\Bigr)^{1/p}, \qquad \lVert g \rVert_\infty = \max_j |g_j|

Half-precision tensors accumulate in float32, others in their own precision, with the same kernels in the same order as
``torch.nn.utils.clip_grad_norm_``: in float32 the norms have the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clip_callbacks.core.buckets import Buckets

CHUNK = 1 << 18
"""Entries that are held in a wider dtype at a time: 1 MiB in float32, which stays in a cache."""

_HALF = (torch.float16, torch.bfloat16)


def tensor_norms(tensors: list[Tensor], norm_type: float, *, is_uniform: bool = False, buckets: Buckets | None = None) -> Tensor:
    """Norm of each tensor, by one read of all.

    Args:
        tensors: At least one strided tensor, none of them empty; dtypes and devices may differ.
        norm_type: The order p.
        is_uniform: Whether it is known that all are of one dtype on one device.
        buckets: How to read small ones together.

    Returns:
        Shape ``(n,)``, on the device of the first tensor; float64 if any tensor is, else float32.
    """
    if buckets:
        try:
            return buckets.norms(tensors, norm_type, _dtype_to_accumulate(tensors[0]))
        except RuntimeError:  # parameters were given other shapes or dtypes since the buckets were planned
            is_uniform = False
    if is_uniform:
        return torch.stack(_norms_of_a_kind(tensors, norm_type))
    return _norms_of_kinds(tensors, norm_type)


def _norms_of_a_kind(tensors: list[Tensor], norm_type: float) -> list[Tensor]:
    dtype = _dtype_to_accumulate(tensors[0])
    if dtype and tensors[0].is_cpu and any(tensor.numel() > CHUNK for tensor in tensors):
        return _norms_by_pieces(tensors, norm_type, dtype)
    return list(torch._foreach_norm(tensors, norm_type, dtype=dtype))


def _norms_by_pieces(tensors: list[Tensor], norm_type: float, dtype: torch.dtype) -> list[Tensor]:
    """On a CPU a half-precision tensor is converted as a whole, into new memory: piece by piece it takes an eighth of the time."""
    pieces = [_pieces(tensor) for tensor in tensors]
    norms = iter(torch._foreach_norm([piece for some in pieces for piece in some], norm_type, dtype=dtype))
    found = [[next(norms) for _ in some] for some in pieces]
    return [some[0] if len(some) == 1 else total_norm(torch.stack(some), norm_type).reshape(()) for some in found]


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Slices along the first dimension, which are views whatever the strides."""
    if tensor.numel() <= CHUNK:
        return (tensor,)
    pieces: tuple[Tensor, ...] = tensor.split(max(1, CHUNK * len(tensor) // tensor.numel()))  # type: ignore[no-untyped-call]
    return pieces


def _dtype_to_accumulate(tensor: Tensor) -> torch.dtype | None:
    return torch.float32 if tensor.dtype in _HALF else None


def _norms_of_kinds(tensors: list[Tensor], norm_type: float) -> Tensor:
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(place)
    norms: list[Tensor] = [tensors[0]] * len(tensors)
    for places in kinds.values():
        for place, norm in zip(places, _norms_of_a_kind([tensors[i] for i in places], norm_type), strict=True):
            norms[place] = norm
    dtype = torch.float64 if any(norm.dtype is torch.float64 for norm in norms) else torch.float32
    return torch.stack([norm.to(tensors[0].device, dtype) for norm in norms])


def row_norms(rows: Tensor, norm_type: float) -> Tensor:
    """Norm of each row, by one read.

    Args:
        rows: Shape ``(r, …)`` with at least one entry.
        norm_type: The order p.

    Returns:
        Shape ``(r,)``, on the device of the tensor; float64 if it is of double precision, else float32.
    """
    dtype = _dtype_to_accumulate(rows)
    if len(rows) == 1:
        norm: Tensor = torch.linalg.vector_norm(rows, norm_type, dtype=dtype)
        return norm.reshape(1)
    each = tuple(range(1, rows.ndim))
    if dtype is None or not rows.is_cpu or rows.numel() <= CHUNK:
        norms: Tensor = torch.linalg.vector_norm(rows, norm_type, dim=each, dtype=dtype)
        return norms
    return torch.cat([torch.linalg.vector_norm(piece, norm_type, dim=each, dtype=dtype) for piece in _pieces(rows)])


def true_row_norms(rows: Tensor, norm_type: float) -> Tensor:
    """The same in float64, of rows scaled by their largest entry, as :func:`true_norms`; a second, slow read."""
    wide = torch.complex128 if rows.is_complex() else torch.float64
    return torch.cat([_true_row_norms(piece.detach().flatten(1).to(wide), norm_type) for piece in _pieces(rows)])


def _true_row_norms(rows: Tensor, norm_type: float) -> Tensor:
    peaks = rows.abs().amax(1)
    if math.isinf(norm_type):
        return peaks
    scales = torch.where(torch.isfinite(peaks) & (peaks > 0), peaks, 1.0)
    norms: Tensor = torch.linalg.vector_norm(rows / scales[:, None], norm_type, dim=1)
    return norms * scales


def true_norms(tensors: list[Tensor], norm_type: float) -> Tensor:
    """Norms in float64 of tensors scaled by their largest entry: right where powers overflow or underflow the other way.

    A second, slow read, made only when the first came out non-finite or next to zero.

    Returns:
        Shape ``(n,)``, float64; non-finite only where a tensor holds a non-finite entry.
    """
    return torch.stack([_true_norm(tensor, norm_type).to(tensors[0].device) for tensor in tensors])


def _true_norm(tensor: Tensor, norm_type: float) -> Tensor:
    peak = largest_entry(tensor).double()
    if not bool(peak > 0) or math.isinf(norm_type):  # 0, or NaN
        return peak
    scale = torch.where(torch.isfinite(peak), peak, 1.0)
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    chunks: tuple[Tensor, ...] = tensor.detach().reshape(-1).split(CHUNK)  # type: ignore[no-untyped-call]
    parts = torch.stack([torch.linalg.vector_norm(chunk.to(wide) / scale, norm_type) for chunk in chunks])
    return total_norm(parts, norm_type)[0] * scale


def largest_entry(tensor: Tensor) -> Tensor:
    """Max |x|, 0-dim; NaN if there is one. On a CPU this takes a tenth of the time of ``vector_norm(x, inf)``."""
    if tensor.is_complex():
        return tensor.abs().amax()
    smallest, largest = torch.aminmax(tensor)
    return torch.maximum(-smallest, largest)


def smallest_sound_norm(norm_type: float, dtype: torch.dtype) -> float:
    """The norm under which p-th powers of entries may have lost digits to underflow: (tiny / eps)^(1/p)."""
    if norm_type <= 0 or math.isinf(norm_type):
        return 0.0
    info = torch.finfo(dtype)
    return float((info.tiny / info.eps) ** (1.0 / norm_type))


def total_norm(norms: Tensor, norm_type: float) -> Tensor:
    """The p-norm of all entries from the norms of the tensors, shape ``(1,)``."""
    total: Tensor = torch.linalg.vector_norm(norms, norm_type, dim=0, keepdim=True)
    return total
