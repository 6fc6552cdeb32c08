"""The measurement of one step: norms of tensors, of blocks and of all gradients, on the host or on the device of the gradients.

The p-norm of p-norms is the p-norm of all entries. One read of the gradients therefore serves every scope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_callbacks.core.blocks import Partition
from clip_callbacks.core.gradients import Gradients
from clip_callbacks.core.losses import are_finite, sum_of
from clip_callbacks.core.remeasurement import cast_if_representable, remeasure
from clip_callbacks.core.tensor_norms import row_norms, tensor_norms, total_norm
from clip_callbacks.core.tensor_table import TensorTable, count_entries, learns
from clip_callbacks.core.units import Rows

MAX_UNSCALED_ORDER = 4.0
"""Largest order p for which p-th powers of float32 numbers, and sums of them, stay in the range of float64."""

TRUE, FALSE = (torch.tensor(flag, dtype=torch.bool, device="cpu") for flag in (True, False))
"""The two 0-dim flags of steps that are decided on the host, made once."""

FLAGS = {True: TRUE, False: FALSE}
"""The flag of each value that the host knows."""


def block_norms(norms: Tensor, partition: Partition, norm_type: float) -> Tensor:
    """Norms of blocks from the norms of the parameters in them.

    Args:
        norms: Norms of the N parameters of a table, 0 where there is no gradient, shape ``(N,)``; or of several steps,
            ``(steps, N)``.
        partition: The partition of N parameters into B blocks.
        norm_type: The order p.

    Returns:
        Norms of shape ``(B,)`` or ``(steps, B)``, with the dtype and device of ``norms``.
    """
    if partition.is_finest:
        return norms
    if partition.is_whole and norms.ndim == 1:  # the same operation as torch's own clip, for the same bits
        return total_norm(norms, norm_type).reshape(1)
    # in float64, in which a block may add up millions of float32 norms without losing digits
    is_unscaled = norms.dtype is torch.float32 and norm_type <= MAX_UNSCALED_ORDER
    # the way of most steps: a step of tiny tensors feels every operation
    if norms.ndim == 1 and norms.is_cpu and partition.has_rows and (is_unscaled or norm_type == math.inf):
        found: Tensor = torch.linalg.vector_norm(partition.rows(norms).double(), norm_type, dim=1)
        return found.to(norms.dtype)
    blocks, parts = partition.member_blocks.to(norms.device), norms.double()
    if not partition.is_total:
        parts = parts[..., partition.members.to(norms.device)]
    shape = *norms.shape[:-1], len(partition.names)
    if is_unscaled:
        sums = _sums(parts.pow(norm_type), blocks, parts.new_zeros(shape))
        return sums.pow(1.0 / norm_type).to(norms.dtype)
    # scaled by the largest norm of each block, so that p-th powers stay in range
    peaks = parts.new_zeros(shape).scatter_reduce_(-1, blocks.expand(parts.shape), parts, "amax")
    if math.isinf(norm_type):
        return peaks.to(norms.dtype)
    # a peak of 0 or inf scales nothing: 0 / 0 and inf / inf would turn the block's norm into NaN
    scales = torch.where(torch.isfinite(peaks) & (peaks > 0), peaks, 1.0)
    sums = _sums((parts / scales[..., blocks]).pow(norm_type), blocks, torch.zeros_like(peaks))
    return (sums.pow(1.0 / norm_type) * scales).to(norms.dtype)


def _sums(parts: Tensor, blocks: Tensor, sums: Tensor) -> Tensor:
    """Add up parts by block.

    Parts of several steps are scattered, since ``index_add_`` would take a call for each part.
    """
    if parts.ndim == 1:
        return sums.index_add_(0, blocks, parts)
    return sums.scatter_add_(-1, blocks.expand(parts.shape), parts)


@dataclass(frozen=True)
class MeasurementSpec:
    """The norms that a step needs beside the total norm.

    Args:
        local: If True, norms of single parameters are needed.
        by_unit: If True, norms of units are needed.
        weights: The positions of the parameters whose own norms, those of the weights, are needed.
    """

    local: bool = False
    by_unit: bool = False
    weights: tuple[int, ...] = ()


@dataclass(eq=False)
class Measurement:
    """Norms of one step's gradients: on the host, or, for a deferred step, on the device of the gradients and unread.

    Args:
        norms: Norm of each parameter of the table, shape ``(N,)``, or of each unit, ``(U,)``; 0 where there is no gradient.
        total: Norm of all gradients, 0-dim.
        parameter_norms: Norm of each parameter's gradient, shape ``(N,)``.
        norm_type: The order p of all norms.
        finite: Flag, 0-dim bool tensor, True if all gradients and losses are finite. In a deferred step a norm that overflows its
            dtype counts as not finite.
        is_finite: True if the host knows that all gradients and losses are finite: never in a deferred step.
        weights: Norms of the parameters themselves, or of their units, shaped as ``norms``; 0 where they are not needed. None if
            no limit needs any.
        scale: The factor by which the gradients are still to be multiplied. The norms are those of the scaled gradients.
        is_deferred: If True, the host must not read the norms now.
        counts: A flag, 0-dim bool, if limits may take a deferred step into their states; None if that depends on finite gradients
            alone.
        loss: The loss of the window over all ranks, shape ``(1,)``, not finite if it is unknown; None if no limit needs it.
    """

    norms: Tensor
    total: Tensor
    parameter_norms: Tensor
    norm_type: float
    finite: Tensor
    is_finite: bool = False
    weights: Tensor | None = None
    scale: float | Tensor = 1.0
    is_deferred: bool = False
    counts: Tensor | None = None
    loss: Tensor | None = None


def measure(
    gradients: Gradients,
    norm_type: float,
    *,
    scale: float = 1.0,
    loss_scale: Tensor | None = None,
    spec: MeasurementSpec = MeasurementSpec(),
    deferred: bool = False,
    losses: Sequence[Tensor] | None = None,
    loss: Tensor | None = None,
) -> Measurement:
    """Measure the norms of gradients by one read, and those that are not reliable by a second one.

    Args:
        gradients: The gradients of one step.
        norm_type: The order p.
        scale: The factor by which the gradients will be multiplied. The norms are those of the scaled gradients.
        loss_scale: The divisor of the gradients, a tensor of one entry; None is 1.
        spec: The norms that are needed beside the total norm.
        deferred: If True, nothing is read on the host, and no gradient is read a second time.
        losses: The losses of the step, read together with the norms. A non-finite one makes the step bad, whatever its gradients
            are. None, on all ranks alike, if losses are not checked.
        loss: The loss of the window, shape ``(1,)``: with sharded gradients that of this rank, else over all ranks. None, on all
            ranks alike, if no limit needs it.
    """
    table, reduction = gradients.table, gradients.table.reduction
    # with a reduction a rank without gradients goes on, since the others wait for it in the collective
    if not gradients.tensors and not reduction:
        return _nothing(gradients, norm_type, spec, scale, losses, loss)
    if spec.by_unit:
        norms = _shard_unit_norms(gradients, norm_type)
    elif reduction:
        norms = _shard_norms(gradients, norm_type)
    else:
        norms = tensor_norms(gradients.tensors, norm_type, is_uniform=table.is_uniform, buckets=gradients.buckets)
    shard_norms = norms
    weights = _shard_weight_norms(table, norm_type, spec) if spec.weights else None
    if reduction:
        norms, weights, losses, loss = _over_all_ranks(table, shard_norms, weights, losses, loss, norm_type, spec)
    if spec.by_unit or table.awaited:
        total = _unusual_total(gradients, norms, norm_type, by_unit=spec.by_unit)
    else:
        total = total_norm(norms, norm_type)
    # no second read: only the host could ask for it, so a norm that overflows makes a bad step
    if deferred:
        return _deferred(gradients, norms, total, norm_type, weights, scale, loss_scale, losses, loss)

    norms, total, weights, divisor, is_loss_finite, loss = on_host(norms, total, weights, loss_scale, losses, loss)
    # before the norms are scaled: what overflows is a power of the entries as they are in memory
    norms, total = remeasure(gradients, shard_norms, norms, total, norm_type, local=spec.local, by_unit=spec.by_unit)
    # Only norms are scaled here. Gradients are multiplied once, by this factor and their coefficients together.
    scale = scale / divisor
    if scale != 1.0:  # scaled in float64: a scaled norm may leave the range of float32, although no entry does
        norms, total = cast_if_representable(norms.double() * scale, total.double() * scale, norms.dtype)
    if spec.by_unit:
        parameter_norms = block_norms(norms, table.partition("parameter", by_unit=True), norm_type)
    elif reduction:  # laid out for all parameters already
        parameter_norms = norms
    else:
        parameter_norms = norms = gradients.fill(norms)
    # one number tells of every entry, since no norm and no sum loses a NaN or an inf
    number: Any = total.tolist()
    is_finite = is_loss_finite and math.isfinite(number)
    return Measurement(norms, total, parameter_norms, norm_type, FLAGS[is_finite], is_finite, weights, scale, loss=loss)


def _unusual_total(gradients: Gradients, norms: Tensor, norm_type: float, *, by_unit: bool) -> Tensor:
    """Return the norm of all gradients from the norms of units, or beside gradients without entries."""
    if by_unit:  # there may be so many units that a float32 sum would lose digits
        return total_norm(norms.double(), norm_type).to(norms.dtype)
    # torch adds up a 0 for each gradient without entries, which shifts the order of the others
    return total_norm(gradients.with_empty(norms), norm_type)


def _deferred(
    gradients: Gradients,
    norms: Tensor,
    total: Tensor,
    norm_type: float,
    weights: Tensor | None,
    scale: float,
    loss_scale: Tensor | None,
    losses: Sequence[Tensor] | None,
    loss: Tensor | None,
) -> Measurement:
    """The measurement of a step that the device decides about. Nothing is read."""
    factor: float | Tensor = scale
    if loss_scale is not None:
        factor = scale / loss_scale.reshape(())
    # a product with 1 would keep the bits, but take two kernels
    if isinstance(factor, Tensor) or factor != 1.0:
        norms = norms * factor
        total = (total * factor).to(norms.dtype)  # of two 0-dim tensors the wider dtype wins
    if not gradients.table.reduction:
        norms = gradients.fill(norms)
    # one kernel, and False for a NaN too; torch.isfinite takes four
    finite = total < math.inf
    if losses:
        finite = finite.logical_and(torch.isfinite(sum_of(losses)).reshape(()))
    if loss is not None:
        loss = loss.to(norms.device)
    return Measurement(norms, total, norms, norm_type, finite, weights=weights, scale=factor, is_deferred=True, loss=loss)


def _nothing(
    gradients: Gradients,
    norm_type: float,
    spec: MeasurementSpec,
    scale: float,
    losses: Sequence[Tensor] | None,
    loss: Tensor | None,
) -> Measurement:
    """The measurement of a step without gradients."""
    # the CPU is named, here and wherever the host computes, because torch.set_default_device may have chosen another device
    dtype = _dtype(gradients.table)
    norms = parameter_norms = torch.zeros(len(gradients.table), dtype=dtype, device="cpu")
    if spec.by_unit:
        norms = torch.zeros(len(gradients.table.units), dtype=dtype, device="cpu")
    total = torch.zeros((), dtype=dtype, device="cpu")
    weights = None
    if spec.weights:
        weights = torch.zeros_like(norms)
    is_finite = are_finite(losses or ())
    if loss is not None:
        loss = loss.cpu()
    return Measurement(norms, total, parameter_norms, norm_type, FLAGS[is_finite], is_finite, weights, scale, loss=loss)


def _over_all_ranks(
    table: TensorTable,
    shard_norms: Tensor,
    weights: Tensor | None,
    losses: Sequence[Tensor] | None,
    loss: Tensor | None,
    norm_type: float,
    spec: MeasurementSpec,
) -> tuple[Tensor, Tensor | None, Sequence[Tensor] | None, Tensor | None]:
    """Reduce norms of this rank's shards to those of whole tensors, for gradients and weights, by one collective.

    The same collective tells all ranks of a non-finite loss: it carries a further set of numbers, which are 0 otherwise. And it
    averages the loss of the window, if a limit needs it.

    Returns:
        Norms of gradients; norms of weights; in place of this rank's losses, a number that is non-finite if a loss of any rank is;
        and the mean of the window's loss over the ranks.
    """
    reduction = table.reduction
    if spec.by_unit:
        reduction = table.unit_reduction
    assert reduction is not None
    # sent as one vector: a collective of so few numbers costs its latency, whatever their count
    sets = {"norms": shard_norms}
    if weights is not None:
        sets["weights"] = weights.to(shard_norms)
    if losses is not None:  # even if this rank has none: all ranks must send equally many numbers
        sets["losses"] = torch.zeros_like(shard_norms)
        if losses:
            # 0, or NaN of a non-finite loss; multiplied before the cast, since a finite float64 loss may be beyond float32
            sets["losses"] += (sum_of(losses) * 0.0).to(shard_norms)
    together = shard_norms if len(sets) == 1 else torch.cat(list(sets.values()))
    if loss is None:
        over_ranks = reduction.norms(together, norm_type)
    else:
        over_ranks, loss = reduction.norms_and_mean(together, norm_type, loss)
    each = over_ranks.split(len(shard_norms))  # type: ignore[no-untyped-call]
    reduced = dict(zip(sets, each, strict=True))
    if losses is not None:
        losses = (reduced["losses"].amax(),)
    return reduced["norms"], reduced.get("weights"), losses, loss


def _shard_norms(gradients: Gradients, norm_type: float) -> Tensor:
    """Norms of this rank's shards of all parameters' gradients, ``(N,)``; 0 where this rank has no gradient."""
    table = gradients.table
    if gradients.tensors:
        norms = tensor_norms(gradients.tensors, norm_type, is_uniform=table.is_uniform, buckets=gradients.buckets)
    else:
        norms = torch.zeros(0, dtype=_dtype(table), device=_device(table))
    # The dtype is that of the table, which all ranks share: this rank alone may have no float64 gradient.
    return gradients.fill(norms.to(_dtype(table)))


def _dtype(table: TensorTable) -> torch.dtype:
    """The dtype of norms that are laid out for all parameters or units."""
    return torch.float64 if table.is_wide else torch.float32


def _device(table: TensorTable) -> torch.device:
    return table.shards[0].device if table.shards else torch.device("cpu")


def _shard_unit_norms(gradients: Gradients, norm_type: float) -> Tensor:
    """Norms of this rank's parts of all units, ``(U,)``; 0 where there is no gradient."""
    table, rows = gradients.table, gradients.rows
    dtype, device = _dtype(table), _device(table)
    found = [row_norms(entries, norm_type).to(device, dtype) for entries, *_ in rows]
    return _laid_out(table, rows, found, dtype, device)


