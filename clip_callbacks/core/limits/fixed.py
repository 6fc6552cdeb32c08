"""A limit that never changes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clip_callbacks.core.arguments import as_finite, as_max_norm
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitOfOne, LimitState, MaxNorm


@dataclass(frozen=True)
class FixedLimit(Limit):
    r"""A fixed threshold for all blocks at every step: :math:`\ell_b = \text{max\_norm}`.

    Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML 2013 (arXiv 1211.5063),
    algorithm 1. Unlike there, 1e-6 is added to the norm that the limit is divided by, as in torch.

    Args:
        max_norm: Largest allowed norm, above 0, in the unit of the gradients; inf is no limit.

    Raises:
        ValueError: If ``max_norm`` is not above 0.

    Example::

        >>> FixedLimit(0.5).step(BlockNorms(torch.tensor([3.0, 4.0])), {})
        (0.5, {})
    """

    max_norm: float

    def __post_init__(self) -> None:
        """Check the argument."""
        object.__setattr__(self, "max_norm", as_max_norm(self.max_norm))

    @property
    def takes_losses(self) -> bool:
        """True, because it does not depend on the norms."""
        return True

    def _of_one(self, state: LimitState) -> LimitOfOne:
        """Return the number, for a single block on the host."""
        return _NumberOfOne(self.max_norm)

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[float, LimitState]:
        """Return the limit of all blocks as one number, and the state, which is empty."""
        # A number and no tensor: as in torch, 1e-6 is added to the norm only under a number (`coefficients`).
        return self.max_norm, state


@dataclass(frozen=True)
class _FixedLossLimit(Limit):  # not public, so that LightningCLI does not offer it as a `max_norm`
    """A fixed threshold for losses.

    Args:
        loss: Largest loss of a step that is no spike, of any sign.
    """

    loss: float

    @property
    def takes_losses(self) -> bool:
        """Whether losses may be given in place of norms: True."""
        return True

    def _of_one(self, state: LimitState) -> LimitOfOne:
        """Return the number, for a single block on the host."""
        return _NumberOfOne(self.loss)

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[float, LimitState]:
        """Return the threshold, and the state, which is empty."""
        return self.loss, state


class _NumberOfOne(LimitOfOne):
    """A limit that never changes."""

    __slots__ = ("_number",)

    def __init__(self, number: float) -> None:
        self._number = number

    def step(self, value: float, *, are_losses: bool = False) -> tuple[float, LimitOfOne]:
        return self._number, self

    def state(self) -> LimitState:
        return {}


def as_loss_limit(loss_above: float | Limit) -> Limit:
    """Return the limit of losses that a user means by ``loss_above``.

    Raises:
        ValueError: If it is neither a finite number nor a limit that takes losses.
    """
    if not isinstance(loss_above, Limit):
        return _FixedLossLimit(as_finite(loss_above, "loss_above", low=-math.inf))
    if not loss_above.takes_losses:
        raise ValueError(
            "`loss_above` must be a number, or a Limit that takes losses, such as RobustZScoreLimit, got "
            f"{loss_above!r}: its limits are made for norms, which are never negative. If a limit of your own takes losses, let "
            "its `takes_losses` return True."
        )
    return loss_above


def as_limit(max_norm: MaxNorm, argument: str = "max_norm") -> Limit:
    """Return the limit that a user means: a number is a fixed limit, None is a fixed limit of inf.

    Args:
        max_norm: Limit as the user wrote it.
        argument: Name of the argument, for the error.

    Raises:
        ValueError: If it is a number that is not above 0.
    """
    if isinstance(max_norm, Limit):
        return max_norm
    if max_norm is None:
        # None and inf become equal limits, which plans recognize and leave out
        return FixedLimit(float("inf"))
    alternatives = ", a Limit, or None to measure without clipping" if argument == "max_norm" else " or a Limit"
    return FixedLimit(as_max_norm(max_norm, argument, alternatives))
