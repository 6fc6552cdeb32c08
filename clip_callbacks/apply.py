"""The one write of the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clip_callbacks.blocks import Gradients, ParameterTable


def scale_(gradients: Gradients, factors: Tensor | None, scale: float = 1.0) -> None:
    """Multiply gradients in place; those whose factor is 1 are not touched.

    Args:
        gradients: Of one step.
        factors: One for each parameter of the table, shape ``(N,)``; None is 1 for all.
        scale: A factor for all of them.
    """
    if factors is None:
        if scale != 1.0:
            torch._foreach_mul_(gradients.tensors, scale)
        return
    if factors.stride(0) == 0:  # one block: one coefficient spread over all
        torch._foreach_mul_(gradients.tensors, factors[:1].tolist()[0] * scale)
        return
    of_parameter = factors.tolist()
    wanted = [of_parameter[position] * scale for position in gradients.positions]
    touched = [place for place, factor in enumerate(wanted) if factor != 1.0]
    if touched:
        torch._foreach_mul_([gradients.tensors[i] for i in touched], [wanted[i] for i in touched])


def clamp_(tensors: Sequence[Tensor], clip_value: float) -> None:
    """Clamp every entry to ``[-clip_value, clip_value]``; of a complex one, its real and imaginary parts."""
    real = _as_real(tensors)
    if real:
        torch._foreach_clamp_min_(real, -clip_value)
        torch._foreach_clamp_max_(real, clip_value)


def zero_nonfinite_(tensors: Sequence[Tensor]) -> None:
    """Set every NaN and every inf to 0 and leave the other entries alone."""
    for tensor in _as_real(tensors):
        tensor.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def drop(table: ParameterTable) -> None:
    """Take the gradients away: ``torch.optim`` optimizers leave a parameter without one alone, its state and decay too."""
    for parameter in table.tensors:
        parameter.grad = None


def _as_real(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
