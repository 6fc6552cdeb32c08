r"""Blocks that do not learn: gradients that are exactly zero, and updates that are too small to change the weights.

.. math::
    \text{grad\_vanished}_b = z_b + (1 - z_b) \, s_b

where :math:`z_b` is the share of the block's entries whose parameters had a gradient of exactly zero in every step of a span, and
:math:`s_b` the share of the others' entries with a gradient whose weights are bit for bit unchanged after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from clip_callbacks.core.blocks import Partition, Scope, Selection
from clip_callbacks.core.gradients import gradients_of
from clip_callbacks.core.reduction import is_sharded, shard_of
from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.stats.norm_history import MAX_WAITING_STEPS
from clip_callbacks.stats.vanished_block import VanishedBlock
from clip_callbacks.stats.weight_sample import WeightSample

MIN_STEPS = 100
"""Smallest number of healthy steps in a span. A block that takes part in 5 % of the steps is left out of one such span in 170."""

MAX_STEPS = 1000
"""Number of healthy steps after which a span ends within an epoch."""

MIN_CHECKS = 2
"""Smallest number of checks of the weights in a span."""

MIN_STEPS_BETWEEN_CHECKS = 10
"""Smallest number of steps between two checks, for a Trainer that logs more often. It doubles with each check of a span."""

MIN_SHARE = 0.5
"""The share of a block's entries above which the block has vanished."""


