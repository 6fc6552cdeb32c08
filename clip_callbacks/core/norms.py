"""The measurement of one step: norms of tensors, of blocks and of all, on the host or left where the gradients are.

A p-norm of p-norms is the p-norm of all entries, so that one read serves every scope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from clip_callbacks.core.blocks import Partition
from clip_callbacks.core.parameters import Gradients, ParameterTable
from clip_callbacks.core.tensor_norms import row_norms, smallest_sound_norm, tensor_norms, total_norm, true_norms, true_row_norms

SAFE_IN_DOUBLE = 4.0
"""The order up to which powers of float32 numbers, and sums of them, stay in the range of float64."""

TRUE, FALSE = torch.tensor(True, device="cpu"), torch.tensor(False, device="cpu")
"""The two 0-dim flags of steps that were decided on the host: made once."""


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


def block_norms(norms: Tensor, partition: Partition, norm_type: float) -> Tensor:
    """Norms of blocks from the norms of the parameters in them.

    Args:
        norms: Shape ``(N,)``, one for each parameter of the table, 0 where there is no gradient; or ``(steps, N)``.
        partition: N parameters in B blocks.
        norm_type: The order p.

    Returns:
        Shape ``(B,)``, or ``(steps, B)``; dtype and device of ``norms``.
    """
    if partition.is_finest:
        return norms
    if partition.is_whole and norms.ndim == 1:
        return total_norm(norms, norm_type)
    blocks = partition.member_blocks.to(norms.device)
    parts = (norms if partition.is_total else norms[..., partition.members.to(norms.device)]).double()
    shape = *norms.shape[:-1], len(partition.names)
    if norms.dtype is torch.float32 and norm_type <= SAFE_IN_DOUBLE:
        sums = _sums(parts.pow(norm_type), blocks, parts.new_zeros(shape))
        return sums.pow(1.0 / norm_type).to(norms.dtype)
    peaks = parts.new_zeros(shape).scatter_reduce_(-1, blocks.expand(parts.shape), parts, "amax")
    if math.isinf(norm_type):
        return peaks.to(norms.dtype)
    scales = torch.where(torch.isfinite(peaks) & (peaks > 0), peaks, 1.0)
    sums = _sums((parts / scales[..., blocks]).pow(norm_type), blocks, torch.zeros_like(peaks))
    return (sums.pow(1.0 / norm_type) * scales).to(norms.dtype)


def _sums(parts: Tensor, blocks: Tensor, sums: Tensor) -> Tensor:
    """Add parts up by blocks; of several steps by scattering, since index_add_ would take a call for each part."""
    return sums.index_add_(0, blocks, parts) if parts.ndim == 1 else sums.scatter_add_(-1, blocks.expand(parts.shape), parts)


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a measurement beside the total norm.

    Args:
        local: Whether the norms of single parameters matter too.
        by_unit: Whether the norms of their units do.
        weights: The positions of the parameters whose own norms are wanted too.
    """

    local: bool = False
    by_unit: bool = False
    weights: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Measurement:
    """Norms of one step's gradients: on the host, or, of a deferred step, where the gradients are and unread.

    Args:
        norms: Of each parameter of the table, shape ``(N,)``, or of each unit, ``(U,)``; 0 where there is no gradient.
        total: Of all of them together, shape ``(1,)``.
        parameter_norms: Of each parameter, shape ``(N,)``.
        weights: Of the parameters themselves, or of their units, like ``norms``; 0 where they are not wanted; None where none is.
        scale: What the gradients are to be multiplied by before all else; the norms are of the scaled gradients.
        is_deferred: Whether the host is not to read them now.
    """

    norms: Tensor
    total: Tensor
    parameter_norms: Tensor
    weights: Tensor | None = None
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
    wanted: Wanted = Wanted(),
    deferred: bool = False,
) -> Measurement:
    """Read the gradients once, and those a second time whose norm cannot be trusted.

    Args:
        gradients: Of one step.
        norm_type: The order p.
        scale: What the gradients will be multiplied by before all else; the norms are of the scaled gradients.
        loss_scale: What they will be divided by, a tensor of one entry; None is 1.
        wanted: What is wanted beside the total norm.
        deferred: Whether nothing is to be read on the host; then nothing is read a second time either.
    """
    table, together = gradients.table, gradients.table.reduction
    if not gradients.tensors and not together:
        return _nothing(gradients, wanted, scale, deferred=deferred)
    norms = ours = _unit_norms_here(gradients, norm_type) if wanted.by_unit else _norms_here(gradients, norm_type)
    weights = _weight_norms_here(table, norm_type, wanted) if wanted.weights else None
    if together:
        norms, weights = _over_all_ranks(table, ours, weights, norm_type, wanted)
    total = total_norm(norms.double(), norm_type).to(norms.dtype) if wanted.by_unit else total_norm(norms, norm_type)
    if deferred:
        of_all = scale if loss_scale is None else scale / loss_scale
        if isinstance(of_all, Tensor) or of_all != 1.0:
            norms, total = norms * of_all, total * of_all
        norms = norms if together else gradients.fill(norms)
        return Measurement(norms, total, norms, weights, of_all, is_deferred=True)
    norms, total, weights, divisor = on_host(norms, total, weights, loss_scale)
    sound = smallest_sound_norm(norm_type, norms.dtype)
    if wanted.by_unit:
        norms, total = _mended_units(gradients, ours, norms, total, norm_type)
    elif together:
        norms, total = _mended_together(gradients, ours, norms, total, norm_type, local=wanted.local)
    elif not gradients.is_uniform or not _all_sound(total, sound) or (wanted.local and not _all_sound(norms, sound)):
        norms, total = _mended(gradients.tensors, norms, total, norm_type)
    scale = scale / divisor
    if scale != 1.0:
        norms, total = _fitting(norms.double() * scale, total.double() * scale, norms.dtype)
    if wanted.by_unit:
        per_parameter = block_norms(norms, table.partition("parameter", by_unit=True), norm_type)
    else:
        norms = per_parameter = norms if together else gradients.fill(norms)
    return Measurement(norms, total, per_parameter, weights, scale)


