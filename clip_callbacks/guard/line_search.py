"""Parameters and state of LBFGS, restored after a skipped step: its line search moves them before it meets a bad point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from clip_callbacks.guard.resource import Resource, ResourceScope
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext


def line_searches(scope: ResourceScope) -> dict[int, Resource]:
    """Make the resource of each LBFGS."""
    return {context.index: LineSearch(context) for context in scope.contexts if isinstance(context.optimizer, LBFGS)}


class LineSearch(Resource):
    """Copy of an LBFGS from before a step. It takes about as much memory as LBFGS itself holds for two steps.

    Args:
        context: The optimizer, an LBFGS.
    """

    def __init__(self, context: OptimizerContext) -> None:
        self._context = context
        self._is_bad = False
        self._parameters: list[Tensor] = []
        self._state: dict[str, Any] = {}
        self._handle: RemovableHandle = context.optimizer.register_step_post_hook(self._after_step)

    @override
    def begin_step(self, step: StepContext) -> None:
        # Only at the first closure call, when LBFGS has not moved the parameters yet; later calls are points of its search.
        if step.is_new:
            self._is_bad = False
            self._parameters = [tensor.detach().clone() for tensor in self._context.table.tensors]
            self._state = {key: _copied(value) for key, value in self._own_state().items()}

    @override
    def abort(self, step: StepContext, *, is_called: bool) -> None:
        # Only noted: the search goes on from here, and would move parameters that were restored now.
        self._is_bad = True

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        if not self._is_bad:
            return
        self._is_bad = False
        torch._foreach_copy_(list(self._context.table.tensors), self._parameters)
        self._own_state().clear()
        self._own_state().update(self._state)

    def _own_state(self) -> dict[str, Any]:
        # LBFGS has one state for all parameters, and keeps it with the first.
        optimizer = self._context.optimizer
        state: dict[str, Any] = optimizer.state[optimizer.param_groups[0]["params"][0]]
        return state

    @override
    def detach(self) -> None:
        self._handle.remove()


def _copied(value: Any) -> Any:
    # LBFGS writes `prev_flat_grad` in place, appends to its lists and drops from them, but never writes to tensors inside them.
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list):
        return list(value)
    return value
