"""The check that an optimizer leaves parameters without a gradient alone: nothing else could put them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from clip_callbacks.guard.resource import Resource, ResourceScope
from clip_callbacks.trainer.step_context import StepContext


def parameter_checks(scope: ResourceScope) -> dict[int, Resource]:
    """Make the check of each optimizer but LBFGS, whose parameters are put back."""
    return {context.index: ParameterCheck() for context in scope.contexts if not isinstance(context.optimizer, LBFGS)}


class ParameterCheck(Resource):
    """Finds out in a skipped step whether its optimizer moves parameters without a gradient."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    @override
    def commit(self, step: StepContext) -> None:
        if self._handles:
            self.detach()

    @override
    def abort_on_device(self, skipped: Tensor) -> None:
        self.detach()

    @override
    def abort(self, step: StepContext, *, is_called: bool) -> None:
        self.detach()
        if is_called:
            table = step.optimizer.table
            self._handles.append(assert_parameters_unchanged(step.optimizer.optimizer, table.tensors, table.shards))

    @override
    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def assert_parameters_unchanged(optimizer: Optimizer, tensors: Sequence[Tensor], shards: Sequence[Tensor]) -> RemovableHandle:
    """After the step that begins now, see that an optimizer without gradients has moved nothing.

    Version counters tell, and the norms of the parameters, since ``parameter.data`` goes around the counters: those of this rank's
    shards, where ranks hold shards.

    Returns:
        The hook to take off when the step is over: a subclass that calls ``super().step()`` runs it twice.

    Raises:
        RuntimeError: From ``optimizer.step()``, if it has; it names the optimizer.
    """
    before = _versions_and_norms(tensors, shards)

    def check(*_: Any) -> None:
        if _versions_and_norms(tensors, shards) != before:
            raise RuntimeError(
                f"`optimizer` must leave parameters without a gradient alone, got {type(optimizer).__name__}, which moved them in "
                "a skipped step: a bad step cannot be undone with it. Use an optimizer of torch.optim, or NonFiniteGuard('raise')."
            )

    return optimizer.register_step_post_hook(check)


@torch.no_grad()
def _versions_and_norms(tensors: Sequence[Tensor], shards: Sequence[Tensor]) -> list[tuple[int, str]]:
    norms: Sequence[Tensor] = ()
    if shards:  # torch takes no empty list
        norms = torch._foreach_norm([shard.detach() for shard in shards])
    return [(tensor._version, str(norm.tolist())) for tensor, norm in zip(tensors, norms, strict=True)]
