"""The engine's table of parameters: names, optimizer groups, and the blocks that they form."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count
from operator import is_, itemgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from clip_callbacks.core.blocks import EVERYTHING, OUTSIDE, SCOPES, Partition, Scope, Selection, unknown_scope
from clip_callbacks.core.buckets import Buckets
from clip_callbacks.core.reduction import Reduction, is_sharded, shard_of
from clip_callbacks.core.units import Rows, Units

_WRAPPER = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""Parts of names that wrappers of torch insert. They are removed, so that names and patterns are the same with and without them."""

_PARAMETERS_OF = itemgetter("params")
"""A function that returns the parameters of a group, without a frame of Python for each."""

_MADE_OF_SHAPES = ("awaited", "buckets", "is_uniform", "is_wide", "nonempty", "shapes", "unit_reduction", "units")
"""What a table caches that depends on which parameters have entries, and on their shapes."""


class _Holding(NamedTuple):
    """What an optimizer holds of a table's parameters.

    Args:
        held: All that it holds, in order.
        holds_others: True if some of it is not in the table.
        lacking: The parameters of the table that it does not hold.
    """

    held: list[Tensor]
    holds_others: bool
    lacking: list[Tensor]


@dataclass(frozen=True, eq=False)
class TensorTable:
    """The parameters of one optimizer step, each once, and the blocks that they can form.

    It is made once and used at every step, since partitions, indices and buffers are cached on it. A parameter that occurs twice,
    as tied weights do, counts once, under its first name. A parameter of a lazy module counts as empty until its first forward
    pass; then :meth:`renew` drops what was made without its shape.

    Args:
        tensors: The N parameters.
        names: The N names, as ``module.named_parameters()`` gives them.
        groups: The N names of the optimizer's parameter groups.
        reduction: The reduction of norms over ranks that hold parts of the parameters; None if this rank holds them whole.
    """

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    groups: tuple[str, ...]
    reduction: Reduction | None = None
    _partitions: dict[tuple[str, Selection, bool], Partition] = field(default_factory=dict, repr=False)
    _positions: dict[Selection, tuple[int, ...]] = field(default_factory=dict, repr=False)
    _holdings: WeakKeyDictionary[Optimizer, _Holding] = field(default_factory=WeakKeyDictionary, repr=False)
    _indices: dict[str, tuple[list[int], torch.device, Tensor]] = field(default_factory=dict, repr=False)
    _factor_buffers: dict[torch.dtype, tuple[Tensor, list[Tensor]]] = field(default_factory=dict, repr=False)

    @classmethod
    def of_named(cls, named: Iterable[tuple[str, Tensor]]) -> TensorTable:
        """Make a table of ``model.named_parameters()``, all in one group."""
        return cls._of_rows((name, tensor, "pg1") for name, tensor in named)

    @classmethod
    def of_tensors(cls, tensors: Iterable[Tensor]) -> TensorTable:
        """Make a table of ``model.parameters()``, whose names are their positions."""
        return cls.of_named((str(position), tensor) for position, tensor in enumerate(tensors))

    @classmethod
    def nameless(cls, tensors: Iterable[Tensor]) -> TensorTable:
        """Make a table without names, for one use: it can be measured as a whole, but not divided into blocks."""
        # a tied weight counts once; by `id`, since tensors compare entry by entry
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
        """Make a table of an optimizer's parameters, in its order.

        Args:
            optimizer: Any ``torch.optim.Optimizer``.
            named: ``model.named_parameters()``. Other parameters are called by group and position, such as ``pg1.0``.
            reduce: A function from the parameters to their reduction over ranks. The default recognizes DTensors.
        """
        names = {id(tensor): name for name, tensor in named}
        rows = [
            (names.get(id(tensor), f"{name}.{place}"), tensor, name)
            for name, group in zip(group_names(optimizer), optimizer.param_groups, strict=True)
            for place, tensor in enumerate(group["params"])
        ]
        return cls._of_rows(rows, reduce)

    @classmethod
    def of(
        cls, parameters: TensorTable | Optimizer | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]
    ) -> TensorTable:
        """Return a table unchanged, or make one of an optimizer, of named or of bare tensors.

        Raises:
            TypeError: If ``parameters`` holds anything but tensors or pairs of a name and a tensor.
        """
        if isinstance(parameters, TensorTable):
            return parameters
        if isinstance(parameters, Optimizer):
            return cls.of_optimizer(parameters)
        if isinstance(parameters, Mapping):
            return cls.of_named(parameters.items())
        # before anything is iterated over: a tensor would yield its rows, a mapping its keys
        if isinstance(parameters, Tensor):
            return cls.of_tensors([parameters])
        rows: Sequence[Any] = [parameters]
        if isinstance(parameters, Iterable):
            rows = list(parameters)
        named = [row for row in rows if isinstance(row, tuple)]
        tensors = [row for row in rows if isinstance(row, Tensor)]
        if len(rows) not in {len(named), len(tensors)}:  # such as a module, or the layers of an nn.Sequential
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
        first: dict[int, tuple[str, Tensor, str]] = {}  # tied weights occur twice, and their gradient must count once
        for row in rows:
            first.setdefault(id(row[1]), row)
        names, tensors, groups = zip(*first.values(), strict=True) if first else ((), (), ())
        return cls(tensors, tuple(map(without_wrappers, names)), groups, reduce(tensors))

    def __len__(self) -> int:
        """The number of parameters, N."""
        return len(self.tensors)

    @property
    def has_gradients(self) -> bool:
        """Whether any parameter has a gradient; always true where ranks hold parts, since all must take part in collectives."""
        return self.reduction is not None or any(tensor.grad is not None for tensor in self.tensors)

    def partition(self, scope: Scope, selection: Selection = EVERYTHING, *, by_unit: bool = False) -> Partition:
        r"""Divide the parameters, or their output rows, into the blocks of one scope.

        Args:
            scope: ``"global"`` one block; ``"group"`` one for each optimizer parameter group; ``"layer"`` one for the
                parameters that one module owns directly; ``"parameter"`` one for each tensor; ``"unit"`` one for each output row.
            selection: The parameters to divide; others are in no block.
            by_unit: If True, output rows are divided instead of parameters. The scope "unit" always divides output rows.

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
        # `by_unit` is part of the key: one scope has an index over parameters, and another one over units
        key = scope, selection, by_unit
        if key not in self._partitions:
            selection.check(self.names)
            self._partitions[key] = self._divide(scope, [name in selection for name in self.names], by_unit=by_unit)
        return self._partitions[key]

    def positions(self, selection: Selection) -> tuple[int, ...]:
        """Positions in the table of the selected parameters."""
        if selection not in self._positions:
            self._positions[selection] = tuple(position for position, name in enumerate(self.names) if name in selection)
        return self._positions[selection]

    def _divide(self, scope: Scope, inside: Sequence[bool], *, by_unit: bool) -> Partition:
        if scope == "unit":
            return Partition(*self.units.selected(self.names, inside))
        labels = self._labels(scope)
        # a dictionary keeps its order: blocks are numbered by their first parameters, on all ranks alike
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
        """Whether all parameters, and so their gradients, have one dtype on one device."""
        # a parameter may ask for gradients of another dtype than its own (`grad_dtype`, which older releases of torch lack)
        pairs = zip(self.tensors, self.shards, strict=True)
        kinds = {(getattr(tensor, "grad_dtype", tensor.dtype), shard.device) for tensor, shard in pairs}
        return len(kinds) <= 1 and all(dtype is not None for dtype, _ in kinds)  # None: gradients of any dtype

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
        """Shapes of the whole parameters, not of this rank's parts."""
        # the reduction knows what a flat shard of FSDP1 does not show: the shape before it was flattened
        if self.reduction:
            return self.reduction.shapes
        if not self.awaited:
            return tuple(tuple(tensor.shape) for tensor in self.tensors)
        return tuple(map(_shape_of, self.tensors))

    @cached_property
    def units(self) -> Units:
        """The output rows of the parameters."""
        return Units(self.shapes)

    @cached_property
    def unit_reduction(self) -> Reduction | None:
        """The reduction of norms of units over ranks that hold parts of them; None if this rank holds them whole."""
        return self.reduction.of_units(self.units.owners) if self.reduction else None

    def rows(self, position: int, part: Tensor) -> list[Rows]:
        """Divide this rank's part of a parameter, or of its gradient, into output rows.

        Args:
            position: The position of the parameter in the table.
            part: The part, which is not sparse.
        """
        ranks = self.reduction
        first_row, first_entry = (ranks.first_rows[position], ranks.first_entries[position]) if ranks else (0, None)
        return self.units.of_shard(position, part, first_row, first_entry)

    def check_rows(self, position: int, count: int) -> None:
        """Check that a parameter has no more rows than when rows were counted: those of the next one would be taken for its own.

        Raises:
            ValueError: If it has.
        """
        known = self.units.counts[position]
        if count > known:
            raise ValueError(
                f'`scope` must not be "unit" once a parameter has got more rows, got {count} for {self.names[position]}, which had '
                f"{known}. In a plain loop make a new ParameterTable, and start with state=None; in a Trainer give the optimizer a "
                "new Parameter."
            )

    @cached_property
    def shards(self) -> tuple[Tensor, ...]:
        """This rank's part of each parameter; a plain tensor is its own part."""
        return tuple(map(shard_of, self.tensors)) if self.is_sharded else self.tensors

    @cached_property
    def nonempty(self) -> tuple[list[int], list[Tensor]]:
        """The positions of the parameters of which this rank holds entries, and these parameters."""
        if self.reduction is None and not self.awaited:
            return list(range(len(self.tensors))), list(self.tensors)
        places = [position for position, shard in enumerate(self.shards) if count_entries(shard)]
        return places, [self.tensors[position] for position in places]

    @cached_property
    def awaited(self) -> list[Tensor]:
        """The parameters without entries, such as those of lazy modules, which may get some; none where ranks hold parts.

        Each renewal of the table makes another list, by which plans tell whether they were made since.
        """
        # a rank's part that is empty stays so, and a reduction is made of shapes
        return [] if self.reduction else [tensor for tensor in self.tensors if not count_entries(tensor)]

    def renew(self) -> None:
        """Drop all that was made of shapes, if a parameter that had no entries has got some.

        Ask at each step, but only if any are ``awaited``: other models pay nothing.
        """
        if any(map(count_entries, self.awaited)):
            for name in _MADE_OF_SHAPES:
                self.__dict__.pop(name, None)
            self._partitions.clear()

    @cached_property
    def buckets(self) -> Buckets | None:
        """The plan to read small gradients together, if every parameter has a gradient and buckets pay."""
        return Buckets.of([self.shards[position] for position in self.nonempty[0]]) if self.is_uniform else None

    def is_held_by(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer holds all gradients that the table has now, and no parameters beside those of the table.

        Which parameters it lacks is cached until it holds others, since fused optimizers are asked at every step. Whether one of
        them has a gradient may change with each step, as when it is unfrozen.
        """
        count = 0
        for group in optimizer.param_groups:
            count += len(group["params"])
        known = self._holdings.get(optimizer)
        # each by identity, in C: one may have been exchanged for another
        if (
            known is None
            or len(known.held) != count
            or not all(map(is_, chain.from_iterable(map(_PARAMETERS_OF, optimizer.param_groups)), known.held))
        ):
            held = list(chain.from_iterable(map(_PARAMETERS_OF, optimizer.param_groups)))
            ours, theirs = set(map(id, self.tensors)), set(map(id, held))
            lacking = [tensor for tensor in self.tensors if id(tensor) not in theirs]
            known = self._holdings[optimizer] = _Holding(held, not theirs <= ours, lacking)
        if known.lacking and any(tensor.grad is not None for tensor in known.lacking):
            return False
        return not known.holds_others

    def index(self, positions: list[int], device: torch.device, purpose: str = "gradients") -> Tensor:
        """Return positions as an int64 tensor on a device.

        The tensor is cached for each purpose until the positions change, since making one on a GPU is a host sync.
        """
        known = self._indices.get(purpose)
        # compared each time, because a parameter may have no gradient in some steps
        if known is None or known[:2] != (positions, device):
            known = self._indices[purpose] = positions, device, torch.tensor(positions, dtype=torch.int64, device=device)
        return known[2]

    def factor_buffer(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """A buffer for one factor per parameter, CPU tensor of shape ``(N,)``, and its N entries as 0-dim views; made once."""
        if dtype not in self._factor_buffers:
            # it can be written again at the next step, because products on a CPU are finished when the call returns
            buffer = torch.empty(len(self), dtype=dtype, device="cpu")
            self._factor_buffers[dtype] = buffer, list(buffer.unbind())
        return self._factor_buffers[dtype]


def learns(parameter: Tensor) -> bool:
    """Return whether a step may change a parameter: it requires a gradient, or was given one.

    Entries of a frozen parameter are not taken for numbers: they may be quantized codes, packed into any dtype, some of which look
    like NaN.
    """
    return parameter.requires_grad or parameter.grad is not None


def renormalized_weights(module: nn.Module) -> Iterator[Tensor]:
    """Yield the weights of embeddings with a ``max_norm``, which their forward pass renormalizes in place."""
    for each in module.modules():
        # not `each.weight`, which a parametrization would compute anew
        weight = each._parameters.get("weight")
        if weight is not None and getattr(each, "max_norm", None) is not None:
            yield weight


def count_entries(tensor: Tensor) -> int:
    """The number of entries of a tensor; 0 for a parameter of a lazy module that has not run yet."""
    # an uninitialized parameter raises on `numel` and `shape`
    return 0 if is_lazy(tensor) else tensor.numel()


def group_names(optimizer: Optimizer) -> list[str]:
    """Return the names of an optimizer's parameter groups, each once: a second "x" is called "x-2"."""
    # numbered from 1, and named by "name", as Lightning's LearningRateMonitor calls the groups
    names = [str(group.get("name", f"pg{i}")) for i, group in enumerate(optimizer.param_groups, 1)]
    taken, seen, each = set(names), set(), []
    for name in names:
        # past the names of other groups: those stay as they are, since saved states go by them
        own = _free(name, taken) if name in seen else name
        seen.add(name)
        taken.add(own)
        each.append(own)
    return each


def _free(name: str, taken: Collection[str]) -> str:
    """Return the first of "x", "x-2", "x-3", … that is not taken."""
    return next(own for own in chain([name], (f"{name}-{number}" for number in count(2))) if own not in taken)


def _shape_of(tensor: Tensor) -> tuple[int, ...]:
    return (0,) if is_lazy(tensor) else tuple(tensor.shape)


def without_wrappers(name: str) -> str:
    """Return a name without the parts that wrappers of torch insert.

    Args:
        name: The name of a parameter, buffer or module; that of a module ends with a dot.
    """
    return _WRAPPER.sub("", name)
