"""The one write of the gradients: a multi-tensor product, or factors for a fused optimizer, which writes them in its own pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.core.few_values import extremes
from clip_callbacks.core.fused import accepts_factors, set_fused_factors
from clip_callbacks.core.gradients import Gradients
from clip_callbacks.core.tensor_table import TensorTable

MAX_GRAD_SCALE = torch.finfo(torch.float32).max
"""Largest ``grad_scale`` that a fused optimizer takes; the smallest factor is its reciprocal."""


def write(
    gradients: Gradients,
    factors: Tensor | None,
    scale: float,
    optimizer: Optimizer | None,
    clip_value: float | None = None,
    *,
    by_unit: bool = False,
) -> None:
    """Multiply gradients by factors that the host knows, or have a fused optimizer do it; then clamp their entries.

    Args:
        gradients: The gradients of one step.
        factors: The factors, as for :func:`scale_`.
        scale: A factor for all gradients.
        optimizer: The optimizer that steps next, which may be a fused one.
        clip_value: Bound for every entry; None for no bound.
        by_unit: If True, several factors are those of units.
    """
    changes = factors is not None or scale != 1.0
    # entries are clamped after the product, so that a kernel cannot make it later
    if changes and (clip_value is not None or not _leave_to_kernel(gradients, factors, scale, optimizer)):
        scale_(gradients, factors, scale, by_unit=by_unit)
    if clip_value is not None:
        clamp_(gradients.tensors, clip_value)


def _leave_to_kernel(gradients: Gradients, factors: Tensor | None, scale: float, optimizer: Optimizer | None) -> bool:
    """Set the factor of a fused optimizer's next step; return whether it can take it."""
    # a kernel takes one factor for all gradients of its optimizer
    if (factors is not None and factors.numel() > 1) or not accepts_factors(optimizer, gradients):
        return False
    factor = scale
    if factors is not None:
        if factors.ndim:
            factors = factors.reshape(())
        number: Any = factors.tolist()
        factor *= number
    # beyond these, the number or its reciprocal leaves the range of float32, which the kernels compute in
    if not 1.0 / MAX_GRAD_SCALE <= factor <= MAX_GRAD_SCALE:
        return False
    if factor != 1.0:
        # the kernel divides; torch.full runs on the device, where torch.tensor would copy from the host and wait
        set_fused_factors(optimizer, torch.full((), 1.0 / factor, dtype=torch.float32, device=gradients.device))
    return True


def write_deferred(
    gradients: Gradients, factors: Tensor | None, scale: float | Tensor, fused: Optimizer | None, skipped: Tensor | None
) -> None:
    """Multiply gradients by one factor for all that the host does not know, or have a fused optimizer do it.

    Args:
        gradients: The gradients of one step.
        factors: The factor, a tensor of one entry on the device of the gradients; None is 1.
        scale: A further factor, a number or a tensor of one entry.
        fused: The fused optimizer that steps next; None writes here.
        skipped: A flag to skip the step, 0-dim bool; None does not skip.
    """
    if factors is not None:
        factors = factors * scale
    elif isinstance(scale, Tensor):
        factors = scale
    elif scale != 1.0:
        factors = torch.full((), scale, dtype=torch.float32, device=gradients.device)
    if fused is not None:
        # float32, whatever the norms are: the kernels read both tensors as float32
        grad_scale = None if factors is None else factors.float().reciprocal().reshape(())
        set_fused_factors(fused, grad_scale, None if skipped is None else skipped.float())
    elif factors is not None and gradients.tensors:
        # written even if the factor is 1, which only the device knows
        _multiply_(gradients, factors)


def scale_(gradients: Gradients, factors: Tensor | None, scale: float = 1.0, *, by_unit: bool = False) -> None:
    """Multiply gradients in place. Those whose factor is known to be 1 are not written.

    Args:
        gradients: The gradients of one step.
        factors: One factor for each parameter of the table, CPU tensor of shape ``(N,)``, or for each unit, ``(U,)``, or one entry
            for all; None is 1 for all.
        scale: A factor for all gradients.
        by_unit: If True, several factors are those of units.
    """
    if not gradients.tensors:
        return
    if factors is None:
        if scale == 1.0:
            return
        # in float64, so that float64 gradients are scaled exactly; on the CPU, whatever the default device is
        factors = torch.tensor(scale, dtype=torch.float64, device="cpu")
    elif scale != 1.0:
        factors = factors * scale
    if factors.numel() == 1:
        _multiply_(gradients, factors)
    elif by_unit:
        _multiply_rows_(gradients, factors)
    else:
        _multiply_each_(gradients, factors)


