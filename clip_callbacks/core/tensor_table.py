"""What one optimizer step is about: parameters by name, and the gradients that are there now."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from clip_callbacks.core.blocks import EVERYTHING, OUTSIDE, SCOPES, Partition, Scope, Selection, unknown_scope
from clip_callbacks.core.buckets import Buckets
from clip_callbacks.core.reduction import Reduction, is_sharded, shard_of, shard_of_gradient
from clip_callbacks.core.units import Rows, Units

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What wrappers of torch put into the names of parameters: left out, so that names and patterns hold with and without them."""


@dataclass(frozen=True, eq=False)
class TensorTable:
    """The parameters that take part in one optimizer step, each once, and what blocks they can form.

    A parameter of a lazy module has no shape before its first forward pass: until then it counts as empty, and a table that is to
    know its shape is made after that.

    Build it once (:meth:`of_optimizer`, :meth:`of_named`) and pass it to :func:`~clip_callbacks.clip_step` at every step. A
    parameter that stands in it twice, as tied weights do, is counted once, under its first name.

    Args:
        tensors: The N parameters.
        names: Their N names, as ``module.named_parameters()`` gives them.
        groups: The N names of their optimizer parameter groups.
        reduction: Where ranks hold parts of them, what makes norms of these parts norms of the whole.
    """

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    groups: tuple[str, ...]
    reduction: Reduction | None = None
    _partitions: dict[tuple[str, Selection, bool], Partition] = field(default_factory=dict, repr=False)
    _positions: dict[Selection, tuple[int, ...]] = field(default_factory=dict, repr=False)
    _covered: WeakKeyDictionary[Optimizer, tuple[int, bool]] = field(default_factory=WeakKeyDictionary, repr=False)
    _indices: dict[str, tuple[list[int], torch.device, Tensor]] = field(default_factory=dict, repr=False)
    _slots: dict[torch.dtype, tuple[Tensor, list[Tensor]]] = field(default_factory=dict, repr=False)

    @classmethod
    def of_named(cls, named: Iterable[tuple[str, Tensor]]) -> TensorTable:
        """Table of ``model.named_parameters()``: one parameter group holds them all."""
        return cls._of_rows((name, tensor, "pg1") for name, tensor in named)

    @classmethod
    def of_tensors(cls, tensors: Iterable[Tensor]) -> TensorTable:
        """Table of ``model.parameters()``: the names are their positions."""
        return cls.of_named((str(position), tensor) for position, tensor in enumerate(tensors))

    @classmethod
    def nameless(cls, tensors: Iterable[Tensor]) -> TensorTable:
        """Table for one use, where nobody asks for names: blocks other than "global" are not to be had."""
        each = tuple({id(tensor): tensor for tensor in tensors}.values())
        return cls(each, (), (), Reduction.of(each))

    @classmethod
    def of_optimizer(
        cls,
        optimizer: Optimizer,
        named: Iterable[tuple[str, Tensor]] = (),
        *,
        reduce: Callable[[Sequence[Tensor]], Reduction | None] = Reduction.of,
    ) -> TensorTable:
        """Table of what an optimizer holds, in its own order.

        Args:
            optimizer: Any ``torch.optim.Optimizer``.
            named: ``model.named_parameters()``; a parameter not among them is called ``pg1.0``: its group and its place there.
            reduce: From the parameters to what makes norms of this rank's parts norms of the whole; the default knows DTensors.
        """
        names = {id(tensor): name for name, tensor in named}
        groups = [(str(group.get("name", f"pg{i}")), group["params"]) for i, group in enumerate(optimizer.param_groups, 1)]
        rows = [
            (names.get(id(tensor), f"{group}.{place}"), tensor, group)
            for group, tensors in groups
            for place, tensor in enumerate(tensors)
        ]
        return cls._of_rows(rows, reduce)

    @classmethod
    def of(
        cls, parameters: TensorTable | Optimizer | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]
    ) -> TensorTable:
        """Table of whatever holds parameters: a table, an optimizer, named or bare tensors."""
        if isinstance(parameters, TensorTable):
            return parameters
        if isinstance(parameters, Optimizer):
            return cls.of_optimizer(parameters)
        if isinstance(parameters, Mapping):
            return cls.of_named(parameters.items())
        if isinstance(parameters, Tensor):
            return cls.of_tensors([parameters])
        rows: Sequence[Tensor | tuple[str, Tensor]] = list(parameters)
        named = [row for row in rows if isinstance(row, tuple)]
        tensors = [row for row in rows if isinstance(row, Tensor)]
        if len(rows) not in {len(named), len(tensors)}:  # such as the layers of an nn.Sequential
            raise TypeError(
                "`parameters` must be an optimizer, tensors, or pairs of a name and a tensor, got "
                f"{', '.join(sorted({type(row).__name__ for row in rows}))}. Pass the optimizer or model.named_parameters()."
            )
        return cls.of_named(named) if named else cls.of_tensors(tensors)

    @classmethod
    def _of_rows(
        cls,
        rows: Iterable[tuple[str, Tensor, str]],
        reduce: Callable[[Sequence[Tensor]], Reduction | None] = Reduction.of,
    ) -> TensorTable:
        first: dict[int, tuple[str, Tensor, str]] = {}
        for row in rows:
            first.setdefault(id(row[1]), row)
        names, tensors, groups = zip(*first.values(), strict=True) if first else ((), (), ())
        return cls(tensors, tuple(map(without_wrappers, names)), groups, reduce(tensors))

    def __len__(self) -> int:
        """Count of the parameters, N."""
        return len(self.tensors)

    @property
    def has_gradients(self) -> bool:
        """Whether any parameter has one; where ranks hold parts of them, whether any may have one."""
        return self.reduction is not None or any(tensor.grad is not None for tensor in self.tensors)

    def partition(self, scope: Scope, selection: Selection = EVERYTHING, *, by_unit: bool = False) -> Partition:
        r"""Blocks of one scope.

        Args:
            scope: ``"global"`` one block; ``"group"`` one for each optimizer parameter group; ``"layer"`` one for the
                parameters that one module owns directly; ``"parameter"`` one for each tensor; ``"unit"`` one for each output row.
            selection: Which parameters are in blocks; others are left out.
            by_unit: Whether units are divided into blocks instead of parameters; for the scope "unit" they always are.

        Raises:
            ValueError: If the scope is unknown or a pattern matches no name; it lists the choices or near names.

        Example::

            >>> table = TensorTable.of(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).named_parameters())
            >>> table.partition("layer").names
            ('0', '1')
            >>> list(table.partition("unit").names)
            ['0.weight[0]', '0.weight[1]', '0.bias', '1.weight[0]', '1.weight[1]', '1.bias']
        """
        if scope not in SCOPES:
            raise ValueError(unknown_scope(scope))
        by_unit = by_unit or scope == "unit"
        key = scope, selection, by_unit
        if key not in self._partitions:
            selection.check(self.names)
            self._partitions[key] = self._divide(scope, [name in selection for name in self.names], by_unit=by_unit)
        return self._partitions[key]

    def positions(self, selection: Selection) -> tuple[int, ...]:
        """Where in the table the selected parameters are."""
        if selection not in self._positions:
            self._positions[selection] = tuple(position for position, name in enumerate(self.names) if name in selection)
        return self._positions[selection]

    def _divide(self, scope: Scope, inside: Sequence[bool], *, by_unit: bool) -> Partition:
        if scope == "unit":
            return Partition(*self.units.selected(self.names, inside))
        labels = self._labels(scope)
        numbers = {label: i for i, label in enumerate(dict.fromkeys(x for x, taken in zip(labels, inside, strict=True) if taken))}
        index = array("q", (numbers[label] if taken else OUTSIDE for label, taken in zip(labels, inside, strict=True)))
        return Partition(tuple(numbers), self.units.repeated(index) if by_unit else index)

    def _labels(self, scope: Scope) -> Sequence[str]:
        if scope == "global":
            return ["global"] * len(self)
        if scope == "group":
            return self.groups
        if scope == "layer":
            return [name.rpartition(".")[0] or "(root)" for name in self.names]
        return self.names

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all parameters, and so their gradients, are of one dtype on one device."""
        pairs = zip(self.tensors, self.shards, strict=True)
        kinds = {(getattr(tensor, "grad_dtype", tensor.dtype), shard.device) for tensor, shard in pairs}
        return len(kinds) <= 1 and all(dtype is not None for dtype, _ in kinds)  # None: gradients of any dtype

    @cached_property
    def _buckets(self) -> Buckets | None:
        return Buckets.of([self.shards[position] for position in self._filled[0]]) if self.is_uniform else None

    @cached_property
    def is_sharded(self) -> bool:
        """Whether any parameter is a DTensor."""
        return any(map(is_sharded, self.tensors))

    @cached_property
    def is_wide(self) -> bool:
        """Whether any parameter is of double precision."""
        return any(tensor.dtype in {torch.float64, torch.complex128} for tensor in self.tensors)

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parameters, undivided."""
        return self.reduction.shapes if self.reduction else tuple(map(_shape_of, self.tensors))

    @cached_property
    def units(self) -> Units:
        """The output rows of the parameters."""
        return Units(self.shapes)

    @cached_property
    def unit_reduction(self) -> Reduction | None:
        """Where ranks hold parts of units, what makes norms of these parts norms of the whole."""
        return self.reduction.of_units(self.units.owners) if self.reduction else None

    def rows(self, position: int, part: Tensor) -> list[Rows]:
        """The rows of this rank's part of a parameter or of its gradient, which is not sparse."""
        ranks = self.reduction
        first_row, first_entry = (ranks.first_rows[position], ranks.first_entries[position]) if ranks else (0, None)
        return self.units.of_shard(position, part, first_row, first_entry)

    @cached_property
    def shards(self) -> tuple[Tensor, ...]:
        """This rank's part of each parameter; of a plain one, itself."""
        return tuple(map(shard_of, self.tensors)) if self.is_sharded else self.tensors

    @cached_property
    def _filled(self) -> tuple[list[int], list[Tensor]]:
        places = [position for position, shard in enumerate(self.shards) if count_entries(shard)]
        return places, [self.tensors[position] for position in places]

    def gradients(self, *, bucketed: bool = True) -> Gradients:
        """The gradients that are there now. A sparse one is coalesced in place, so that equal indices count as one entry.

        Args:
            bucketed: Whether to plan how to read small ones together, which pays if the table is used more than once.
        """
        positions, parameters = self._filled
        if self.is_sharded:
            every = [shard_of_gradient(tensor) for tensor in self.tensors]  # of empty shards too: it may take all ranks
            found = [every[position] for position in positions]
        else:
            found = [parameter.grad for parameter in parameters]
        tensors = [gradient for gradient in found if gradient is not None]
        if {gradient.layout for gradient in tensors} - {torch.strided}:
            return self._sparse_gradients(positions, found)
        if len(tensors) == len(found):
            return Gradients(self, positions, tensors, self._buckets if bucketed else None)
        there = [position for position, gradient in zip(positions, found, strict=True) if gradient is not None]
        return Gradients(self, there, tensors, None)

    def _sparse_gradients(self, positions: list[int], found: list[Tensor | None]) -> Gradients:
        entries = [
            (position, gradient if gradient.layout is torch.strided else coalesced_values(self.tensors[position]))
            for position, gradient in zip(positions, found, strict=True)
            if gradient is not None
        ]
        entries = [(position, values) for position, values in entries if values.numel()]
        return Gradients(self, [position for position, _ in entries], [values for _, values in entries], None)

    def covers(self, optimizer: Optimizer) -> bool:
        """Whether all parameters of an optimizer are in the table; looked up again if it holds more or fewer than it did."""
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._covered.get(optimizer)
        if known is None or known[0] != count:
            ours = {id(tensor) for tensor in self.tensors}
            known = count, all(id(tensor) in ours for group in optimizer.param_groups for tensor in group["params"])
            self._covered[optimizer] = known
        return known[1]

    def index(self, positions: list[int], device: torch.device, purpose: str = "gradients") -> Tensor:
        """Positions as a tensor, int64, kept for each purpose until they change: making one on a GPU is a host sync."""
        known = self._indices.get(purpose)
        if known is None or known[:2] != (positions, device):
            known = self._indices[purpose] = positions, device, torch.tensor(positions, dtype=torch.int64, device=device)
        return known[2]

    def slots(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """A place for one factor per parameter, CPU tensor of shape ``(N,)``, and its N entries as 0-dim views: made once."""
        if dtype not in self._slots:
            buffer = torch.empty(len(self), dtype=dtype, device="cpu")
            self._slots[dtype] = buffer, list(buffer.unbind())
        return self._slots[dtype]


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of one step: strided tensors with at least one entry; of a sparse gradient, its coalesced values.

    Args:
        table: The N parameters.
        positions: Which of them have one.
        tensors: Views of those gradients: what is written here is written there.
        buckets: How to read the small ones together, if that is worth it.
    """

    table: TensorTable
    positions: list[int]
    tensors: list[Tensor]
    buckets: Buckets | None

    @property
    def is_uniform(self) -> bool:
        """Whether all are of one dtype on one device."""
        return self.table.is_uniform

    @property
    def exist(self) -> bool:
        """Whether there are any; where ranks hold parts of them, here or elsewhere."""
        return self.table.reduction is not None or bool(self.tensors)

    @property
    def device(self) -> torch.device:
        """Where they are, if they are in one place."""
        return self.table.shards[0].device

    @property
    def is_complete(self) -> bool:
        """Whether every parameter has one."""
        return len(self.positions) == len(self.table)

    @cached_property
    def rows(self) -> list[Rows]:
        """All of them row by row."""
        rows: list[Rows] = []
        for position, tensor in zip(self.positions, self.tensors, strict=True):
            gradient = self.table.tensors[position].grad
            if gradient is None or gradient.layout is torch.strided:
                rows += self.table.rows(position, tensor)
            else:
                rows.append(_rows_of_sparse(self.table, position, gradient, tensor))
        return rows

    def fill(self, values: Tensor) -> Tensor:
        """Values of the gradients that are there, shape ``(len(positions),)``, as ``(N,)`` with 0 where there is none."""
        if self.is_complete:
            return values
        return values.new_zeros(len(self.table)).index_copy_(0, self.table.index(self.positions, values.device), values)


def learns(parameter: Tensor) -> bool:
    """Whether a step may change a parameter: whether it requires a gradient, or was given one.

    What is frozen is not judged as numbers: there may be codes in it, packed into any dtype, which look like NaN in some.
    """
    return parameter.requires_grad or parameter.grad is not None


def renormalized_weights(module: nn.Module) -> Iterator[Tensor]:
    """The weights that an embedding renormalizes in its forward pass."""
    for each in module.modules():
        weight = each._parameters.get("weight")
        if weight is not None and getattr(each, "max_norm", None) is not None:
            yield weight


def count_entries(tensor: Tensor) -> int:
    """How many entries a tensor has; none if it is of a lazy module that has not run yet."""
    return 0 if is_lazy(tensor) else tensor.numel()


def _shape_of(tensor: Tensor) -> tuple[int, ...]:
    return (0,) if is_lazy(tensor) else tuple(tensor.shape)


def without_wrappers(name: str) -> str:
    """A name as it is without wrappers of torch.

    Args:
        name: Of a parameter, buffer or module; of a module with a dot at its end.
    """
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _rows_of_sparse(table: TensorTable, position: int, gradient: Tensor, values: Tensor) -> Rows:
    """The rows that a coalesced gradient has entries in."""
    if gradient.ndim <= 1:
        return table.rows(position, values)[0]
    if gradient.layout is not torch.sparse_coo or gradient.sparse_dim() != 1:
        raise ValueError(
            '`scope` must not be "unit" beside sparse gradients other than those of embeddings (COO, one sparse dimension), '
            f'got {gradient.layout} for {table.names[position]}. Choose the scope "parameter" for all rules.'
        )
    return Rows(values, gradient.indices()[0] + table.units.firsts[position], position)


def coalesced_values(parameter: Tensor) -> Tensor:
    """Entries of a sparse gradient, which is coalesced if it was not: no index stands in it twice."""
    assert parameter.grad is not None
    if parameter.grad.layout is torch.sparse_coo:
        parameter.grad = parameter.grad.coalesce()
    return parameter.grad.values()
