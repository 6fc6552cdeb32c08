"""What if a gradient is not finite: the policies."""

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
    """Gradients are NaN or infinite, and the policy or a limit on bad steps in a row says to stop."""


def as_policy(policy: object, argument: str) -> Policy:
    """Check the name of a policy.

    Raises:
        ValueError: If there is no such policy; it lists the choices.
    """
    return as_choice(policy, argument, POLICIES)


NUMBERS = frozenset(
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128]
)
"""Dtypes with arithmetic. The 8-bit floats are stored and converted only: some of torch's functions raise on them."""

_COMPUTES: WeakKeyDictionary[type[Tensor], bool] = WeakKeyDictionary()
"""Of subclasses of tensors, whether torch's functions know what to do with them: tried once for each."""


def has_arithmetic(tensor: Tensor) -> bool:
    """Whether entries can be judged as numbers: whether torch has norms of them, and tells which are finite.

    It has none of integers, bools, quantized and 8-bit floating numbers, nor of tensors without values or laid out for one library
    only; and subclasses of tensors may leave functions out.

    Args:
        tensor: Any; of a sharded one, this rank's shard.
    """
    if is_lazy(tensor) or tensor.dtype not in NUMBERS or tensor.is_meta or tensor.is_mkldnn or tensor.is_nested:
        return False
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        return True
    if kind not in _COMPUTES:
        _COMPUTES[kind] = _computes(tensor)
    return _COMPUTES[kind]


@torch.no_grad()
def _computes(tensor: Tensor) -> bool:
    try:
        torch.isfinite(tensor.detach()).all()
        torch._foreach_norm([tensor.detach()])
    except Exception:  # of somebody else's class: whatever it is
        return False
    return True


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every entry of every tensor is finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