def _nothing(gradients: Gradients, wanted: Wanted, scale: float, *, deferred: bool) -> Measurement:
    """The measurement of a step without gradients."""
    count = len(gradients.table)
    parts = torch.zeros(len(gradients.table.units) if wanted.by_unit else count, device="cpu")
    weights = torch.zeros_like(parts) if wanted.weights else None
    return Measurement(parts, torch.zeros(1, device="cpu"), torch.zeros(count, device="cpu"), weights, scale, is_deferred=deferred)


def _over_all_ranks(
    table: ParameterTable, ours: Tensor, weights: Tensor | None, norm_type: float, wanted: Wanted
) -> tuple[Tensor, Tensor | None]:
    """From this rank's norms to those of whole tensors: of gradients and of weights, by one collective."""
    reduction = table.unit_reduction if wanted.by_unit else table.reduction
    assert reduction is not None
    if weights is None:
        return reduction.norms(ours, norm_type), None
    norms = reduction.norms(torch.cat([ours, weights.to(ours)]), norm_type)
    return norms[: len(ours)], norms[len(ours) :]


def _norms_here(gradients: Gradients, norm_type: float) -> Tensor:
    """Norms of the gradients that are there, ``(n,)``; where ranks hold parts, of this rank's, ``(N,)``, 0 where it has none."""
    table = gradients.table
    if gradients.tensors:
        norms = tensor_norms(gradients.tensors, norm_type, is_uniform=gradients.is_uniform, buckets=gradients.buckets)
    else:
        norms = torch.zeros(0, device=table.shards[0].device if table.shards else "cpu")
    if not table.reduction:
        return norms
    return gradients.fill(norms.to(torch.float64 if table.is_wide else torch.float32))


def _unit_norms_here(gradients: Gradients, norm_type: float) -> Tensor:
    """Norms of the units, where ranks hold parts of those of this rank's parts, ``(U,)``; 0 where there is no gradient."""
    table = gradients.table
    dtype = torch.float64 if table.is_wide else torch.float32
    device = table.shards[0].device if table.shards else torch.device("cpu")
    rows = gradients.rows
    found = [row_norms(entries, norm_type).to(device, dtype) for entries, *_ in rows]
    return _laid_out(len(table.units), [each.units for each in rows], found, dtype, device)


