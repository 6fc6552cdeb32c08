"""Policies for non-finite gradients, and the tensors that can be checked for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from clip_callbacks.core.arguments import as_choice

Policy: TypeAlias = Literal["skip", "raise", "zero", "ignore"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class NonFiniteGradientError(ArithmeticError):
    """Raised when gradients are NaN or infinite, if the policy is "raise" or too many bad steps came in a row."""


def as_policy(policy: object, argument: str) -> Policy:
    """Check the name of a policy.

    Raises:
        ValueError: If there is no such policy; it lists the choices.
    """
    return as_choice(policy, argument, POLICIES)


ARITHMETIC_DTYPES = frozenset(
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128]
)
"""Dtypes with arithmetic. The 8-bit floats can only be stored and converted: some functions of torch raise on them."""

_HAS_ARITHMETIC: WeakKeyDictionary[type[Tensor], bool] = WeakKeyDictionary()
"""Results of one trial for each subclass of Tensor: True if functions of torch accept it."""


def has_arithmetic(tensor: Tensor) -> bool:
    """Return whether torch can compute norms of a tensor and tell which entries are finite.

    It cannot for integers, bools, quantized and 8-bit floating-point numbers, nor for tensors without values or in the layout of
    one library; and subclasses of Tensor may leave out functions.

    Args:
        tensor: Any tensor; for a sharded one, this rank's shard.
    """
    if is_lazy(tensor) or tensor.dtype not in ARITHMETIC_DTYPES or tensor.is_meta or tensor.is_mkldnn or tensor.is_nested:
        return False
    kind = type(tensor)
    # other classes are tried once, because a subclass may implement any part of torch's functions
    if kind is Tensor or kind is nn.Parameter:
        return True
    if kind not in _HAS_ARITHMETIC:
        _HAS_ARITHMETIC[kind] = _try_arithmetic(tensor)
    return _HAS_ARITHMETIC[kind]


@torch.no_grad()
def _try_arithmetic(tensor: Tensor) -> bool:
    try:
        # the two functions that checks and norms call
        torch.isfinite(tensor.detach()).all()
        torch._foreach_norm([tensor.detach()])
    except Exception:  # a class of another package may raise anything
        return False
    return True


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether every entry of every tensor is finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
