"""The lowest of several limits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clip_callbacks.core.limits._nested import each_of_one, init_each, joined_state, step_each
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitOfOne, LimitState
from clip_callbacks.core.limits.fixed import as_limit


class TightestLimit(Limit):
    r"""The lowest of several limits, block by block: :math:`\ell_b = \min_i \ell_b^{(i)}`.

    Every member takes each step as if it were the only limit, so that it learns from the norms as they are and not as the other
    members would have clipped them.

    Args:
        members: Limits or numbers, at least two; a number is a fixed limit.
        limits: List of limits and numbers, for configuration files; it is appended to ``members``.

    Raises:
        ValueError: If there are fewer than two limits, or a number is not above 0.
        TypeError: If ``limits`` is not a list, or ``members`` contain one.

    Example::

        >>> TightestLimit(2.0, RatioLimit(0.1)).step(BlockNorms(torch.ones(2), weights=torch.tensor([5.0, 50.0])), {})[0]
        tensor([0.5000, 2.0000])
    """

    # Not a dataclass: jsonargparse would look for the types of the arguments among its fields.
    def __init__(self, *members: float | Limit, limits: list[float | Limit] | None = None) -> None:
        """Check every member."""
        if limits is not None and not isinstance(limits, (list, tuple)):
            raise TypeError(f"`limits` must be a list of limits and numbers, got {limits!r}.")
        if any(isinstance(member, (list, tuple)) for member in members):
            raise TypeError(
                f"`members` must be limits and numbers, got {list(members)!r}. Write TightestLimit(limits=[…]) for a list."
            )
        each = (*members, *(limits or ()))
        if len(each) <= 1:
            raise ValueError(f"`limits` must be at least two limits or numbers, got {list(each)!r}.")
        self._members = tuple(as_limit(limit, "limits") for limit in each)

    @property
    def members(self) -> tuple[Limit, ...]:
        """All members, numbers as fixed limits."""
        return self._members

    def __repr__(self) -> str:
        """Return the call that makes an equal limit."""
        return f"TightestLimit({', '.join(map(repr, self._members))})"

    def __eq__(self, other: object) -> bool:
        """Return whether the other limit has equal members in the same order."""
        if not isinstance(other, TightestLimit):
            return NotImplemented
        return self._members == other._members

    def __hash__(self) -> int:
        """Return the hash of the members."""
        return hash(self._members)

    @property
    def _by_number(self) -> dict[str, Limit]:
        # by position, because members may be equal; their order is a part of the state
        return {str(number): limit for number, limit in enumerate(self._members)}

    @property
    def uses_weights(self) -> bool:
        """Whether any member needs the norms of the parameters."""
        return any(limit.uses_weights for limit in self._members)

    @property
    def takes_losses(self) -> bool:
        """Whether every member takes losses."""
        return all(limit.takes_losses for limit in self._members)

    def init(self, blocks: int) -> LimitState:
        """Return the members' states, each key preceded by the member's number and a dot."""
        return init_each(self._by_number, blocks)

    def _of_one(self, state: LimitState) -> LimitOfOne | None:
        """Return the limit in numbers of Python, for a single block on the host; None if a member has no such form."""
        members = each_of_one(self._by_number, state)
        if members is None:
            return None
        return _TightestOfOne(members)

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """Return the lowest limit of each block, and the members' states after the step."""
        found, after = step_each(self._by_number, blocks, state)
        # members differ in dtype, and stack promotes to the widest
        return torch.stack(list(found.values())).amin(0), after


class _TightestOfOne(LimitOfOne):
    """The arithmetic of :meth:`TightestLimit.step` with numbers."""

    __slots__ = ("_members",)

    def __init__(self, members: dict[str, LimitOfOne]) -> None:
        self._members = members

    def step(self, value: float, *, are_losses: bool = False) -> tuple[float, LimitOfOne]:
        lowest, after = math.inf, {}
        for name, member in self._members.items():
            limit, after[name] = member.step(value, are_losses=are_losses)
            lowest = min(lowest, limit)
        return lowest, _TightestOfOne(after)

    def state(self) -> LimitState:
        return joined_state(self._members)
