"""Detection of optimizer steps that bypass Lightning: no hook is called, but parameters change.

Trap: ``first_step`` and ``second_step`` of SAM, ``optimizer.optimizer.step()``, and a step inside the backward or forward pass go
around ``LightningOptimizer.step``, and so around every callback. An optimizer is watched until its first step with a hook; from
then on nothing is done. Within a batch the version counters of its parameters are compared; over an epoch the entries of a few
small parameters, since writes through ``.data`` do not raise the counters.

Parameters change for other reasons too, while an optimizer waits for its turn: another optimizer that holds them has stepped, a
target network is updated, critics are clamped, weights are loaded. So a change counts only if most of the trainable parameters
have changed; with several optimizers, only for one that has gradients or whose state has grown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy

from clip_callbacks.core.reduction import shard_of
from clip_callbacks.core.tensor_table import learns, renormalized_weights
from clip_callbacks.trainer.fingerprints import version_of
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.tensor_copies import fits_among_others, have_same_bits

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

MAX_SAMPLED_PARAMETERS = 8
"""Largest number of parameters of an optimizer that are copied at the beginning of an epoch: the smallest ones are taken."""
MAX_SAMPLED_ENTRIES = 1 << 12
"""Largest number of entries of a parameter that is copied."""

ADVICE = (
    "These changes were not clipped, guarded or logged. In manual optimization, call step() of the optimizers that "
    "self.optimizers() returns, not first_step(), second_step() or optimizer.optimizer.step(). An optimizer that needs several "
    "passes for a step, such as SAM, should run them in its step(closure), by calling the closure more than once. If a step must "
    "bypass Lightning, for example inside the backward pass, call clip_callbacks.clip_step(optimizer) right before it."
)


class BypassingSteps:
    """Watches optimizers until their first step with a hook, and warns of those that train without one.

    Args:
        module: The module in training.

    Attributes:
        is_over: True once every optimizer has stepped with a hook: nothing is watched any more.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._renormalized = set(map(id, renormalized_weights(module)))
        self._seen: set[int] = set()
        self._contexts: Sequence[OptimizerContext] = ()
        self._bypassed: set[int] = set()
        self._versions: dict[int, list[tuple[Tensor, int | None]]] = {}
        self._samples: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._state_sizes: dict[int, int] = {}
        self._active: set[int] = set()
        self.is_over = False

    def record_step(self, context: OptimizerContext) -> None:
        """Record a step with a hook.

        A step without gradients does not count: a step inside the backward pass may have used them up.
        """
        if context.index not in self._seen and context.table.has_gradients:
            self._seen.add(context.index)

    def begin_batch(self, contexts: Sequence[OptimizerContext]) -> None:
        """Record the versions of watched parameters before a batch.

        Args:
            contexts: The optimizers of the fit.
        """
        if self.is_over or len(self._seen) >= len(contexts):
            self.is_over = True
            return
        self._contexts = contexts
        watched = {index: self._watched(index) for index in self._waiting}
        self._versions = {index: [(tensor, version_of(tensor)) for tensor in tensors] for index, tensors in watched.items()}
        if not self._samples:
            self._samples = {index: _sample(tensors) for index, tensors in watched.items()}
        for context in contexts:
            self._state_sizes.setdefault(context.index, len(context.optimizer.state))

    @property
    def _waiting(self) -> set[int]:
        """The numbers of optimizers without a recorded step."""
        return {context.index for context in self._contexts} - self._seen

    def _watched(self, index: int) -> list[Tensor]:
        """Return the parameters of an optimizer that only its own steps should change."""
        tables = {context.index: context.table for context in self._contexts}
        held: Iterable[Tensor] = tables[index].tensors
        # where configure_optimizers returns None, Lightning makes a _MockOptimizer without the module's parameters
        if not any(tensor.requires_grad for table in tables.values() for tensor in table.tensors):
            held = self._module.parameters()
        left_out = self._stepped | self._renormalized  # Embedding(max_norm=...) rewrites its weight in the forward pass
        return [tensor for tensor in held if tensor.requires_grad and not is_lazy(tensor) and id(tensor) not in left_out]

    @property
    def _stepped(self) -> set[int]:
        """The ids of the parameters of optimizers with a recorded step."""
        return {id(tensor) for context in self._contexts if context.index in self._seen for tensor in context.table.tensors}

    def is_bypassed(self, context: OptimizerContext) -> bool:
        """Return whether most parameters of an optimizer, among those with gradients if any, were written to in this batch."""
        return _are_written(self._versions.get(context.index, ()))

    def _is_active(self, context: OptimizerContext, *, may_train: bool) -> bool:
        """Return whether an optimizer may have stepped in this batch."""
        if may_train and len(self._contexts) == 1:
            return True
        return context.table.has_gradients or len(context.optimizer.state) > self._state_sizes[context.index]

    def end_batch(self, *, may_train: bool) -> None:
        """Compare the versions of watched parameters after a batch.

        Args:
            may_train: False if there was certainly no backward pass in the batch.
        """
        stepped = self._stepped if self._versions else set()
        for context in self._contexts:
            if context.index in self._versions and self._is_active(context, may_train=may_train):
                self._active.add(context.index)
                if _are_written([watched for watched in self._versions[context.index] if id(watched[0]) not in stepped]):
                    self._bypassed.add(context.index)
        self._versions = {}

    def end_epoch(self) -> None:
        """Warn, once in a fit, of optimizers that have trained without a recorded step."""
        if self.is_over:
            return
        found = sorted(self._waiting & (self._bypassed | self._moved))
        self._samples, self._active = {}, set()
        if found:
            self.is_over = True
            rank_zero_warn(f"{self._subject(found)} was seen, but parameters have changed. {ADVICE}", category=RuntimeWarning)

    @property
    def _moved(self) -> set[int]:
        """The numbers of active optimizers whose sampled parameters differ from the beginning of the epoch."""
        stepped = self._stepped
        samples = {index: self._samples.get(index, ()) for index in self._active}
        return {index for index, each in samples.items() if _has_moved([sample for sample in each if id(sample[0]) not in stepped])}

    def _subject(self, found: Sequence[int]) -> str:
        named = [context for context in self._contexts if context.index in found]
        names = [type(each.optimizer).__name__ + each.suffix for each in named if any(map(learns, each.table.tensors))]
        return f"No optimizer step{' of ' * bool(names)}{', '.join(names)}"

    def detach(self) -> None:
        """Release all parameters."""
        self._contexts = ()
        self._versions, self._samples = {}, {}


@torch.no_grad()
def _sample(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    small = [tensor for tensor in tensors if fits_among_others(tensor) and 0 < shard_of(tensor).numel() <= MAX_SAMPLED_ENTRIES]
    small = sorted(small, key=lambda tensor: tensor.numel())[:MAX_SAMPLED_PARAMETERS]
    return [(tensor, shard_of(tensor).detach().clone()) for tensor in small]


def _are_written(versions: Sequence[tuple[Tensor, int | None]]) -> bool:
    """Return whether more parameters were written to than were left alone; of the latter only those with gradients, if any."""
    written = [tensor for tensor, version in versions if version_of(tensor) != version]
    others = [tensor for tensor, version in versions if version_of(tensor) == version]
    if any(tensor.grad is not None for tensor, _ in versions):
        others = [tensor for tensor in others if tensor.grad is not None]
    return len(written) > len(others)


def _has_moved(sample: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Return whether most sampled parameters have changed."""
    moved = [tensor for tensor, before in sample if not have_same_bits(before, shard_of(tensor).detach())]
    return 2 * len(moved) > len(sample)
