"""What a look at every gradient, parameter and loss of a bad step finds: the report that names the offenders.

The walk over the parameters is made on bad steps only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from clip_callbacks.core.nonfinite import all_finite, has_arithmetic
from clip_callbacks.core.reduction import gathered, shard_of
from clip_callbacks.core.tensor_table import TensorTable, learns

FaultStage: TypeAlias = Literal["step", "parameter", "buffer", "carried", "loss", "gradient", "unknown"]

LISTED = 8
"""How many offenders a report names."""


@dataclass(frozen=True)
class Offender:
    """One tensor with non-finite entries.

    Args:
        name: Of the parameter, of the buffer, or of what holds the tensor.
        shape: Of the tensor.
        nan: Count of NaN entries; None if only the norm is known.
        inf: Count of infinite entries; None if only the norm is known.
        norm: The norm, "nan" or "inf", if that is all that is known.
        ranks: Which ranks hold them, if others do not.
    """

    name: str
    shape: tuple[int, ...]
    nan: int | None
    inf: int | None
    norm: str | None = None
    ranks: tuple[int, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What is known, for a line of JSON."""
        return {key: value for key, value in asdict(self).items() if value not in (None, ())}

    def __str__(self) -> str:
        """One line: name, shape, and counts or the norm."""
        if self.norm:
            return f"{self.name} {list(self.shape)}: norm {self.norm}"
        counts = [f"{count} {kind}" for count, kind in ((self.nan, "NaN"), (self.inf, "inf")) if count]
        where = f" on rank {_enumerated(self.ranks)}" if self.ranks else ""
        return f"{self.name} {list(self.shape)}: {' and '.join(counts)}{where}".lstrip()


