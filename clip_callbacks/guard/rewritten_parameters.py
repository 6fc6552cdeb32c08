"""Parameters that forward passes rewrite, as ``Embedding(max_norm=...)`` does, restored after a skipped step.

Copies are made of parameters that are known to be rewritten: a module has a ``max_norm``, or a version counter has risen between
the beginning of a batch and its first step. In the first window all small parameters are copied, so that the very first rewriting
can be restored too. After passes without a step nothing is restored: such a rewriting does not depend on the values of a batch.
"""

from __future__ import annotations

from collections.abc import Collection

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS
from typing_extensions import override

from clip_callbacks.core.nonfinite import has_arithmetic
from clip_callbacks.core.reduction import shard_of
from clip_callbacks.core.tensor_table import renormalized_weights
from clip_callbacks.guard.resource import Resource, ResourceScope
from clip_callbacks.trainer.after_step import call_after_step
from clip_callbacks.trainer.buffer_tracker import INITIAL_COPY_BYTES
from clip_callbacks.trainer.fingerprints import version_of
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext
from clip_callbacks.trainer.tensor_copies import TensorCopies, fits_among_others, have_same_bits

WATCHED_WINDOWS = 3
"""Number of windows at the start of a fit that are all watched."""

WATCH_EVERY_N_WINDOWS = 64
"""Windows from one watched window to the next one later on. To watch one is to read all version counters twice."""


def rewritten_parameters(scope: ResourceScope) -> dict[int, Resource]:
    """Make the resource of each optimizer."""
    known = set(renormalized_weights(scope.module))
    return {context.index: RewrittenParameters(scope, context, known) for context in scope.contexts}


class RewrittenParameters(Resource):
    """Parameters of one optimizer that forward passes rewrite.

    Args:
        scope: The Trainer and the module.
        context: The optimizer.
        known: Parameters of the whole module that are known to be rewritten.
    """

    def __init__(self, scope: ResourceScope, context: OptimizerContext, known: Collection[Tensor]) -> None:
        self._trainer = scope.trainer
        self._context = context
        self._is_manual = not scope.module.automatic_optimization
        self._all_rewritten = scope.rewritten
        self._tensors = dict(zip(context.table.names, context.table.tensors, strict=True))
        self._copies, self._suspects = TensorCopies(), TensorCopies()
        self._rewritten: set[str] = set()
        self._lost: list[str] = []
        self._windows = 0
        self._has_pass = self._sees_passes = self._is_watching = False
        self._versions: list[int | None] = []
        before = scope.resource_before(context.index, RewrittenParameters)
        kept = before._copies.copies() if before else {}
        for name, tensor in self._tensors.items():
            if (tensor in known or id(tensor) in kept) and fits_among_others(tensor):
                self._rewritten.add(name)
                self._all_rewritten.add(id(tensor))
                self._copies.add(name, tensor, kept.get(id(tensor)))

    @override
    def begin_batch(self, *, in_window: bool) -> None:
        # `in_window` is about any optimizer; where passes are reported, this optimizer's own are known.
        if self._has_pass or (in_window and not self._sees_passes):
            return  # the window is not over
        self._windows += 1
        if self._rewritten:
            self._copies.keep()
        self._is_watching = self._windows <= WATCHED_WINDOWS or self._windows % WATCH_EVERY_N_WINDOWS == 0
        if self._is_watching:
            # A version counter tells of a rewriting, but only a copy can undo it, and most code rewrites from the first pass on.
            if self._windows == 1:
                self._copy_small_ones()
            self._versions = [None if is_lazy(tensor) else version_of(tensor) for tensor in self._tensors.values()]

    def _copy_small_ones(self) -> None:
        """Copy parameters for the first window, the smallest first, until the copies are large enough."""
        free_bytes = INITIAL_COPY_BYTES
        there = [(name, tensor) for name, tensor in self._tensors.items() if not is_lazy(tensor)]
        # the smallest first, so that as many as possible have a copy
        for name, tensor in sorted(there, key=lambda item: item[1].numel()):
            free_bytes -= tensor.numel() * tensor.element_size()
            if free_bytes >= 0 and name not in self._rewritten and has_arithmetic(shard_of(tensor)) and fits_among_others(tensor):
                self._suspects.add(name, tensor, None)
        self._suspects.keep()

    @override
    def end_pass(self, reached: Collection[int]) -> None:
        self._sees_passes = True
        self._has_pass = self._has_pass or self._context.index in reached

    @override
    def begin_step(self, step: StepContext) -> None:
        if self._is_watching and step.is_new:
            self._is_watching = False
            self._find_rewritten()
            if self._windows == 1:
                self._suspects = TensorCopies()

    def _find_rewritten(self) -> None:
        """Find parameters that were rewritten for the first time, before the step, so that no optimizer can have done it."""
        suspects = dict(self._suspects.named())
        for (name, tensor), version in zip(self._tensors.items(), self._versions, strict=True):
            if name in self._rewritten or not fits_among_others(tensor):
                continue
            if version is None:  # a lazy module has made it in its first forward pass, or it was made in inference mode
                continue
            before = suspects.get(name)
            # The bits are compared where there is a copy, since a write through `.data` leaves the version as it is.
            if version_of(tensor) != version or (before is not None and not have_same_bits(before, shard_of(tensor).detach())):
                self._rewritten.add(name)
                self._all_rewritten.add(id(tensor))
                self._copies.add(name, tensor, before)
                if before is None:
                    self._lost.append(name)

    @override
    def commit(self, step: StepContext) -> None:
        self._has_pass = False
        self._lost.clear()
        if self._is_manual and self._rewritten:  # another forward pass may follow in the same batch
            call_after_step(self._trainer, self._context.optimizer, self._copies.keep)

    @override
    def abort(self, step: StepContext, *, is_called: bool) -> None:
        self._has_pass = False
        self._copies.restore()
        if isinstance(self._context.optimizer, LBFGS):  # its line search is not over; it is restored when it ends
            call_after_step(self._trainer, self._context.optimizer, self._copies.restore)
        if self._lost:
            self._warn_of_lost()

    def _warn_of_lost(self) -> None:
        rank_zero_warn(
            f"The parameters {', '.join(self._lost)} were rewritten by a forward pass for the first time, in a step that is "
            "skipped, and cannot be restored: no copy of their earlier values was kept. From now on they are restored.",
            category=RuntimeWarning,
        )
        self._lost.clear()

    @override
    def abort_on_device(self, skipped: Tensor) -> None:
        self._has_pass = False
        self._copies.restore_where(skipped)
        # a host sync, but only in a window in which a parameter was rewritten for the first time
        if self._lost and bool(skipped):
            self._warn_of_lost()
        self._lost.clear()

    @override
    def reset(self) -> None:
        self._copies.keep()

    @override
    def before(self) -> dict[int, Tensor]:
        return self._copies.copies()
