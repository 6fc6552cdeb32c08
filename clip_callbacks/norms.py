r"""The one read of the gradients: tensor norms, and block norms from them.

.. math::
    \lVert g \rVert_p = \Bigl(\sum_j |g_j|^p\Bigr)^{1/p}, \qquad \lVert g \rVert_\infty = \max_j |g_j|

and a p-norm of p-norms is the p-norm of all entries, so that one read serves every scope.

Half-precision gradients accumulate in float32, others in their own precision, with the same kernels in the same order as
``torch.nn.utils.clip_grad_norm_``: in float32 the total norm has the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from clip_callbacks.blocks import Partition
from clip_callbacks.buckets import Buckets
from clip_callbacks.parameters import Gradients

CHUNK = 1 << 20
"""Entries that :func:`true_norms` holds in float64 at a time."""

SAFE_IN_DOUBLE = 4.0
"""The order up to which powers of float32 numbers, and sums of them, stay in the range of float64."""

TRUE, FALSE = torch.tensor(True), torch.tensor(False)
"""The two 0-dim flags of steps that were decided on the host: made once."""

_HALF = (torch.float16, torch.bfloat16)


def as_norm_type(norm_type: float | Literal["inf"]) -> float:
    """Check the order of a norm.

    Raises:
        ValueError: If it is not above 0; ``"inf"`` is the maximum norm.
    """
    if (order := number_above_zero(norm_type)) is not None:
        return order
    raise ValueError(f'`norm_type` must be a number above 0 or "inf", got {norm_type!r}. 2 is the usual choice.')


def number_above_zero(value: object) -> float | None:
    """A number, or its text as configuration files give it, as a float; None if it is not one above 0."""
    if not isinstance(value, (float, int, str, Real)) or value is True:
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if number > 0 else None


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
        return buckets.norms(tensors, norm_type, _dtype_to_accumulate(tensors[0]))
    if is_uniform:
        return torch.stack(_norms_of_a_kind(tensors, norm_type))
    return _norms_of_kinds(tensors, norm_type)


def _norms_of_a_kind(tensors: list[Tensor], norm_type: float) -> list[Tensor]:
    return list(torch._foreach_norm(tensors, norm_type, dtype=_dtype_to_accumulate(tensors[0])))


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


def block_norms(norms: Tensor, partition: Partition, norm_type: float) -> Tensor:
    """Norms of blocks from the norms of the parameters in them.

    Args:
        norms: Shape ``(N,)``, one for each parameter of the table, 0 where there is no gradient.
        partition: N parameters in B blocks.
        norm_type: The order p.

    Returns:
        Shape ``(B,)``, dtype and device of ``norms``.
    """
    if partition.is_finest:
        return norms
    if partition.is_whole:
        return total_norm(norms, norm_type)
    blocks = partition.member_blocks.to(norms.device)
    parts = (norms if partition.is_total else norms[partition.members.to(norms.device)]).double()
    if norms.dtype is torch.float32 and norm_type <= SAFE_IN_DOUBLE:
        sums = parts.new_zeros(len(partition.names)).index_add_(0, blocks, parts.pow(norm_type))
        return sums.pow(1.0 / norm_type).to(norms.dtype)
    peaks = parts.new_zeros(len(partition.names)).scatter_reduce_(0, blocks, parts, "amax")
    if math.isinf(norm_type):
        return peaks.to(norms.dtype)
    scales = torch.where(torch.isfinite(peaks) & (peaks > 0), peaks, 1.0)
    sums = torch.zeros_like(peaks).index_add_(0, blocks, (parts / scales[blocks]).pow(norm_type))
    return (sums.pow(1.0 / norm_type) * scales).to(norms.dtype)


@dataclass(frozen=True, eq=False)
class Measurement:
    """Norms of one step's gradients: on the host, or, of a deferred step, where the gradients are and unread.

    Args:
        norms: Of each parameter of the table, shape ``(N,)``, 0 where there is no gradient.
        total: Of all of them together, shape ``(1,)``.
        scale: What the gradients are to be multiplied by before all else; the norms are of the scaled gradients.
        is_deferred: Whether the host is not to read them now.
    """

    norms: Tensor
    total: Tensor
    scale: float | Tensor = 1.0
    is_deferred: bool = False

    @cached_property
    def is_finite(self) -> bool:
        """Whether every entry of every gradient is; this reads the total norm."""
        return math.isfinite(self.total.tolist()[0])

    @cached_property
    def finite(self) -> Tensor:
        """The same, 0-dim bool; of a deferred step unread, and finite entries whose norm overflows do not count as finite."""
        if self.is_deferred:
            return self.total.reshape(()) < math.inf
        return TRUE if self.is_finite else FALSE


def measure(
    gradients: Gradients,
    norm_type: float,
    *,
    scale: float = 1.0,
    loss_scale: Tensor | None = None,
    local: bool = False,
    deferred: bool = False,
) -> Measurement:
    """Read the gradients once, and those a second time whose norm cannot be trusted.

    Args:
        gradients: Of one step.
        norm_type: The order p.
        scale: What the gradients will be multiplied by before all else; the norms are of the scaled gradients.
        loss_scale: What they will be divided by, a tensor of one entry; None is 1.
        local: Whether the norms of single parameters matter too, not only the total norm.
        deferred: Whether nothing is to be read on the host; then nothing is read a second time either.
    """
    if not gradients.tensors:
        return Measurement(torch.zeros(len(gradients.table)), torch.zeros(1), scale, is_deferred=deferred)
    norms = tensor_norms(gradients.tensors, norm_type, is_uniform=gradients.is_uniform, buckets=gradients.buckets)
    total = total_norm(norms, norm_type)
    if deferred:
        of_all = scale if loss_scale is None else scale / loss_scale
        if isinstance(of_all, Tensor) or of_all != 1.0:
            norms, total = norms * of_all, total * of_all
        return Measurement(gradients.fill(norms), total, of_all, is_deferred=True)
    norms, total, divisor = on_host(norms, total, loss_scale)
    sound = smallest_sound_norm(norm_type, norms.dtype)
    if not gradients.is_uniform or not _all_sound(total, sound) or (local and not _all_sound(norms, sound)):
        norms, total = _mended(gradients.tensors, norms, total, norm_type)
    scale = scale / divisor
    if scale != 1.0:
        norms, total = _fitting(norms.double() * scale, total.double() * scale, norms.dtype)
    return Measurement(gradients.fill(norms), total, scale)


def on_host(norms: Tensor, total: Tensor, loss_scale: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Bring what the rest of the step is decided from to the host: the one host sync; none on a CPU."""
    if norms.is_cpu:
        return norms, total, 1.0 if loss_scale is None else float(loss_scale)
    parts = [norms, total] if loss_scale is None else [norms, total, loss_scale.to(norms).reshape(1)]
    together = torch.cat(parts).cpu()
    count = len(norms)
    return together[:count], together[count : count + 1], 1.0 if loss_scale is None else together.tolist()[-1]