@dataclass(frozen=True)
class Findings:
    """What a look at every gradient and parameter found on a bad step.

    Args:
        gradients: Parameters with non-finite gradients, in module order.
        parameters: Parameters that are non-finite themselves, in module order; none that is frozen.
        before: The nearest parameter before the first offender with a finite gradient, if any.
        after: The nearest such parameter after it.
        count: How many parameters have a gradient.
        loss_is_finite: Whether every loss of the window was; None if no loss was seen.
        after_good_step: Whether the step before was taken with finite gradients.
        traced: The first module with a non-finite output, if the batch was run again to find it.
        loss_ranks: Of several ranks, those with a loss that is not finite.
        buffers: Buffers that were non-finite before the step.
        carried: Tensors in plain attributes of modules that are non-finite now: a skip does not put them back.
        carried_before: Those of them that were so before the step.
        frozen: Frozen parameters that look non-finite, if no step has been good so far: they may as well be packed codes.
    """

    gradients: tuple[Offender, ...]
    parameters: tuple[Offender, ...]
    before: str | None
    after: str | None
    count: int
    loss_is_finite: bool | None
    after_good_step: bool = False
    traced: str | None = None
    loss_ranks: tuple[int, ...] = ()
    buffers: tuple[Offender, ...] = ()
    carried: tuple[Offender, ...] = ()
    carried_before: tuple[Offender, ...] = ()
    frozen: tuple[Offender, ...] = ()

    @property
    def guilty_ranks(self) -> tuple[int, ...]:
        """Where it began, of several ranks, if that is known: those with a bad loss, or else the only ones with bad gradients."""
        return self.loss_ranks or tuple(sorted({rank for offender in self.gradients for rank in offender.ranks}))

    @property
    def stage(self) -> FaultStage:
        """Where it began: in the step before, in what was non-finite before that, in the loss (forward), or in backward."""
        if self.parameters:
            return "step" if self.after_good_step else "parameter"
        if self.buffers:
            return "buffer"
        if self.carried_before:
            return "carried"
        if self.loss_is_finite is None:
            return "unknown"
        return "gradient" if self.loss_is_finite else "loss"

    def facts(self) -> dict[str, Any]:
        """The same as :meth:`describe`, for a line of JSON."""
        kinds = ("gradients", "parameters", "buffers", "carried", "carried_before", "frozen")
        offenders = {kind: [*map(Offender.facts, getattr(self, kind))] for kind in kinds}
        facts = {"stage": self.stage, "message": _STAGES[self.stage]} | asdict(self) | offenders
        return facts | {"guilty_ranks": list(self.guilty_ranks)}

    def describe(self) -> str:
        """Text of at most nineteen lines: the stage and what to look at, the offenders, their finite neighbours."""
        lines = [f"Stage: {_STAGES[self.stage]}"]
        if self.guilty_ranks:
            lines += [f"Where it began: rank {_enumerated(self.guilty_ranks)}"]
        if self.traced:
            lines += [f"First non-finite output: {self.traced}"]
        if self.parameters:
            lines += [f"Non-finite parameters: {_listed(self.parameters, 3)}"]
        if self.buffers:
            lines += [f"Non-finite buffers before this step: {_listed(self.buffers, 3)}"]
        if self.carried:
            lines += [
                f"Not finite in plain attributes or frozen parameters, which a skip does not put back: {_listed(self.carried, 3)}"
            ]
        if self.carried_before:
            lines += [f"  so before this step already: {_listed(self.carried_before, 3)}"]
        if self.frozen:
            lines += [f"Frozen and not finite, as packed codes may be: {_listed([it.name for it in self.frozen], 3)}"]
        lines += [f"Non-finite gradients in {len(self.gradients)} of {self.count} parameters:"]
        lines += [f"  {offender}" for offender in self.gradients[:LISTED]]
        if len(self.gradients) > LISTED:
            lines += [f"  and {len(self.gradients) - LISTED} more"]
        neighbours = [f"{name} ({side})" for name, side in ((self.before, "before"), (self.after, "after")) if name]
        if neighbours:
            lines += [f"Nearest finite gradients: {', '.join(neighbours)}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Spike:
    """A finite step that is skipped for its norm.

    Args:
        total_norm: Of all gradients.
        limit: The norm above which a step is skipped.
        largest: The parameters with the largest norms, and these.
    """

    total_norm: float
    limit: float
    largest: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, names: Sequence[str], norms: Tensor, total: Tensor, limit: Tensor) -> Spike:
        """From the norms of all parameters."""
        places = norms.topk(min(LISTED, len(norms))).indices.tolist()
        numbers = norms.tolist()
        return cls(float(total), float(limit), tuple((names[place], numbers[place]) for place in places))

    def facts(self) -> dict[str, Any]:
        """The same as :meth:`describe`, for a line of JSON."""
        largest = [{"name": name, "norm": norm} for name, norm in self.largest]
        return {"stage": "spike", "message": str(self), "total_norm": self.total_norm, "limit": self.limit, "largest": largest}

    def __str__(self) -> str:
        """One sentence."""
        return f"total_norm {self.total_norm:.4g} is above skip_above, now {self.limit:.4g}"

    def describe(self) -> str:
        """The parameters with the largest norms."""
        return "Largest gradients: " + ", ".join(f"{name} {norm:.4g}" for name, norm in self.largest[:4])


_STAGES: dict[FaultStage, str] = {
    "step": "the optimizer step before made parameters non-finite, from finite gradients (its learning rate, the optimizer, or "
    "code that wrote to them).",
    "parameter": "parameters were non-finite before this step (the initial weights, a checkpoint, or an earlier bad step).",
    "buffer": "buffers were non-finite before this step (an earlier bad batch, a checkpoint, or code that wrote to them).",
    "carried": "a tensor that a module carries from batch to batch was non-finite before this step; reset it where the batch was "
    "bad, or register it as a buffer, which a skip puts back.",
    "loss": "the loss is non-finite (forward pass: a division by zero, log of zero, overflow, or the data).",
    "gradient": "the loss is finite, its gradients are not (backward pass: an explosion, or a derivative that is infinite).",
    "unknown": "gradients are not finite; a loss that is not was not seen here (it may be another rank's).",
}