def _multiply_(gradients: Gradients, factor: Tensor) -> None:
    """Multiply all gradients by one factor, the last one first: these were read last, and are still in the cache.

    On a CPU a 0-dim tensor takes a quarter of the time of a number. On another device a number needs no copy.
    """
    tensors = gradients.tensors[::-1]
    # a factor on the device stays there: the host must not read it
    if factor.is_cpu and not _on_cpu(gradients):
        torch._foreach_mul_(tensors, float(factor))
    elif factor.ndim:
        torch._foreach_mul_(tensors, factor.reshape(()))
    else:
        torch._foreach_mul_(tensors, factor)


def _multiply_each_(gradients: Gradients, factors: Tensor) -> None:
    """Multiply each gradient by its factor, the last one first, as in :func:`_multiply_`.

    On a CPU 0-dim tensors take a third of the time of numbers. On another device numbers go into one kernel.
    """
    each: list[Any]
    if _on_cpu(gradients):
        buffer, each = gradients.table.factor_buffer(factors.dtype)
        buffer.copy_(factors)
    else:
        each = factors.tolist()
    if gradients.is_complete and extremes(factors)[1] < 1.0:
        torch._foreach_mul_(gradients.tensors[::-1], each[::-1])
        return
    # a product with 1 would keep the bits, but read and write the gradient
    changes = (factors != 1.0).tolist()
    places = [(place, position) for place, position in enumerate(gradients.positions) if changes[position]][::-1]
    if places:
        torch._foreach_mul_([gradients.tensors[place] for place, _ in places], [each[position] for _, position in places])


def _multiply_rows_(gradients: Gradients, factors: Tensor) -> None:
    """Multiply each row by its factor. Tensors without a row to change are not written."""
    table = gradients.table
    # counted on the host, where the factors are, so that tensors without a clipped row are neither read nor written
    counts = torch.zeros(len(table), dtype=torch.float32, device="cpu")
    clipped = counts.index_add_(0, table.units.owners, (factors != 1.0).float()).tolist()
    factors = factors.to(gradients.tensors[0].device)
    rows = [
        (entries, factors[units if isinstance(units, slice) else units.to(factors.device)].to(entries.device))
        for entries, units, position in gradients.rows
        if clipped[position]
    ]
    if rows:
        torch._foreach_mul_([entries for entries, _ in rows], [each.view(-1, *[1] * (entries.ndim - 1)) for entries, each in rows])


def _on_cpu(gradients: Gradients) -> bool:
    if gradients.table.is_uniform:
        return gradients.tensors[0].is_cpu
    return all(tensor.is_cpu for tensor in gradients.tensors)


def clamp_(tensors: Sequence[Tensor], clip_value: float) -> None:
    """Clamp every entry to ``[-clip_value, clip_value]``, and the real and imaginary parts of complex entries."""
    real = _as_real(tensors)
    if real:
        # two passes, since torch has no multi-tensor clamp to both bounds; clip_grad_value_ takes them too
        torch._foreach_clamp_min_(real, -clip_value)
        torch._foreach_clamp_max_(real, clip_value)


def zero_nonfinite_(gradients: Gradients, norms: Tensor) -> None:
    """Set every NaN and every infinite entry to 0, and leave the other entries alone.

    Where several ranks hold copies of a tensor, the whole tensor becomes 0: a copy may be non-finite on one rank only, and copies
    must stay equal.

    Args:
        gradients: The gradients of one step.
        norms: The norm of each parameter of the table, shape ``(N,)``.
    """
    reduction = gradients.table.reduction
    is_nonfinite = [not math.isfinite(norm) for norm in norms.tolist()]
    for position, tensor in zip(gradients.positions, _as_real(gradients.tensors), strict=True):
        # decided by norms that all ranks share, so that all of them zero the same copies
        if reduction and is_nonfinite[position] and reduction.copied[position]:
            tensor.zero_()
        else:
            # selected, not multiplied: 0 * NaN is NaN
            tensor.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def drop_gradients(table: TensorTable) -> None:
    """Set all gradients to None. ``torch.optim`` optimizers then leave a parameter alone: its state and weight decay too."""
    for parameter in table.tensors:
        parameter.grad = None


def _as_real(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
