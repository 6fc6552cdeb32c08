"""The measurement of one step: norms of tensors, of blocks and of all, on the host or left where the gradients are.

A p-norm of p-norms is the p-norm of all entries, so that one read serves every scope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from clip_callbacks.core.blocks import Partition
from clip_callbacks.core.losses import are_finite, sum_of
from clip_callbacks.core.remeasurement import cast_if_representable, remeasure
from clip_callbacks.core.tensor_norms import row_norms, tensor_norms, total_norm
from clip_callbacks.core.tensor_table import Gradients, TensorTable, count_entries, learns

SAFE_IN_DOUBLE = 4.0
"""The order up to which powers of float32 numbers, and sums of them, stay in the range of float64."""

TRUE, FALSE = torch.tensor(True, device="cpu"), torch.tensor(False, device="cpu")
"""The two 0-dim flags of steps that were decided on the host: made once."""


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
    blocks, parts = partition.member_blocks.to(norms.device), norms.double()
    if not partition.is_total:
        parts = parts[..., partition.members.to(norms.device)]
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
    if parts.ndim == 1:
        return sums.index_add_(0, blocks, parts)
    return sums.scatter_add_(-1, blocks.expand(parts.shape), parts)


@dataclass(frozen=True)
class MeasurementSpec:
    """What a step needs to know of its gradients beside the total norm.

    Args:
        local: Whether the norms of single parameters matter too.
        by_unit: Whether the norms of their units do.
        weights: The positions of the parameters whose own norms are needed too.
    """

    local: bool = False
    by_unit: bool = False
    weights: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Measurement:
    """Norms of one step's gradients: on the host, or, of a deferred step, where the gradients are and unread.

    Args:
        norms: Norm of each parameter of the table, shape ``(N,)``, or of each unit, ``(U,)``; 0 where there is no gradient.
        total: Norm of all of them together, shape ``(1,)``.
        parameter_norms: Norm of each parameter, shape ``(N,)``.
        norm_type: The order p of all norms.
        weights: Norms of the parameters themselves, or of their units, like ``norms``; 0 where they are not needed; None where
            none is.
        scale: What the gradients are to be multiplied by before all else; the norms are of the scaled gradients.
        is_deferred: Whether the host is not to read them now.
        counts: Whether limits take the step into their states, 0-dim bool, where a deferred step has another reason against it
            than gradients that are not finite; None: if all gradients are finite.
        loss_is_finite: Whether the losses are that the gradients are of, as far as they are known; of a deferred step 0-dim bool.
    """

    norms: Tensor
    total: Tensor
    parameter_norms: Tensor
    norm_type: float
    weights: Tensor | None = None
    scale: float | Tensor = 1.0
    is_deferred: bool = False
    counts: Tensor | None = None
    loss_is_finite: bool | Tensor = True

    @cached_property
    def is_finite(self) -> bool:
        """Whether every entry of every gradient is, and every loss; this reads the total norm."""
        return bool(self.loss_is_finite) and math.isfinite(self.total.tolist()[0])

    @cached_property
    def finite(self) -> Tensor:
        """Whether all of it is finite, 0-dim bool; of a deferred step unread, and a norm that overflows is not finite."""
        if self.is_deferred:
            finite = self.total.reshape(()) < math.inf
            if isinstance(self.loss_is_finite, Tensor):
                finite = finite.logical_and(self.loss_is_finite)
            return finite
        return TRUE if self.is_finite else FALSE


def measure(
    gradients: Gradients,
    norm_type: float,
    *,
    scale: float = 1.0,
    loss_scale: Tensor | None = None,
    spec: MeasurementSpec = MeasurementSpec(),
    deferred: bool = False,
    losses: Sequence[Tensor] | None = None,
) -> Measurement:
    """Read the gradients once, and those a second time whose norm is not reliable.

    Args:
        gradients: The gradients of one step.
        norm_type: The order p.
        scale: What the gradients will be multiplied by before all else; the norms are of the scaled gradients.
        loss_scale: What they will be divided by, a tensor of one entry; None is 1.
        spec: What is needed beside the total norm.
        deferred: Whether nothing is to be read on the host; then nothing is read a second time either.
        losses: What the gradients are of; one that is not finite makes the step bad, whatever its gradients are. They are read
            with the norms. None, on all ranks alike: they have no say.
    """
    table, reduction = gradients.table, gradients.table.reduction
    if not gradients.tensors and not reduction:
        return replace(_nothing(gradients, norm_type, spec, scale, deferred=deferred), loss_is_finite=are_finite(losses or ()))
    norms = ours = _norms_here(gradients, norm_type, spec)
    weights = _weight_norms_here(table, norm_type, spec)
    if reduction:
        norms, weights, losses = _over_all_ranks(table, ours, weights, losses, norm_type, spec)
    total = _total(norms, norm_type, spec)
    if deferred:
        measured = _deferred(gradients, norms, total, norm_type, weights, scale, loss_scale)
        if losses:
            measured = replace(measured, loss_is_finite=torch.isfinite(sum_of(losses)).reshape(()))
        return measured

    norms, total, weights, divisor, loss_is_finite = on_host(norms, total, weights, loss_scale, losses)
    norms, total = remeasure(gradients, ours, norms, total, norm_type, local=spec.local, by_unit=spec.by_unit)
    scale = scale / divisor
    if scale != 1.0:
        norms, total = cast_if_representable(norms.double() * scale, total.double() * scale, norms.dtype)
    if spec.by_unit:
        parameter_norms = block_norms(norms, table.partition("parameter", by_unit=True), norm_type)
        return Measurement(norms, total, parameter_norms, norm_type, weights, scale, loss_is_finite=loss_is_finite)
    if not reduction:
        norms = gradients.fill(norms)
    return Measurement(norms, total, norms, norm_type, weights, scale, loss_is_finite=loss_is_finite)


def _deferred(
    gradients: Gradients,
    norms: Tensor,
    total: Tensor,
    norm_type: float,
    weights: Tensor | None,
    scale: float,
    loss_scale: Tensor | None,
) -> Measurement:
    """The measurement of a step that is decided where the gradients are: nothing is read."""
    factor: float | Tensor = scale
    if loss_scale is not None:
        factor = scale / loss_scale
    if isinstance(factor, Tensor) or factor != 1.0:
        norms, total = norms * factor, total * factor
    if not gradients.table.reduction:
        norms = gradients.fill(norms)
    return Measurement(norms, total, norms, norm_type, weights, factor, is_deferred=True)


def _nothing(gradients: Gradients, norm_type: float, spec: MeasurementSpec, scale: float, *, deferred: bool) -> Measurement:
    """The measurement of a step without gradients."""
    norms = parameter_norms = torch.zeros(len(gradients.table), device="cpu")
    if spec.by_unit:
        norms = torch.zeros(len(gradients.table.units), device="cpu")
    weights = torch.zeros_like(norms) if spec.weights else None
    return Measurement(norms, torch.zeros(1, device="cpu"), parameter_norms, norm_type, weights, scale, is_deferred=deferred)


def _over_all_ranks(
    table: TensorTable,
    ours: Tensor,
    weights: Tensor | None,
    losses: Sequence[Tensor] | None,
    norm_type: float,
    spec: MeasurementSpec,
) -> tuple[Tensor, Tensor | None, Sequence[Tensor] | None]:
    """From this rank's norms to those of whole tensors, of gradients and of weights, by one collective.

    It also tells all ranks of a loss that is not finite on one of them: in a further set of numbers, which are 0 otherwise.

    Returns:
        Norms of gradients; those of weights; in place of this rank's losses a number that is not finite if any rank's is not.
    """
    reduction = table.unit_reduction if spec.by_unit else table.reduction
    assert reduction is not None
    sets = {"norms": ours}
    if weights is not None:
        sets["weights"] = weights.to(ours)
    if losses is not None:  # also where this rank has none: all are to send as much
        sets["losses"] = torch.zeros_like(ours)
        if losses:
            sets["losses"] += (sum_of(losses) * 0.0).to(ours)
    together = ours if len(sets) == 1 else torch.cat(list(sets.values()))
    each = reduction.norms(together, norm_type).split(len(ours))  # type: ignore[no-untyped-call]
    reduced = dict(zip(sets, each, strict=True))
    if losses is not None:
        losses = (reduced["losses"].amax(),)
    return reduced["norms"], reduced.get("weights"), losses


def _norms_here(gradients: Gradients, norm_type: float, spec: MeasurementSpec) -> Tensor:
    """Norms of the gradients that are there, ``(n,)``; where ranks hold parts, of this rank's, ``(N,)``, 0 where it has none.

    By unit: of all units, ``(U,)``.
    """
    if spec.by_unit:
        return _unit_norms_here(gradients, norm_type)
    table = gradients.table
    if gradients.tensors:
        norms = tensor_norms(gradients.tensors, norm_type, is_uniform=gradients.is_uniform, buckets=gradients.buckets)
    else:
        norms = torch.zeros(0, device=_device(table))
    if not table.reduction:
        return norms
    return gradients.fill(norms.to(_dtype(table)))


def _dtype(table: TensorTable) -> torch.dtype:
    """The dtype of norms that are laid out for all parameters."""
    return torch.float64 if table.is_wide else torch.float32


def _device(table: TensorTable) -> torch.device:
    return table.shards[0].device if table.shards else torch.device("cpu")


def _unit_norms_here(gradients: Gradients, norm_type: float) -> Tensor:
    """Norms of the units, where ranks hold parts of those of this rank's parts, ``(U,)``; 0 where there is no gradient."""
    table, rows = gradients.table, gradients.rows
    dtype, device = _dtype(table), _device(table)
    found = [row_norms(entries, norm_type).to(device, dtype) for entries, *_ in rows]
    return _laid_out(len(table.units), [each.units for each in rows], found, dtype, device)


