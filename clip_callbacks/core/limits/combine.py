"""Limits made of limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clip_callbacks.core.arguments import as_count
from clip_callbacks.core.limits.base import BlockNorms, Limit, LimitState, step_count
from clip_callbacks.core.limits.fixed import as_limit


class Tightest(Limit):
    r"""The lowest of several limits, block by block: :math:`\ell_b = \min_i \ell_b^{(i)}`.

    Each goes on as if it were alone, and so knows the norms as they are, not as the others would have them.

    Args:
        first: Limits or numbers, at least two; numbers are fixed limits.
        limits: The same as a list, for configuration files.

    Raises:
        ValueError: If there are fewer than two limits, or a number is not above 0.
        TypeError: If ``limits`` is no list.

    Example::

        >>> Tightest(2.0, RatioLimit(0.1)).step(BlockNorms(torch.ones(2), weights=torch.tensor([5.0, 50.0])), {})[0]
        tensor([0.5000, 2.0000])
    """

    # no dataclass: jsonargparse would look for the types of arguments among its fields
    def __init__(self, *first: float | Limit, limits: list[float | Limit] | None = None) -> None:
        """Take limits however they are stated."""
        if limits is not None and not isinstance(limits, (list, tuple)):
            raise TypeError(f"`limits` must be a list of limits and numbers, got {limits!r}.")
        if any(isinstance(limit, (list, tuple)) for limit in first):
            raise TypeError(f"`first` must be limits and numbers, got {list(first)!r}. Write Tightest(limits=[…]) for a list.")
        each = (*first, *(limits or ()))
        if len(each) <= 1:
            raise ValueError(f"`limits` must be at least two limits or numbers, got {list(each)!r}.")
        self._members = tuple(as_limit(limit, "limits") for limit in each)

    @property
    def members(self) -> tuple[Limit, ...]:
        """The limits."""
        return self._members

    def __repr__(self) -> str:
        """As it is written."""
        return f"Tightest({', '.join(map(repr, self._members))})"

    def __eq__(self, other: object) -> bool:
        """Whether it is the lowest of the same limits."""
        return self._members == other._members if isinstance(other, Tightest) else NotImplemented

    def __hash__(self) -> int:
        """That of its limits."""
        return hash(self._members)

    @property
    def uses_weights(self) -> bool:
        """Whether any of them does."""
        return any(limit.uses_weights for limit in self.members)

    def init(self, blocks: int) -> LimitState:
        """Their states, under their numbers."""
        return _joined({str(i): limit.init(blocks) for i, limit in enumerate(self.members)})

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """A limit for each block."""
        found, after = [], {}
        for i, limit in enumerate(self.members):
            limits, after[str(i)] = limit.step(blocks, _part(state, str(i)))
            found.append(_each(limits, blocks))
        return torch.stack(found).amin(0), _joined(after)


@dataclass(frozen=True)
class Warmup(Limit):
    """One limit for the first steps, another one from then on; both see every step.

    So an adaptive limit can learn what is usual while a fixed one keeps the first steps short.

    Args:
        limit: The limit after the warm-up, or a number.
        steps: How many optimizer steps the warm-up takes, at least 1; a skipped step does not count.
        until: The limit in these steps, or a number; inf is none.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> limit = Warmup(5.0, steps=1, until=0.5)
        >>> first, state = limit.step(BlockNorms(torch.ones(1)), limit.init(1))
        >>> first, limit.step(BlockNorms(torch.ones(1)), state)[0]
        (tensor([0.5000]), tensor([5.]))
    """

    limit: float | Limit
    steps: int
    until: float | Literal["inf"] | Limit

    def __post_init__(self) -> None:
        """Check every argument."""
        object.__setattr__(self, "limit", as_limit(self.limit, "limit"))
        object.__setattr__(self, "until", as_limit(self.until, "until"))
        as_count(self.steps, "steps", least=1)

    @property
    def _both(self) -> dict[str, Limit]:
        return {"until": as_limit(self.until), "limit": as_limit(self.limit)}

    @property
    def uses_weights(self) -> bool:
        """Whether one of them does."""
        return any(limit.uses_weights for limit in self._both.values())

    def init(self, blocks: int) -> LimitState:
        """Both states, and no step yet."""
        return {"steps": step_count()} | _joined({name: limit.init(blocks) for name, limit in self._both.items()})

    def step(self, blocks: BlockNorms, state: LimitState) -> tuple[Tensor, LimitState]:
        """A limit for each block."""
        found, after = {}, {}
        for name, limit in self._both.items():
            limits, after[name] = limit.step(blocks, _part(state, name))
            found[name] = _each(limits, blocks)
        limits = torch.where(state["steps"] < self.steps, found["until"], found["limit"])
        return limits, {"steps": state["steps"] + 1} | _joined(after)


def _each(limits: Tensor | float, blocks: BlockNorms) -> Tensor:
    """A limit for each block."""
    return limits.expand_as(blocks.norms) if isinstance(limits, Tensor) else torch.full_like(blocks.norms, limits)


def _joined(states: Mapping[str, LimitState]) -> LimitState:
    return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}


def _part(state: LimitState, name: str) -> LimitState:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
