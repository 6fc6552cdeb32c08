"""A loss that is not finite, made known to all ranks by the gradients that they average: no collective of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from clip_callbacks.core.measurement import sum_of
from clip_callbacks.core.parameters import ParameterTable
from clip_callbacks.trainer.optimizer_context import OptimizerContext

NODES = 1000
"""How many nodes of a graph are looked at for a parameter."""


class LossCarrier:
    """Where ranks hold copies of the parameters, has the backward pass of a loss that is not finite leave a NaN in a gradient.

    The gradients of such a loss may be finite, or exactly zero, as where every label of a batch is ignored; and only one rank may
    have drawn that batch. The NaN is put into the gradient of the parameter next to the loss, before ranks average.
    """

    def __init__(self) -> None:
        self._tables: list[ParameterTable] = []
        self._parameters: set[int] = set()
        self._hook: RemovableHandle | None = None

    def begin_pass(self, loss: Tensor, contexts: Sequence[OptimizerContext]) -> None:
        """A backward pass comes.

        Args:
            loss: Its loss.
            contexts: The optimizers.
        """
        tables = [context.table for context in contexts if context.table.reduction is None]
        if len(tables) != len(self._tables) or not all(map(is_, tables, self._tables)):
            self._tables = tables
            self._parameters = {id(tensor) for table in tables for tensor in table.tensors}
        if self._parameters and (leaf := self._nearest(loss)) is not None:
            nothing = sum_of([loss.detach()]) * 0.0  # or NaN, if the loss is not finite

            def carry(gradient: Tensor) -> Tensor:
                if gradient.layout is not torch.strided:
                    return gradient
                return gradient - nothing.to(gradient)  # x - 0.0 has the bits of x, whatever its sign

            self._hook = leaf.register_hook(carry)  # type: ignore[no-untyped-call]

    def end_pass(self) -> None:
        """The backward pass is over."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _nearest(self, loss: Tensor) -> Tensor | None:
        """The parameter whose gradient takes the fewest steps backward from a loss."""
        waiting: deque[Any] = deque([loss.grad_fn])
        seen: set[Any] = set()
        while waiting and len(seen) < NODES:
            node = waiting.popleft()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) in self._parameters:
                return leaf  # type: ignore[no-any-return]
            waiting.extend(following for following, _ in node.next_functions)
        return None