@torch.no_grad()
def examine(
    table: TensorTable,
    losses: Sequence[Tensor] = (),
    *,
    after_good_step: bool = False,
    norms: Tensor | None = None,
    buffers: Iterable[tuple[str, Tensor]] = (),
    frozen: Iterable[tuple[str, Tensor]] = (),
) -> Findings:
    """Look at every gradient, parameter and loss of a bad step; at parameters that are frozen only where ``frozen`` names them.

    Args:
        table: The parameters of the optimizer about to step, with their gradients.
        losses: The losses of the window, 0-dim.
        after_good_step: Whether the step before was taken with finite gradients.
        norms: Of the gradients of a step that is over, shape ``(N,)`` on the host: nothing else is left of them.
        buffers: Names and values, as they were before the step's first forward pass, of those buffers that are to be finite.
        frozen: Names of frozen parameters and these, where no step has been good so far.
    """
    if norms is None:
        held = [
            (name, shape, shard_of(tensor.grad))
            for name, shape, tensor in zip(table.names, table.shapes, table.tensors, strict=True)
            if tensor.grad is not None
        ]
        names, gradients = [name for name, _, _ in held], _offenders(held)
    else:
        names, gradients = list(table.names), _offenders_by_norm(table, norms)
    return Findings(
        gradients,
        _offenders(
            (name, shape, shard_of(tensor))
            for name, shape, tensor in zip(table.names, table.shapes, table.tensors, strict=True)
            if learns(tensor)
        ),
        *_neighbours(names, gradients),
        count=len(names),
        loss_is_finite=all_finite(losses) if losses else None,
        after_good_step=after_good_step,
        buffers=offenders_among(buffers),
        frozen=offenders_among(frozen),
    )


def offenders_among(named: Iterable[tuple[str, Tensor]]) -> tuple[Offender, ...]:
    """Those of some tensors that are not finite, this rank's shards of sharded ones; what cannot be judged is passed over."""
    return _offenders((name, tuple(tensor.shape), shard_of(tensor)) for name, tensor in named if not is_lazy(tensor))


def examine_on_all_ranks(table: TensorTable, findings: Findings) -> Findings:
    """What all ranks have found, the same on each: a collective, for steps that are bad on all of them.

    Args:
        table: The parameters of the optimizer about to step.
        findings: What this rank has found.
    """
    counts = table.reduction.counts.tolist() if table.reduction else [1.0] * len(table)
    rows = list(zip(table.names, table.tensors, table.shards, counts, strict=True))
    each = gathered(
        _Share(
            findings,
            counted={name for name, _, _, count in rows if count},
            with_gradient={name for name, tensor, _, _ in rows if tensor.grad is not None},
            with_entries={name for name, _, shard, _ in rows if shard.numel()},
        )
    )
    is_divided = table.reduction is not None
    gradients = _joined(each, [share.findings.gradients for share in each], table.names, is_divided=is_divided)
    names = [name for name in table.names if any(name in share.with_gradient for share in each)]
    before, after = _neighbours(names, gradients)
    losses = [share.findings.loss_is_finite for share in each]
    return replace(
        findings,
        gradients=gradients,
        parameters=_joined(each, [share.findings.parameters for share in each], table.names, is_divided=is_divided),
        before=before,
        after=after,
        count=len(names),
        loss_is_finite=None if set(losses) == {None} else False not in losses,
        traced=next((share.findings.traced for share in each if share.findings.traced), None),
        loss_ranks=tuple(rank for rank, is_finite in enumerate(losses) if is_finite is False),
        buffers=_joined_copies([share.findings.buffers for share in each]),
        carried=_joined_copies([share.findings.carried for share in each]),
        carried_before=_joined_copies([share.findings.carried_before for share in each]),
        frozen=_joined_copies([share.findings.frozen for share in each]),
    )


