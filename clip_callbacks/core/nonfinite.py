"""What if a gradient is not finite: the policies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

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


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every entry of every tensor is finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
