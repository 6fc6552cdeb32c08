"""The public table of parameters, made once for a training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.core.tensor_table import TensorTable

Parameters: TypeAlias = Optimizer | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]
"""Parameters of one step: an optimizer, ``model.named_parameters()``, a mapping, tensors, or one tensor."""


class ParameterTable:
    """The parameters of one optimizer step, with names, made once and passed to :func:`~clip_callbacks.clip_step` at every step.

    ``clip_step`` also accepts ``parameters`` itself, and then makes a new table at every step. A parameter that occurs twice,
    as tied weights do, counts once, under its first name. One without entries, as those of lazy modules before their first forward
    pass, takes part as soon as it has some.

    Args:
        parameters: An optimizer, ``model.named_parameters()``, a mapping from names to tensors, tensors, or one tensor. Norms are
            added up in this order.
        named: ``model.named_parameters()``, if ``parameters`` is an optimizer, which stores no names. Without them its parameters
            are called by group and position: ``pg1.0``, ``pg1.1``.

    Attributes:
        names: The names of the parameters, in order. Names of bare tensors are their positions: "0", "1".
        groups: The name of each parameter's optimizer group; "pg1" if there is no optimizer. Of groups with one name, the second
            is called "name-2".

    Raises:
        TypeError: If ``parameters`` holds anything but tensors or pairs of a name and a tensor.
        ValueError: If ``named`` is given although ``parameters`` is not an optimizer.

    Example::

        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> table = ParameterTable(optimizer, model.named_parameters())
        >>> len(table), table.names
        (2, ('weight', 'bias'))
    """

    __slots__ = ("__weakref__", "_table")

    def __init__(self, parameters: Parameters, named: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Make the table: read the names once."""
        # an iterator does not tell whether it is empty, unless it is consumed
        pairs = list(named)
        if not pairs:
            self._table = TensorTable.of(parameters)
        elif isinstance(parameters, Optimizer):
            self._table = TensorTable.of_optimizer(parameters, pairs)
        else:
            raise ValueError(
                f"`named` must be left out unless `parameters` is an optimizer, got {type(parameters).__name__}. Pass the named "
                "parameters as `parameters`."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters, in order."""
        return self._table.names

    @property
    def groups(self) -> tuple[str, ...]:
        """The name of each parameter's optimizer group."""
        return self._table.groups

    def __len__(self) -> int:
        """The number of parameters."""
        return len(self._table)

    def __repr__(self) -> str:
        """The number of parameters and of groups."""
        return f"ParameterTable({len(self)} parameters in {len(set(self.groups))} groups)"


def table_of(parameters: ParameterTable | TensorTable | Parameters) -> TensorTable:
    """Return the engine's table of parameters: that of a :class:`ParameterTable`, or a new one."""
    # the same table at each step, since plans, partitions and buffers are cached on it
    if isinstance(parameters, ParameterTable):
        return parameters._table
    return TensorTable.of(parameters)
