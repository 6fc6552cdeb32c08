"""A drop-in replacement for ``torch.nn.utils.clip_grad_norm_``."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from clip_callbacks.core.apply import scale_
from clip_callbacks.core.coefficients import coefficients
from clip_callbacks.core.gradients import gradients_of
from clip_callbacks.core.measurement import measure
from clip_callbacks.core.tensor_table import TensorTable


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Clip the gradient norm of parameters in place; a drop-in replacement for ``torch.nn.utils.clip_grad_norm_``.

    .. math::
        g \leftarrow g \cdot \min\Bigl(1, \frac{\text{max\_norm}}{\lVert g \rVert_p + 10^{-6}}\Bigr)

    On finite float32 gradients the result has the same bits as torch's. The differences are:

    - Sparse gradients work. Half-precision norms accumulate in float32, and are returned in it.
    - Finite gradients have a finite norm, even if their squares overflow or underflow.
    - Empty tensors may be among the parameters for every norm. A parameter that is given twice counts once.
    - A coefficient of 1 writes nothing. A non-finite norm leaves every gradient as it is, and does not spread.
    - A negative or NaN ``max_norm`` is an error.

    Args:
        parameters: Tensors with gradients, or one tensor. Those without a gradient are ignored.
        max_norm: The largest norm, at least 0.
        norm_type: The order p. ``"inf"`` is the maximum norm; orders of 0 and below are those of ``torch.linalg.vector_norm``.
        error_if_nonfinite: If True, a non-finite gradient raises an error.
        foreach: Accepted for compatibility. The result does not depend on it.

    Returns:
        The norm before clipping, 0-dim, on the device of the first gradient; float64 for float64 gradients, else float32. For
        DTensors it is a plain tensor, equal on every rank.

    Raises:
        RuntimeError: If a gradient is not finite and ``error_if_nonfinite`` is True. The gradients are unchanged.
        ValueError: If ``max_norm`` is negative or NaN, or the order of a norm of DTensors is not above 0.

    Example::

        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_(weight, 1.0), weight.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    # torch takes numpy's numbers, 0-dim tensors and "inf" too
    max_norm, norm_type = float(max_norm), float(norm_type)
    # negated, to refuse NaN too: torch would turn all gradients into NaN
    if not max_norm >= 0:
        raise ValueError(f"`max_norm` must be at least 0, got {max_norm!r}.")
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    # torch's own warning: the generator was probably used up before
    if isinstance(parameters, types.GeneratorType) and not tensors:
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2)
    # the table is used once: planning buckets would cost more than it saves
    gradients = gradients_of(TensorTable.nameless(tensors), bucketed=False)
    if gradients.table.reduction and not norm_type > 0:
        raise ValueError(f"`norm_type` must be above 0 where ranks hold parts of the parameters, got {norm_type!r}.")
    if not gradients.exist:
        return torch.tensor(0.0)
    measured = measure(gradients, norm_type)
    # torch would multiply all gradients by NaN or by 0
    if measured.is_finite:
        coefficient, clips = coefficients(measured.total, max_norm)
        scale_(gradients, coefficient if clips else None)
    elif error_if_nonfinite:
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be clipped. "
            "To disable this error and leave the gradients as they are, set `error_if_nonfinite=False`."
        )
    # a GPU's norm has been copied to the host for the decision; torch returns it on the GPU
    return measured.total.to(gradients.tensors[0].device if gradients.tensors else gradients.device)