@dataclass(frozen=True)
class _Share:
    """What one rank has found, and the names of the parameters whose part there counts, has a gradient, has any entry."""

    findings: Findings
    counted: set[str]
    with_gradient: set[str]
    with_entries: set[str]


def _joined(
    each: Sequence[_Share], found: Sequence[Sequence[Offender]], names: Sequence[str], *, is_divided: bool
) -> tuple[Offender, ...]:
    """Offenders of all ranks, each once: parts of one tensor are summed up, copies are not."""
    by_name, joined = _by_name(found), []
    for name in names:
        if guilty := by_name.get(name):
            parts = [offender for rank, offender in guilty.items() if name in each[rank].counted] if is_divided else []
            parts = parts or [next(iter(guilty.values()))]
            others = [rank for rank, share in enumerate(each) if name in share.with_entries & share.with_gradient]
            nan, inf = sum(part.nan or 0 for part in parts), sum(part.inf or 0 for part in parts)
            ranks = tuple(guilty) if set(others) - set(guilty) else ()
            joined.append(replace(parts[0], nan=nan, inf=inf, ranks=ranks))
    return tuple(joined)


def _joined_copies(found: Sequence[Sequence[Offender]]) -> tuple[Offender, ...]:
    """Offenders of all ranks, each once, of tensors of which every rank has one of its own."""
    joined = []
    for guilty in _by_name(found).values():
        ranks = tuple(guilty) if len(guilty) < len(found) else ()
        joined.append(replace(next(iter(guilty.values())), ranks=ranks))
    return tuple(joined)


def _by_name(found: Sequence[Sequence[Offender]]) -> dict[str, dict[int, Offender]]:
    """What each rank has found, by names and by ranks."""
    by_name: dict[str, dict[int, Offender]] = {}
    for rank, offenders in enumerate(found):
        for offender in offenders:
            by_name.setdefault(offender.name, {})[rank] = offender
    return by_name


def _neighbours(names: Sequence[str], offenders: Sequence[Offender]) -> tuple[str | None, str | None]:
    """The nearest names before and after the first offender that are none."""
    guilty = {offender.name for offender in offenders}
    first = next((i for i, name in enumerate(names) if name in guilty), 0)
    finite = [i for i, name in enumerate(names) if name not in guilty]
    return next((names[i] for i in reversed(finite) if i < first), None), next((names[i] for i in finite if i > first), None)


def _entries(tensor: Tensor) -> Tensor:
    if tensor.layout is torch.sparse_coo:
        return tensor.coalesce().values()
    return tensor if tensor.layout is torch.strided else tensor.values()


def _offenders(named: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> tuple[Offender, ...]:
    """Of names, shapes, and this rank's parts of tensors."""
    found = []
    for name, shape, part in named:
        if not has_arithmetic(part):
            continue
        entries = _entries(part.detach())
        if not bool(torch.isfinite(entries).all()):
            found.append(replace(count_nonfinite(entries, name), shape=shape))
    return tuple(found)


def _offenders_by_norm(table: TensorTable, norms: Tensor) -> tuple[Offender, ...]:
    rows = zip(table.names, table.shapes, norms.tolist(), strict=True)
    return tuple(Offender(name, shape, None, None, str(norm)) for name, shape, norm in rows if not math.isfinite(norm))


def count_nonfinite(tensor: Tensor, name: str = "") -> Offender:
    """Count a tensor's NaN and infinite entries; of complex ones, the parts."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return Offender(name, tuple(tensor.shape), int(real.isnan().sum()), int(real.isinf().sum()))


def _enumerated(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _listed(offenders: Sequence[Offender | str], most: int) -> str:
    rest = f" and {len(offenders) - most} more" if len(offenders) > most else ""
    return "; ".join(str(offender) for offender in offenders[:most]) + rest