def _weight_norms_here(table: ParameterTable, norm_type: float, wanted: Wanted) -> Tensor:
    """Norms of parameters, or of their units, where ranks hold parts of those of this rank's parts; 0 where they are not wanted."""
    dtype = torch.float64 if table.is_wide else torch.float32
    device = table.shards[0].device
    places = [position for position in wanted.weights if table.shards[position].numel()]
    shards = [table.shards[position].detach() for position in places]
    if wanted.by_unit:
        rows = [each for position, shard in zip(places, shards, strict=True) for each in table.rows(position, shard)]
        found = [row_norms(entries, norm_type).to(device, dtype) for entries, *_ in rows]
        return _laid_out(len(table.units), [each.units for each in rows], found, dtype, device)
    norms = torch.zeros(len(table), dtype=dtype, device=device)
    if not shards:
        return norms
    read = tensor_norms(shards, norm_type).to(dtype)
    return read if len(places) == len(table) else norms.index_copy_(0, table.index(places, device, "weights"), read)


def _laid_out(
    count: int, units: Sequence[slice | Tensor], found: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Norms of some units in their places among all; 0 elsewhere."""
    ends = [each.stop if isinstance(each, slice) else None for each in units]
    starts = [each.start if isinstance(each, slice) else None for each in units]
    if found and starts == [0, *ends[:-1]] and ends[-1] == count:
        return torch.cat(list(found))
    norms = torch.zeros(count, dtype=dtype, device=device)
    for place, values in zip(units, found, strict=True):
        norms[place] = values
    return norms


def on_host(
    norms: Tensor, total: Tensor, weights: Tensor | None, loss_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Bring what the rest of the step is decided from to the host: the one host sync; none on a CPU."""
    if norms.is_cpu:
        return norms, total, weights, 1.0 if loss_scale is None else float(loss_scale)
    parts = [norms, total, *(() if weights is None else (weights,))]
    if loss_scale is not None:
        parts.append(loss_scale.to(norms).reshape(1))
    together = torch.cat(parts).cpu()
    norms, total, *rest = together.split([len(part) for part in parts])  # type: ignore[no-untyped-call]
    return norms, total, None if weights is None else rest[0], 1.0 if loss_scale is None else together.tolist()[-1]


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


def _mended_together(
    gradients: Gradients, ours: Tensor, norms: Tensor, total: Tensor, norm_type: float, *, local: bool
) -> tuple[Tensor, Tensor]:
    """The same where ranks hold parts: whether it takes place hangs on what all of them know.

    A norm of 0 beside others is taken for one: it is that of an unused parameter, and seldom an underflow.
    """
    table = gradients.table
    assert table.reduction is not None
    highest = smallest_sound_norm(norm_type, torch.float32)
    if _all_sound(total, highest) and not (local and any(not (norm == 0 or highest <= norm < math.inf) for norm in norms.tolist())):
        return norms, total
    bounds = [smallest_sound_norm(norm_type, _accumulated_in(tensor.dtype)) for tensor in table.tensors]
    zero = 0.0 if total.tolist()[0] > 0 else math.nan
    sound = [norm == zero or bound <= norm < math.inf for bound, norm in zip(bounds, norms.tolist(), strict=True)]
    if (all(sound) or not local) and _all_sound(total, max(bounds, default=0.0)):
        return norms, total
    mended = ours.double().cpu()
    suspects = [place for place, position in enumerate(gradients.positions) if not sound[position]]
    if suspects:
        places = [gradients.positions[place] for place in suspects]
        mended[places] = true_norms([gradients.tensors[place] for place in suspects], norm_type).cpu()
    mended = table.reduction.true_norms(mended, norm_type)
    return _fitting(mended, sound_total(mended, norm_type), norms.dtype)


def _mended_units(gradients: Gradients, ours: Tensor, norms: Tensor, total: Tensor, norm_type: float) -> tuple[Tensor, Tensor]:
    """Norms of units and total norm, those that cannot be trusted measured again; the same decision on every rank.

    Norms of 0 beside others are taken for it: they are those of rows that a batch had no use for.
    """
    table = gradients.table
    bound = smallest_sound_norm(norm_type, torch.float32)
    is_sound = (norms >= bound) & (norms < math.inf)
    if _all_sound(total, bound):
        is_sound |= norms == 0
        if is_sound.all().tolist():
            return norms, total
    mended = ours.double().cpu()
    for entries, units, _ in gradients.rows:
        suspects = ~is_sound[units if isinstance(units, slice) else units.cpu()]
        if bool(suspects.any()):
            places = suspects.nonzero()[:, 0].to(entries.device)
            part = mended[units] if isinstance(units, slice) else mended[units.cpu()]
            part[suspects] = true_row_norms(entries.index_select(0, places), norm_type).cpu()
            mended[units if isinstance(units, slice) else units.cpu()] = part
    if table.unit_reduction:
        mended = table.unit_reduction.true_norms(mended, norm_type)
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
