"""Optimizers that step around Lightning: no hook tells of it, but parameters change in batches in which no step came by.

So do ``first_step`` and ``second_step`` of SAM, ``optimizer.optimizer.step()``, and a step inside the backward or the forward pass.
An optimizer is watched until its first step comes by, which costs nothing from then on. Of a batch the version counters of its
parameters tell; of an epoch the entries of a few small ones, since ``.data`` goes around the counters.

Parameters change for other reasons too: another optimizer that holds them has stepped, a target network follows, critics are
clamped, weights are loaded, while an optimizer waits for its turn. So a change counts where most of what may train has changed; of
several optimizers only for one that has gradients or has begun to keep states.
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
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.tensor_copies import fits_among_others, have_same_bits

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

SAMPLED = 8
"""How many parameters are copied at the beginning of an epoch, the smallest ones."""
SAMPLED_ENTRIES = 1 << 12
"""How many entries such a parameter has at most."""

CURE = (
    "Nothing of it was clipped, guarded or logged. In manual optimization call step() of what self.optimizers() returns, not "
    "first_step() and second_step(), nor optimizer.optimizer.step(). An optimizer that needs several passes for a step, as SAM, "
    "runs them in its step(closure), by calling the closure more than once. Where a step must go around Lightning, as inside the "
    "backward pass, write clip_callbacks.clip_step(optimizer) right before it."
)


class UnseenSteps:
    """Watches those optimizers of which no step has come by yet.

    Args:
        module: The module in training.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._renormalized = set(map(id, renormalized_weights(module)))
        self._seen: set[int] = set()
        self._contexts: Sequence[OptimizerContext] = ()
        self._trained_around: set[int] = set()
        self._versions: dict[int, list[tuple[Tensor, int]]] = {}
        self._samples: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._states: dict[int, int] = {}
        self._active: set[int] = set()
        self._is_over = False

    def note_step(self, context: OptimizerContext) -> None:
        """A step comes by; one without gradients tells nothing, for they may have been used up in the backward pass."""
        if context.index not in self._seen and context.table.has_gradients:
            self._seen.add(context.index)

    def begin_batch(self, contexts: Sequence[OptimizerContext]) -> None:
        """Remember the parameters as they are before a batch.

        Args:
            contexts: The optimizers of the fit.
        """
        if self._is_over or len(self._seen) >= len(contexts):
            self._is_over = True
            return
        self._contexts = contexts
        watched = {index: self._watched(index) for index in self._waiting}
        self._versions = {index: [(tensor, tensor._version) for tensor in tensors] for index, tensors in watched.items()}
        if not self._samples:
            self._samples = {index: _sample(tensors) for index, tensors in watched.items()}
        for context in contexts:
            self._states.setdefault(context.index, len(context.optimizer.state))

    @property
    def _waiting(self) -> set[int]:
        """The numbers of those of which no step has come by."""
        return {context.index for context in self._contexts} - self._seen

    def _watched(self, index: int) -> list[Tensor]:
        """What trains in an optimizer, but for what another one holds that has stepped, or a forward pass rewrites.

        Of the one that holds nothing which Lightning makes where ``configure_optimizers`` returns None it is the whole module.
        """
        tables = {context.index: context.table for context in self._contexts}
        held: Iterable[Tensor] = tables[index].tensors
        if not any(tensor.requires_grad for table in tables.values() for tensor in table.tensors):
            held = self._module.parameters()
        left_out = self._stepped | self._renormalized
        return [tensor for tensor in held if tensor.requires_grad and not is_lazy(tensor) and id(tensor) not in left_out]

    @property
    def _stepped(self) -> set[int]:
        """The ids of the parameters that optimizers hold of which a step has come by."""
        return {id(tensor) for context in self._contexts if context.index in self._seen for tensor in context.table.tensors}

    def is_trained_around(self, context: OptimizerContext) -> bool:
        """Whether most of what has a gradient in an optimizer, or had one, was written to since the batch began."""
        return _are_written(self._versions.get(context.index, ()))

    def _is_active(self, context: OptimizerContext, *, may_train: bool) -> bool:
        """Whether an optimizer may have stepped: the only one after a backward pass; any that has gradients, or states since."""
        if may_train and len(self._contexts) == 1:
            return True
        return context.table.has_gradients or len(context.optimizer.state) > self._states[context.index]

    def end_batch(self, *, may_train: bool) -> None:
        """Look at the parameters after a batch.

        Args:
            may_train: Whether there was a backward pass, as far as anybody could see one.
        """
        stepped = self._stepped if self._versions else set()
        for context in self._contexts:
            if context.index in self._versions and self._is_active(context, may_train=may_train):
                self._active.add(context.index)
                if _are_written([watched for watched in self._versions[context.index] if id(watched[0]) not in stepped]):
                    self._trained_around.add(context.index)
        self._versions = {}

    def end_epoch(self) -> None:
        """Warn, once in a fit, of optimizers that have trained and of which no step has come by."""
        if self._is_over:
            return
        found = sorted(self._waiting & (self._trained_around | self._moved))
        self._samples, self._active = {}, set()
        if found:
            self._is_over = True
            rank_zero_warn(f"{self._what(found)} was seen, but parameters have changed. {CURE}", category=RuntimeWarning)

    @property
    def _moved(self) -> set[int]:
        """The numbers of those whose parameters have moved since the first batch of the epoch, in which they were active."""
        stepped = self._stepped
        samples = {index: self._samples.get(index, ()) for index in self._active}
        return {index for index, each in samples.items() if _has_moved([sample for sample in each if id(sample[0]) not in stepped])}

    def _what(self, found: Sequence[int]) -> str:
        named = [context for context in self._contexts if context.index in found]
        names = [type(each.optimizer).__name__ + each.suffix for each in named if any(map(learns, each.table.tensors))]
        return f"No optimizer step{' of ' * bool(names)}{', '.join(names)}"

    def detach(self) -> None:
        """Let go of all parameters."""
        self._contexts = ()
        self._versions, self._samples = {}, {}


@torch.no_grad()
def _sample(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    small = [tensor for tensor in tensors if fits_among_others(tensor) and 0 < shard_of(tensor).numel() <= SAMPLED_ENTRIES]
    small = sorted(small, key=lambda tensor: tensor.numel())[:SAMPLED]
    return [(tensor, shard_of(tensor).detach().clone()) for tensor in small]


def _are_written(versions: Sequence[tuple[Tensor, int]]) -> bool:
    """Whether more parameters were written to than have a gradient and were not; where none has one, more than were not."""
    written = [tensor for tensor, version in versions if tensor._version != version]
    others = [tensor for tensor, version in versions if tensor._version == version]
    if any(tensor.grad is not None for tensor, _ in versions):
        others = [tensor for tensor in others if tensor.grad is not None]
    return len(written) > len(others)


def _has_moved(sample: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether most of it has."""
    moved = [tensor for tensor, before in sample if not have_same_bits(before, shard_of(tensor).detach())]
    return 2 * len(moved) > len(sample)
