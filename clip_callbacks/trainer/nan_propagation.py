"""Propagation of a non-finite loss to all ranks through the gradients that DDP averages, without a collective of its own.

Trap: under DDP ranks hold equal gradients but different losses. The gradients of a NaN loss may be finite, or exactly zero, as
where every label of a batch is ignored; and only one rank may have drawn that batch. If that rank alone skipped the step, ranks
would drift apart.
"""

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

MAX_VISITED_NODES = 1000
"""Number of nodes of the autograd graph that are searched for a parameter in one backward pass."""


class LossNanPropagator:
    """Makes the backward pass of a non-finite loss leave a NaN in a gradient, before ranks average gradients.

    The NaN is written to one gradient of each optimizer: that of the parameter nearest to the loss in the graph. Where the graph
    shows no parameter, as behind a reentrant checkpoint, it is the optimizer's last parameter.
    """

    def __init__(self) -> None:
        self._tables: list[TensorTable] = []
        self._tables_of: dict[int, set[int]] = {}
        self._hooks: list[RemovableHandle] = []

    def begin_pass(self, loss: Tensor, contexts: Sequence[OptimizerContext]) -> None:
        """Register hooks for the backward pass that is about to begin.

        Args:
            loss: The loss of the pass.
            contexts: The optimizers.
        """
        # tables with a reduction are left out: the reduction of their norms includes the losses
        tables = [context.table for context in contexts if context.table.reduction is None]
        if len(tables) != len(self._tables) or not all(map(is_, tables, self._tables)):
            self._tables, self._tables_of = tables, {}
            for place, table in enumerate(tables):
                for tensor in table.tensors:
                    self._tables_of.setdefault(id(tensor), set()).add(place)
        zero_or_nan = sum_of([shard_of(loss).detach()]) * 0.0  # NaN if the loss is not finite, without a host sync

        def propagate(gradient: Tensor) -> Tensor:
            if gradient.layout is not torch.strided:
                return gradient
            return gradient - zero_or_nan.to(gradient)  # x - 0.0 has the bits of x for every x, while -0.0 + 0.0 is 0.0

        self.end_pass()
        for leaf in self._leaves(loss):
            self._hooks.append(leaf.register_hook(propagate))  # type: ignore[no-untyped-call]

    def end_pass(self) -> None:
        """Remove the hooks: the backward pass is over."""
        while self._hooks:
            self._hooks.pop().remove()

    def _leaves(self, loss: Tensor) -> list[Tensor]:
        """Return parameters that together cover all optimizers, each the nearest one to the loss."""
        missing, leaves = set(range(len(self._tables))), []
        for leaf in self._nearest_first(loss):
            if missing & self._tables_of[id(leaf)]:
                missing -= self._tables_of[id(leaf)]
                leaves.append(leaf)
            if not missing:
                return leaves
        for place in missing:
            leaves += [tensor for tensor in self._tables[place].tensors if tensor.requires_grad][-1:]
        return leaves

    def _nearest_first(self, loss: Tensor) -> Iterator[Tensor]:
        """Yield the parameters in a loss's graph by breadth-first search."""
        waiting: deque[Any] = deque([loss.grad_fn])
        seen: set[Any] = set()
        while waiting and len(seen) < MAX_VISITED_NODES:
            node = waiting.popleft()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)  # AccumulateGrad nodes hold their parameter
            if leaf is not None and id(leaf) in self._tables_of:
                yield leaf
            waiting.extend(following for following, _ in node.next_functions)