def _shard_weight_norms(table: TensorTable, norm_type: float, spec: MeasurementSpec) -> Tensor:
    """Norms of this rank's shards of the parameters, ``(N,)``, or of their units, ``(U,)``.

    They are 0 where no limit needs them, and for frozen parameters, which must change nothing even if the optimizer holds them.
    """
    dtype, device = _dtype(table), _device(table)
    places = [position for position in spec.weights if learns(table.tensors[position]) and count_entries(table.shards[position])]
    shards = [table.shards[position].detach() for position in places]
    if spec.by_unit:
        rows = [each for position, shard in zip(places, shards, strict=True) for each in table.rows(position, shard)]
        found = [row_norms(entries, norm_type).to(device, dtype) for entries, *_ in rows]
        return _laid_out(table, rows, found, dtype, device)
    norms = torch.zeros(len(table), dtype=dtype, device=device)
    if not shards:
        return norms
    read = tensor_norms(shards, norm_type).to(dtype)
    if len(places) == len(table):
        return read
    # the index has a cache of its own: shared with that of the gradients, it would be made anew at every step
    return norms.index_copy_(0, table.index(places, device, "weights"), read)


def _laid_out(
    table: TensorTable, rows: Sequence[Rows], found: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Lay out norms of some units in their places among all, with 0 elsewhere.

    Args:
        table: The parameters.
        rows: The rows of each tensor.
        found: The norms of each tensor's rows.
        dtype: The dtype of the result.
        device: The device of the result.
    """
    units, count = [each.units for each in rows], len(table.units)
    slices = [each for each in units if isinstance(each, slice)]
    edges = [0, *(each.stop for each in slices)]
    # slices that follow one another from the first unit to the last, as in most models: one concatenation
    if slices and len(slices) == len(units) and edges[:-1] == [each.start for each in slices] and edges[-1] == count:
        return torch.cat(list(found))
    norms = torch.zeros(count, dtype=dtype, device=device)
    for (_, place, position), values in zip(rows, found, strict=True):
        # only here: slices of a parameter with more rows than before would not follow one another
        if isinstance(place, slice):
            table.check_rows(position, place.stop - table.units.firsts[position])
        norms[place] = values
    return norms


def on_host(
    norms: Tensor,
    total: Tensor,
    weights: Tensor | None,
    loss_scale: Tensor | None,
    losses: Sequence[Tensor] | None = None,
    loss: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, float, bool, Tensor | None]:
    """Copy to the host all that the rest of the step is decided from, by the one host sync of a step; none on a CPU.

    Returns:
        Norms, total norm and weight norms; the loss scale as a number; whether the losses are finite; and the loss of the window.
    """
    # on a CPU nothing waits, and each number is read where it is
    if norms.is_cpu:
        divisor = 1.0
        if loss_scale is not None:
            divisor = float(loss_scale)
        if loss is not None:
            loss = loss.cpu()
        return norms, total, weights, divisor, not losses or are_finite(losses), loss
    # one tensor, since each copy would wait for the device
    parts = {"norms": norms, "total": total.reshape(1)}
    if weights is not None:
        parts["weights"] = weights
    if loss_scale is not None:
        parts["loss_scale"] = loss_scale.to(norms).reshape(1)
    if losses:
        parts["losses"] = sum_of(losses).to(norms)
    if loss is not None:
        parts["loss"] = loss.to(norms)
    together = torch.cat(list(parts.values())).cpu()
    each = together.split([len(part) for part in parts.values()])  # type: ignore[no-untyped-call]
    read = dict(zip(parts, each, strict=True))
    divisor = float(read.get("loss_scale", 1.0))
    are_losses_finite = "losses" not in read or are_finite([read["losses"]])
    return read["norms"], read["total"].reshape(()), read.get("weights"), divisor, are_losses_finite, read.get("loss")