def _all_sound(norms: Tensor, sound: float) -> bool:
    numbers = norms.tolist()
    return math.isfinite(sum(numbers)) and min(numbers) >= sound


def _mended(tensors: list[Tensor], norms: Tensor, total: Tensor, norm_type: float) -> tuple[Tensor, Tensor]:
    """Norms and total norm, those that cannot be trusted in the dtype they accumulated in measured again."""
    bounds = [smallest_sound_norm(norm_type, _accumulated_in(tensor.dtype)) for tensor in tensors]
    sound = [bound <= norm < math.inf for bound, norm in zip(bounds, norms.tolist(), strict=True)]
    if all(sound) and _all_sound(total, max(bounds)):
        return norms, total
    mended = norms.double()
    suspects = [place for place, is_sound in enumerate(sound) if not is_sound]
    if suspects:
        mended[suspects] = true_norms([tensors[place] for place in suspects], norm_type).cpu()
    return _fitting(mended, sound_total(mended, norm_type), norms.dtype)


def sound_total(norms: Tensor, norm_type: float) -> Tensor:
    """The p-norm of norms in float64, scaled by the largest: neither overflows nor underflows; shape ``(1,)``."""
    wide = norms.double()
    peak = wide.amax()
    scale = torch.where(torch.isfinite(peak) & (peak > 0), peak, 1.0)
    return total_norm(wide / scale, norm_type) * scale


def _accumulated_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in {torch.float64, torch.complex128} else torch.float32


def _fitting(norms: Tensor, total: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Float64 norms in a narrower dtype if all of them are in its range, else as they are."""
    info = torch.finfo(dtype)
    both = torch.cat([norms, total])
    fits = (both == 0) | ~torch.isfinite(both) | ((both >= info.tiny) & (both <= info.max))
    return (norms.to(dtype), total.to(dtype)) if bool(fits.all()) else (norms, total)
