"""One diagnosis of a bad step from those of all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from clip_callbacks.core.diagnosis import Diagnosis, NonFiniteTensor, finite_neighbours
from clip_callbacks.core.reduction import gathered
from clip_callbacks.core.tensor_table import TensorTable


def merge_diagnoses(table: TensorTable, diagnosis: Diagnosis) -> Diagnosis:
    """Merge the diagnoses of all ranks into one, equal on all. This is a collective, for steps that are bad on every rank.

    Args:
        table: The parameters of the optimizer about to step.
        diagnosis: The diagnosis of this rank.
    """
    # without a reduction every rank holds whole parameters, and any copy stands for the others
    counts = [1.0] * len(table)
    if table.reduction:
        counts = table.reduction.counts.tolist()
    rows = list(zip(table.names, table.tensors, table.shards, counts, strict=True))
    # One exchange of objects for everything: lists differ in length from rank to rank, and a bad step may take its time.
    each = gathered(
        _RankDiagnosis(
            diagnosis,
            counted={name for name, _, _, count in rows if count},
            with_gradient={name for name, tensor, _, _ in rows if tensor.grad is not None},
            with_entries={name for name, _, shard, _ in rows if shard.numel()},
        )
    )
    is_divided = table.reduction is not None
    gradients = _merged(each, [share.diagnosis.gradients for share in each], table.names, is_divided=is_divided)
    # in the order of the table, which is the same on all ranks; a gradient may exist on some of them only
    names = [name for name in table.names if any(name in share.with_gradient for share in each)]
    before, after = finite_neighbours(names, gradients)
    losses = [share.diagnosis.loss_is_finite for share in each]
    return replace(
        diagnosis,
        gradients=gradients,
        parameters=_merged(each, [share.diagnosis.parameters for share in each], table.names, is_divided=is_divided),
        before=before,
        after=after,
        count=len(names),
        # one bad loss is enough; a rank that saw none has no say
        loss_is_finite=None if set(losses) == {None} else False not in losses,
        traced=next((share.diagnosis.traced for share in each if share.diagnosis.traced), None),
        loss_ranks=tuple(rank for rank, is_finite in enumerate(losses) if is_finite is False),
        buffers=_merged_copies([share.diagnosis.buffers for share in each]),
        carried=_merged_copies([share.diagnosis.carried for share in each]),
        carried_before=_merged_copies([share.diagnosis.carried_before for share in each]),
        frozen=_merged_copies([share.diagnosis.frozen for share in each]),
    )


@dataclass(frozen=True)
class _RankDiagnosis:
    """The diagnosis of one rank, and the names of the parameters whose part there counts, has a gradient, or has any entry."""

    diagnosis: Diagnosis
    counted: set[str]
    with_gradient: set[str]
    with_entries: set[str]


def _merged(
    each: Sequence[_RankDiagnosis], found: Sequence[Sequence[NonFiniteTensor]], names: Sequence[str], *, is_divided: bool
) -> tuple[NonFiniteTensor, ...]:
    """Merge the non-finite tensors of all ranks, each once: counts of parts are added up, those of copies are not."""
    by_name, merged = _by_name(found), []
    for name in names:
        if by_rank := by_name.get(name):
            # where ranks hold parts, several may hold copies of one: entries of a copy must not be counted twice
            parts = [tensor for rank, tensor in by_rank.items() if is_divided and name in each[rank].counted]
            # a copy that does not count may be the only bad one, and then stands for the tensor
            parts = parts or [next(iter(by_rank.values()))]
            # a rank with an empty shard, or without a gradient, is no evidence that the tensor is finite anywhere
            others = [rank for rank, share in enumerate(each) if name in share.with_entries & share.with_gradient]
            nan, inf = sum(part.nan or 0 for part in parts), sum(part.inf or 0 for part in parts)
            merged.append(replace(parts[0], nan=nan, inf=inf, ranks=_ranks_at_fault(by_rank, others)))
    return tuple(merged)


def _merged_copies(found: Sequence[Sequence[NonFiniteTensor]]) -> tuple[NonFiniteTensor, ...]:
    """Merge non-finite tensors of which every rank has its own, each once."""
    return tuple(
        replace(next(iter(by_rank.values())), ranks=_ranks_at_fault(by_rank, range(len(found))))
        for by_rank in _by_name(found).values()
    )


def _ranks_at_fault(bad: Iterable[int], asked: Iterable[int]) -> tuple[int, ...]:
    """Return the ranks where a tensor is bad. They are named only if they differ: if all are bad, none of them is the source."""
    bad = tuple(bad)
    if set(asked) <= set(bad):
        return ()
    return bad


def _by_name(found: Sequence[Sequence[NonFiniteTensor]]) -> dict[str, dict[int, NonFiniteTensor]]:
    """Non-finite tensors by name, then by rank."""
    by_name: dict[str, dict[int, NonFiniteTensor]] = {}
    for rank, tensors in enumerate(found):
        for tensor in tensors:
            by_name.setdefault(tensor.name, {})[rank] = tensor
    return by_name
