"""The one write of the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clip_callbacks.parameters import Gradients, ParameterTable


def scale_(gradients: Gradients, factors: Tensor | None, scale: float = 1.0) -> None:
    """Multiply gradients in place; those whose factor is 1 are not touched.

    Args:
        gradients: Of one step.
        factors: One for each parameter of the table, shape ``(N,)``, or one for all, ``(1,)``; None is 1 for all.
        scale: A factor for all of them.
    """
    if factors is None:
        if scale != 1.0:
            _multiply_(gradients.tensors, torch.tensor([scale], dtype=torch.float64))
        return
    factors = factors if scale == 1.0 else factors * scale
    if len(factors) == 1:
        _multiply_(gradients.tensors, factors)
        return
    each: list[float] = factors.tolist()
    touched = [(place, position) for place, position in enumerate(gradients.positions) if each[position] != 1.0]
    if touched:
        tensors = [gradients.tensors[place] for place, _ in touched]
        _multiply_each_(tensors, factors, [position for _, position in touched])


def _multiply_(tensors: list[Tensor], factor: Tensor) -> None:
    """One product for all: a 0-dim tensor takes a quarter of the time of a number for small CPU tensors; elsewhere it is a copy."""
    if _on_cpu(tensors):
        torch._foreach_mul_(tensors, factor[0])
    else:
        torch._foreach_mul_(tensors, factor.tolist()[0])


def _multiply_each_(tensors: list[Tensor], factors: Tensor, positions: list[int]) -> None:
    """A factor each: on a CPU 0-dim tensors take half the time of numbers; elsewhere numbers go into one kernel."""
    if _on_cpu(tensors):
        of_parameter = factors.unbind()
        torch._foreach_mul_(tensors, [of_parameter[position] for position in positions])
    else:
        each = factors.tolist()
        torch._foreach_mul_(tensors, [each[position] for position in positions])


def _on_cpu(tensors: list[Tensor]) -> bool:
    return all(tensor.is_cpu for tensor in tensors)


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