def _total(norms: Tensor, norm_type: float, spec: MeasurementSpec) -> Tensor:
    """The norm of all; of units there may be so many that a sum of float32 numbers would lose digits."""
    if spec.by_unit:
        return total_norm(norms.double(), norm_type).to(norms.dtype)
    return total_norm(norms, norm_type)


def _weight_norms_here(table: TensorTable, norm_type: float, spec: MeasurementSpec) -> Tensor | None:
    """Norms of parameters, or of their units, where ranks hold parts of those of this rank's parts; None if nobody asks for any.

    They are 0 where nobody asks for them, and of frozen parameters: these are to change nothing, held by the optimizer or not.
    """
    if not spec.weights:
        return None
    dtype, device = _dtype(table), _device(table)
    places = [position for position in spec.weights if learns(table.tensors[position]) and count_entries(table.shards[position])]
    shards = [table.shards[position].detach() for position in places]
    if spec.by_unit:
        rows = [each for position, shard in zip(places, shards, strict=True) for each in table.rows(position, shard)]
        found = [row_norms(entries, norm_type).to(device, dtype) for entries, *_ in rows]
        return _laid_out(len(table.units), [each.units for each in rows], found, dtype, device)
    norms = torch.zeros(len(table), dtype=dtype, device=device)
    if not shards:
        return norms
    read = tensor_norms(shards, norm_type).to(dtype)
    if len(places) == len(table):
        return read
    return norms.index_copy_(0, table.index(places, device, "weights"), read)


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
    norms: Tensor, total: Tensor, weights: Tensor | None, loss_scale: Tensor | None, losses: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor | None, float, bool]:
    """Bring what the rest of the step is decided from to the host: the one host sync; none on a CPU.

    Returns:
        Norms, total and weights; the loss scale as a number; whether the losses are finite.
    """
    if norms.is_cpu:
        divisor = 1.0 if loss_scale is None else float(loss_scale)
        return norms, total, weights, divisor, are_finite(losses or ())
    parts = {"norms": norms, "total": total}
    if weights is not None:
        parts["weights"] = weights
    if loss_scale is not None:
        parts["loss_scale"] = loss_scale.to(norms).reshape(1)
    if losses:
        parts["loss"] = sum_of(losses).to(norms)
    together = torch.cat(list(parts.values())).cpu()
    each = together.split([len(part) for part in parts.values()])  # type: ignore[no-untyped-call]
    read = dict(zip(parts, each, strict=True))
    divisor = float(read.get("loss_scale", 1.0))
    return read["norms"], read["total"], read.get("weights"), divisor, "loss" not in read or are_finite([read["loss"]])
