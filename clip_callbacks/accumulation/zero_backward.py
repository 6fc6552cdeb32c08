"""A backward pass whose gradients are all 0, even if its loss is NaN."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle


def zero_backward(loss: Tensor, parameters: Iterable[Tensor]) -> list[RemovableHandle]:
    """Replace all gradients of one backward pass by zeros, at every node of the graph and at the parameters.

    A loss multiplied by 0 would not do, because 0 times NaN is NaN; nor would zeros at the parameters alone, because the graph of a
    sharded module ends in other tensors, made for this pass.

    Args:
        loss: The loss with its graph.
        parameters: The parameters that may get gradients.

    Returns:
        Hooks to be removed after the pass.
    """
    hooks: list[RemovableHandle] = [node.register_hook(_zeros) for node in _nodes(loss)]
    each = {id(tensor): tensor for tensor in parameters if tensor.requires_grad and not is_lazy(tensor)}
    return hooks + [tensor.register_hook(torch.zeros_like) for tensor in each.values()]  # type: ignore[no-untyped-call]


def _zeros(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else torch.zeros_like(gradient) for gradient in inputs)


def _nodes(loss: Tensor) -> list[Any]:
    """Return the nodes of a loss's graph, except those that accumulate gradients in leaves."""
    ahead, seen = [loss.grad_fn], set()
    nodes = []
    while ahead:
        node = ahead.pop()
        # Nodes without a next one accumulate into leaves. A list and not recursion: a graph is as deep as the network, and more.
        if node is None or node in seen or not node.next_functions:
            continue
        seen.add(node)
        nodes.append(node)
        ahead += [following for following, _ in node.next_functions]
    return nodes
