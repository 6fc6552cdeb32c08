"""A loss that is not finite, made known to all ranks by the gradients that they average: no collective of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from clip_callbacks.core.losses import sum_of
from clip_callbacks.core.reduction import shard_of
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.trainer.optimizer_context import OptimizerContext

NODES = 1000
"""How many nodes of a graph are looked at for a parameter."""


class LossCarrier:
    """Where ranks hold copies of the parameters, has the backward pass of a loss that is not finite leave a NaN in a gradient.

    The gradients of such a loss may be finite, or exactly zero, as where every label of a batch is ignored; and only one rank may
    have drawn that batch. The NaN is put into the gradient of that parameter of each optimizer which is next to the loss, before
    ranks average. Where the graph shows none, as behind a reentrant checkpoint, it is put into that of the optimizer's last one.
    """

    def __init__(self) -> None:
        self._tables: list[TensorTable] = []
        self._holders: dict[int, set[int]] = {}
        self._hooks: list[RemovableHandle] = []

    def begin_pass(self, loss: Tensor, contexts: Sequence[OptimizerContext]) -> None:
        """A backward pass comes.

        Args:
            loss: Its loss.
            contexts: The optimizers.
        """
        tables = [context.table for context in contexts if context.table.reduction is None]
        if len(tables) != len(self._tables) or not all(map(is_, tables, self._tables)):
            self._tables, self._holders = tables, {}
            for place, table in enumerate(tables):
                for tensor in table.tensors:
                    self._holders.setdefault(id(tensor), set()).add(place)
        nothing = sum_of([shard_of(loss).detach()]) * 0.0  # or NaN, if the loss is not finite

        def carry(gradient: Tensor) -> Tensor:
            if gradient.layout is not torch.strided:
                return gradient
            return gradient - nothing.to(gradient)  # x - 0.0 has the bits of x, whatever its sign

        self.end_pass()
        for leaf in self._leaves(loss):
            self._hooks.append(leaf.register_hook(carry))  # type: ignore[no-untyped-call]

    def end_pass(self) -> None:
        """The backward pass is over."""
        while self._hooks:
            self._hooks.pop().remove()

    def _leaves(self, loss: Tensor) -> list[Tensor]:
        """Of each optimizer the parameter whose gradient takes the fewest steps backward from a loss."""
        missing, leaves = set(range(len(self._tables))), []
        for leaf in self._nearest_first(loss):
            if missing & self._holders[id(leaf)]:
                missing -= self._holders[id(leaf)]
                leaves.append(leaf)
            if not missing:
                return leaves
        for place in missing:
            leaves += [tensor for tensor in self._tables[place].tensors if tensor.requires_grad][-1:]
        return leaves

    def _nearest_first(self, loss: Tensor) -> Iterator[Tensor]:
        """The parameters that a backward pass reaches, those first that take the fewest steps."""
        waiting: deque[Any] = deque([loss.grad_fn])
        seen: set[Any] = set()
        while waiting and len(seen) < NODES:
            node = waiting.popleft()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) in self._holders:
                yield leaf
            waiting.extend(following for following, _ in node.next_functions)
