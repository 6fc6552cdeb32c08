"""The interface of limits: norms and state of a step in, limits and new state out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from clip_callbacks.core.remeasurement import total_norm_in_float64

LimitState: TypeAlias = dict[str, Tensor]
"""State of a limit between steps: tensors under fixed keys, of fixed shapes and dtypes."""


@dataclass(frozen=True, eq=False)
class BlockNorms:
    """Norms of one step that a limit is computed from, equal on every rank.

    They are on the host or, in a deferred step, on the device, where a limit must not read them.

    Args:
        norms: p-norms of the blocks' gradients before clipping, shape ``(B,)``, float32 or float64, all finite; 0 for a block
            without a gradient.
        norm_type: Order p of all norms.
        weights: p-norms of the blocks' parameters, shape ``(B,)``; None unless the limit asks for them
            (:attr:`Limit.uses_weights`).
        are_losses: If True, ``norms`` holds losses: finite numbers of any sign, of which 0 is one like any other. Only a limit that
            takes losses (:attr:`Limit.takes_losses`) is given them.

    Example::

        >>> BlockNorms(torch.tensor([3.0, 4.0])).total
        tensor([5.], dtype=torch.float64)
    """

    norms: Tensor
    norm_type: float = 2.0
    weights: Tensor | None = None
    are_losses: bool = False

    @property
    def total(self) -> Tensor:
        """The p-norm of all blocks together, float64 of shape ``(1,)``."""
        return total_norm_in_float64(self.norms, self.norm_type).reshape(1)


class LimitOfOne(ABC):
    """A limit of a single block on the host, with its state, in numbers of Python. It never changes: a step returns another one.

    Small operations of torch cost microseconds each, whatever their size, and a limit needs up to fifty of them. A step in numbers
    takes a few microseconds, and the tensors of the state are made only where they are needed, as for a checkpoint.
    """

    __slots__ = ()

    @abstractmethod
    def step(self, value: float, *, are_losses: bool = False) -> tuple[float, LimitOfOne]:
        """Return the limit of this step, and the limit with the state after it: what :meth:`Limit.step` returns, in numbers.

        Args:
            value: Norm of the block, or a loss; finite.
            are_losses: If True, the value is a loss.
        """

    @abstractmethod
    def state(self) -> LimitState:
        """Return the state as :meth:`Limit.step` returns it, in new tensors."""


# No dataclass, though most limits are: where one is the type of an argument, jsonargparse refuses `class_path` and `init_args`.
class Limit(ABC):
    """Base class of limits, which compute the largest allowed norm of each block from the norms of this step and of past ones.

    A limit is a frozen set of hyper-parameters. Its state is a dictionary of tensors that the caller keeps and passes back. It is
    given norms that are equal on every rank, and never a gradient, a parameter or a trainer.

    All limits of this package keep four rules, which are good for yours too:

    - The state takes in a norm as the limit would clip it, or with another bound, so that one spike cannot lift the limit far.
    - A norm of 0, of a block without a gradient, leaves the state of the block unchanged. A loss of 0 is one like
      any other.
    - State tensors keep their shapes, so that a step costs the same at any time.
    - Nothing is read from a device (``float()``, ``.item()``, ``if tensor:``), because that waits for the device. Tensors on a CPU
      may be read.

    Example::

        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class ShareOfTotal(Limit):
        ...     share: float
        ...     def step(self, blocks, state):
        ...         return self.share * blocks.total, state
        >>> ShareOfTotal(0.5).step(BlockNorms(torch.tensor([3.0, 4.0])), {})
        (tensor([2.5000], dtype=torch.float64), {})
    """

    _is_ours = True  # without a type: jsonargparse looks for ClassVar in the modules of subclasses, and fails
    """If True, the class is of this package, whose tests check what its steps return; of others each step is checked."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Note whether the class is of this package, once and not in each step."""
        super().__init_subclass__(**options)
        cls._is_ours = cls.__module__.startswith("clip_callbacks.")

    @property
    def uses_weights(self) -> bool:
        """If True, ``step`` is given the norms of the parameters too, which costs one read of the parameters."""
        return False

    @property
    def takes_losses(self) -> bool:
        """If True, ``step`` may be given losses in place of norms (:attr:`BlockNorms.are_losses`); their limits have any sign."""
        return False

    def init(self, blocks: int) -> LimitState:
        """Return the state before the first step; empty for a limit without memory.

        A tensor is either 0-dim or has the blocks as its last dimension, so that each block keeps its part of the state when an
        optimizer takes on other parameters.

        Args:
            blocks: Number of blocks, B.
        """
        return {}

    def _of_one(self, state: LimitState) -> LimitOfOne | None:
        """Return the limit in numbers of Python; None if there is no such form of it."""
        return None

    @abstractmethod
    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor | float, LimitState]:
        """Return the limits of this step, and the state after it.

        It is called once for every step, of shadows too. If the step is then skipped, the caller discards the new state.

        Args:
            blocks: Norms of this step. A limit of yours gets copies of all tensors, and may write to them.
            state: State from :meth:`init` or from the last step; a copy too.

        Returns:
            The largest allowed norms, above 0, in the unit of the gradients, or losses, of any sign: a tensor of shape ``(B,)``, or
            one entry or a number for all blocks; inf where there is no limit yet. And the new state, with equal keys, shapes and
            dtypes; a caller keeps the dtypes of floating-point entries. Anything else raises an error in the step.
        """


def of_one(limit: Limit, state: LimitState) -> LimitOfOne | None:
    """Return a limit of a single block on the host in numbers of Python; None if the limit has no such form.

    Args:
        limit: The limit.
        state: Its state for one block, on the CPU; not changed.
    """
    # of a class, or a mixin, that replaces the step alone, the numbers would go on with the old one
    for kind in type(limit).__mro__:
        if "_of_one" in vars(kind):
            return limit._of_one(state)
        if "step" in vars(kind):
            return None
    return None


def as_state(held: LimitState | LimitOfOne) -> LimitState:
    """Return a state in tensors, whichever form it is held in."""
    if isinstance(held, dict):
        return held
    return held.state()


def step_of_one(limit: Limit, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState] | None:
    """Take the step of a single block on the host with numbers; return None for other blocks, or if the limit has no such form."""
    norms = blocks.norms
    if type(norms) is not Tensor or not norms.is_cpu or len(norms) != 1:
        return None
    before = of_one(limit, state)
    if before is None:
        return None
    value, after = before.step(norms.tolist()[0], are_losses=blocks.are_losses)
    limits = torch.tensor([value], dtype=torch.float64, device="cpu")
    if after is before:  # nothing has changed, and no tensors need be made
        return limits, state
    return limits, after.state()


def step_count() -> Tensor:
    """Return a count of 0 steps for a new state, int64, 0-dim."""
    # a tensor and no int, so that a deferred step can leave it as it was without the host
    return torch.zeros((), dtype=torch.int64, device="cpu")


MaxNorm: TypeAlias = float | Literal["inf"] | Limit | None
"""Limit as a user writes it: a number, ``inf`` or None for no limit, or a :class:`Limit`."""