class VanishingDetector:
    """Finds the blocks of one optimizer that do not learn, over spans of healthy steps.

    A span ends with an epoch, or within it after ``MAX_STEPS`` steps; a span with fewer than ``MIN_STEPS`` steps or ``MIN_CHECKS``
    checks goes on into the next epoch. A step costs one list append; a check, some small copies on the device. The host reads a
    sample of weights when a span ends.

    A parameter counts as zero if its norm was 0 in every step, although a backward pass has given it a gradient. One without a
    gradient (``None``) is not a part of the loss: it is frozen, or unused by design. FSDP1 gives unused parameters a gradient of
    zeros, so that there no parameter counts as zero.

    Args:
        scope: Scope of the blocks.
        selection: Patterns for the names of the parameters that blocks are made of.
        named: Names of the blocks that a warning has named in this run.

    Attributes:
        named: Names of all blocks that a warning has named, as the keys of a dictionary.
        steps: The number of healthy steps in the span.
    """

    def __init__(self, scope: Scope, selection: Selection, named: Iterable[str] = ()) -> None:
        self._scope: Scope = scope
        self._selection = selection
        self.named = dict.fromkeys(map(str, named))
        self._table = TensorTable((), (), ())
        self._blocks: Partition | None = None
        self._optimizer: Optimizer | None = None
        self._handles: dict[int, RemovableHandle] = {}
        self._begin_span()

    def _begin_span(self) -> None:
        self.steps = self._checks = 0
        self._last_check: int | None = None
        self._norms: list[Tensor] = []
        self._is_nonzero = torch.zeros(len(self._table), dtype=torch.bool, device="cpu")
        # parameters with norms of 0: those with a gradient in a healthy step, the same of a step that may still be skipped, and
        # those to whose gradient autograd has added
        self._present: set[int] = set()
        self._maybe_present: set[int] = set()
        self._reached: set[int] = set()
        self._sample: WeightSample | None = None
        # for each parameter, as far as checks tell: the number of steps in which it was not frozen, and of those in which its
        # learning rate was not 0 either; and the last such rate
        self._trainable_steps, self._learning_steps = ([0] * len(self._table) for _ in range(2))
        self._last_rates: list[Any] = [None] * len(self._table)
        self._trainable_before: set[int] = set()
        self._learning_before: set[int] = set()

    def attach(self, table: TensorTable, optimizer: Optimizer) -> None:
        """Take up the parameters of an optimizer; a span begins.

        Args:
            table: The parameters.
            optimizer: The optimizer that holds them.
        """
        self.detach()
        selection = self._selection.among(table.names)
        self._table, self._optimizer = table, optimizer
        self._blocks = None if selection is None else table.partition(self._scope, selection)
        self._begin_span()

    def detach(self) -> None:
        """Remove all hooks, and release all tensors."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._table, self._optimizer, self._blocks = TensorTable((), (), ()), None, None
        self._begin_span()

    # --- a step

    def note_gradients(self) -> None:
        """Record which sampled gradients of the step are not zero; call it before they are written, on logging steps."""
        if self._blocks is None or not self._is_check_due:
            return
        gradients = gradients_of(self._table, bucketed=False)
        present, rates = dict(zip(gradients.positions, gradients.tensors, strict=True)), self._rates()
        self._sample_weights().note_gradients(present, rates)
        self._count_steps(rates)
        if self.steps:  # before the first step every norm looks like 0
            self._flush()
            self._look_for_gradients(present)
        self._last_check = self.steps

    def _count_steps(self, rates: Sequence[Any]) -> None:
        """Count the steps since the last check for the parameters that could learn at both ends of them."""
        trainable = {place for place, tensor in enumerate(self._table.tensors) if tensor.requires_grad}
        learning = {place for place in trainable if isinstance(rates[place], Tensor) or rates[place] != 0}
        for place in learning:
            self._last_rates[place] = rates[place]
        if self._last_check is None:
            since_last, self._trainable_before, self._learning_before = self.steps + 1, trainable, learning
        else:
            since_last = self.steps - self._last_check
        for place in trainable & self._trainable_before:
            self._trainable_steps[place] += since_last
        for place in learning & self._learning_before:
            self._learning_steps[place] += since_last
        self._trainable_before, self._learning_before = trainable, learning

    @property
    def _is_check_due(self) -> bool:
        if self._last_check is None:
            return True
        return self.steps >= self._last_check + max(self._last_check, MIN_STEPS_BETWEEN_CHECKS)

    def add(self, report: StepRecord) -> None:
        """Record a healthy step."""
        if self._blocks is None:
            return
        sample = self._sample
        if sample is None:
            sample = self._sample_weights()
        if sample.is_pending:
            sample.confirm()
        if self._maybe_present:
            self._present |= self._maybe_present
            self._maybe_present = set()
        self._norms.append(report.parameter_norms)
        self.steps += 1
        if len(self._norms) >= MAX_WAITING_STEPS:
            self._flush()

    def discard(self) -> None:
        """Discard what was recorded of a step that is skipped."""
        self._maybe_present = set()
        if self._sample is not None:
            self._sample.discard()

    def compare_weights(self) -> None:
        """Compare the sampled weights with those at the beginning of the span; call it after the step, on logging steps."""
        if self._sample is not None and self._sample.compare():
            self._checks += 1

    def _sample_weights(self) -> WeightSample:
        if self._sample is None:
            assert self._blocks is not None
            places = [place for place in self._blocks.members.tolist() if self._table.tensors[place].requires_grad]
            self._sample = WeightSample(self._table, places)
        return self._sample

    def _rates(self) -> list[Any]:
        """Return the learning rate of each parameter: a number, a tensor on another device, or None if the optimizer chooses it."""
        assert self._optimizer is not None
        rates: dict[int, Any] = {}
        for group in self._optimizer.param_groups:
            rate = group.get("lr")
            if isinstance(rate, Tensor):
                # a copy, since a schedule will overwrite it; not read where that would be a host sync
                rate = rate.item() if rate.is_cpu else rate.clone()
            rates |= dict.fromkeys(map(id, group["params"]), rate)
        return [rates.get(id(tensor)) for tensor in self._table.tensors]

    def _flush(self) -> None:
        if self._norms:
            self._is_nonzero |= (torch.stack(self._norms) != 0).any(0)
            self._norms.clear()

    def _look_for_gradients(self, present: Mapping[int, Tensor]) -> None:
        """Find out which of the parameters whose norms were all 0 take part in the backward pass.

        A gradient of zeros is no proof: ``zero_grad(set_to_none=False)`` leaves one on a parameter that was used long ago. A hook
        tells, once, that autograd adds to the gradient.
        """
        is_nonzero = self._is_nonzero.tolist()
        for place in present:
            tensor = self._table.tensors[place]
            if is_nonzero[place] or not tensor.requires_grad:
                continue
            self._maybe_present.add(place)
            if is_sharded(tensor):  # FSDP2 puts gradients on its shards itself, past the hooks of autograd, if there are any
                self._reached.add(place)
            elif place not in self._reached and place not in self._handles and not self._is_flat(place):
                hook = partial(self._take_note, place)
                self._handles[place] = tensor.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def _is_flat(self, place: int) -> bool:
        reduction = self._table.reduction
        return reduction is not None and reduction.first_entries[place] is not None

    def _take_note(self, place: int, _: Tensor) -> None:
        self._reached.add(place)
        self._handles.pop(place).remove()

    # --- a span

    @property
    def is_due(self) -> bool:
        """Whether the span is long enough to be judged; equal on all ranks."""
        return self.steps >= MIN_STEPS and self._checks >= MIN_CHECKS

    @property
    def is_complete(self) -> bool:
        """Whether the span is to be judged within the epoch."""
        return self.is_due and self.steps >= MAX_STEPS

    def judge(self) -> list[VanishedBlock]:
        """Return the blocks of which more than half did not learn, and begin the next span.

        Where ranks hold parts of the parameters, this is a collective, and all ranks find the same blocks.
        """
        assert self._blocks is not None
        assert self._sample is not None
        self._flush()
        with_gradient, stalled = self._sample.counts()
        for place in (stalled > MIN_SHARE * with_gradient).nonzero().flatten().tolist():
            if self._has_master_weights(place):  # in which small updates add up
                stalled[place] = 0.0
        reached = torch.zeros_like(stalled)
        reached[list(self._reached & self._present)] = 1.0
        # what was frozen in most steps, or had a learning rate of 0, did not have the time to learn
        reached *= self._lasted(self._trainable_steps)
        has_time = self._lasted(self._learning_steps)
        counts = torch.cat([with_gradient, with_gradient * has_time, stalled * has_time, reached])
        if (reduction := self._table.reduction) is not None:
            counts = reduction.norms(counts, 1.0)  # norms of order 1 are sums, in which copies count once
        found = self._find(*counts.reshape(4, -1))
        self._begin_span()
        return found

    def _lasted(self, steps: Sequence[int]) -> Tensor:
        """Return for each parameter whether its steps are more than half of those up to the last check, float64."""
        assert self._last_check is not None
        return (2 * torch.tensor(steps, dtype=torch.int64, device="cpu") > self._last_check).double()

    def _find(self, with_gradient: Tensor, judged: Tensor, stalled: Tensor, reached: Tensor) -> list[VanishedBlock]:
        """Find blocks by numbers of entries: with a gradient, those of them to judge, unchanged ones; and by reached parameters."""
        blocks = self._blocks
        assert blocks is not None

        def sums(values: Tensor) -> Tensor:
            zeros = torch.zeros(len(blocks.names), dtype=torch.float64, device="cpu")
            return zeros.index_add_(0, blocks.member_blocks, values[blocks.members].double())

        # float32 norms of tiny entries may be 0: the entries themselves decide
        learns = self._is_nonzero | (with_gradient > 0)
        is_zero = (reached > 0) & ~learns
        sizes = torch.tensor([math.prod(shape) for shape in self._table.shapes], dtype=torch.float64, device="cpu")
        # a block without any entry that counts is 0 / 0
        zero = (sums(sizes * is_zero) / sums(sizes * (is_zero | learns))).nan_to_num(0.0)
        small = (1.0 - zero) * (sums(stalled) / sums(judged)).nan_to_num(0.0)
        shares, is_mostly_zero = (zero + small).tolist(), (zero >= small).tolist()
        # One of the parameters that did not learn describes its block. Frozen ones have no part in it: their data type may be any.
        did_not_learn = torch.where(blocks.spread(zero >= small, outside=False), is_zero, stalled > 0)
        largest = {blocks.index[place]: place for place in (sizes * did_not_learn).argsort().tolist()}  # a block's last place stays
        return [
            self._vanished(name, shares[block], largest[block], is_zero=is_mostly_zero[block])
            for block, name in enumerate(blocks.names)
            if shares[block] > MIN_SHARE
        ]

    def _vanished(self, name: str, share: float, place: int, *, is_zero: bool) -> VanishedBlock:
        """Describe a block by its parameter at a place of the table."""
        assert self._sample is not None
        size = math.nan
        if not is_zero:
            size = self._sample.typical_size(place)
        rate = self._last_rates[place]
        if rate is None:
            rate = math.nan
        return VanishedBlock(name, share, is_zero, self._table.tensors[place].dtype, float(rate), size)

    def _has_master_weights(self, place: int) -> bool:
        assert self._optimizer is not None
        assert self._sample is not None
        state = self._optimizer.state.get(self._table.tensors[place])
        held = state.values() if isinstance(state, Mapping) else ()
        shards = [shard_of(each) for each in held if isinstance(each, Tensor)]
        return any(self._sample.is_copy_in_higher_precision(place, each) for each in shards)

    def name_new(self, found: Sequence[VanishedBlock]) -> list[VanishedBlock]:
        """Return the blocks that no warning of this run has named, and record their names."""
        new = [block for block in found if block.name not in self.named]
        self.named |= dict.fromkeys(block.name for block in new)
        return new
