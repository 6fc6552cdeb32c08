"""Diagnosis of a bad step: the tensors that are not finite, where they came from, and the text that says so.

The walk over all gradients and parameters is made on bad steps only.
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
from clip_callbacks.core.reduction import shard_of
from clip_callbacks.core.spikes import Thresholds
from clip_callbacks.core.tensor_table import TensorTable, learns
from clip_callbacks.core.wording import listed

FaultStage: TypeAlias = Literal["step", "parameter", "buffer", "carried", "loss", "gradient", "unknown"]

MAX_LISTED = 8
"""Largest number of gradients, or of largest norms, that a report names."""


@dataclass(frozen=True)
class NonFiniteTensor:
    """One tensor with non-finite entries.

    Args:
        name: The name of the parameter or buffer, or the place of a tensor in a plain attribute.
        shape: The shape of the whole tensor.
        nan: The number of NaN entries; None if only the norm is known.
        inf: The number of infinite entries; None if only the norm is known.
        norm: The norm, "nan" or "inf", if only that is known.
        ranks: The ranks with non-finite entries, if others have none.
    """

    name: str
    shape: tuple[int, ...]
    nan: int | None
    inf: int | None
    norm: str | None = None
    ranks: tuple[int, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return what is known, for a line of JSON."""
        # counts of 0 stay: no NaN beside some inf is a fact
        return {key: value for key, value in asdict(self).items() if value not in (None, ())}

    def __str__(self) -> str:
        """Name, shape, and counts or the norm, in one line."""
        if self.norm:
            return f"{self.name} {list(self.shape)}: norm {self.norm}"
        counts = [f"{count} {kind}" for count, kind in ((self.nan, "NaN"), (self.inf, "inf")) if count]
        where = f" on rank {_enumerated(self.ranks)}" if self.ranks else ""
        return f"{self.name} {list(self.shape)}: {' and '.join(counts)}{where}".lstrip()


@dataclass(frozen=True)
class Diagnosis:
    """The non-finite tensors of a bad step, and where they came from.

    The names of the fields are keys of the journal.

    Args:
        gradients: Parameters with non-finite gradients, in module order.
        parameters: Trained parameters that are non-finite themselves, in module order.
        before: The nearest parameter with a finite gradient before the first non-finite one, if any.
        after: The nearest parameter with a finite gradient after it, if any.
        count: The number of parameters with a gradient.
        loss_is_finite: True if all losses of the window were finite; None if no loss was seen.
        after_good_step: True if the step before was taken with finite gradients.
        traced: The first module with a non-finite output, if the batch was run again to find it.
        loss_ranks: The ranks with a non-finite loss, if there are several ranks.
        buffers: Buffers that were non-finite before the step.
        carried: Tensors in plain attributes of modules that are non-finite now, which a skip does not restore.
        carried_before: Those of them that were non-finite before the step.
        frozen: Frozen parameters that look non-finite, if no step has been good so far. They may be packed codes instead.
    """

    gradients: tuple[NonFiniteTensor, ...]
    parameters: tuple[NonFiniteTensor, ...]
    before: str | None
    after: str | None
    count: int
    loss_is_finite: bool | None
    after_good_step: bool = False
    traced: str | None = None
    loss_ranks: tuple[int, ...] = ()
    buffers: tuple[NonFiniteTensor, ...] = ()
    carried: tuple[NonFiniteTensor, ...] = ()
    carried_before: tuple[NonFiniteTensor, ...] = ()
    frozen: tuple[NonFiniteTensor, ...] = ()

    @property
    def source_ranks(self) -> tuple[int, ...]:
        """The ranks where the step became bad: those with a non-finite loss, or else the only ones with non-finite gradients.

        Empty if there is one rank, or if all ranks are alike.
        """
        return self.loss_ranks or tuple(sorted({rank for tensor in self.gradients for rank in tensor.ranks}))

    @property
    def stage(self) -> FaultStage:
        """The stage where the step became bad: before this step, in the forward pass (the loss), or in the backward pass."""
        # in the order of time: what was bad before the forward pass explains a bad loss, and that explains bad gradients
        if self.parameters:
            # the gradients of the step before were finite, and so were the parameters that they came from: that step made these
            return "step" if self.after_good_step else "parameter"
        if self.buffers:
            return "buffer"
        if self.carried_before:
            return "carried"
        if self.loss_is_finite is None:
            return "unknown"
        if self.loss_is_finite:
            return "gradient"
        return "loss"

    def facts(self) -> dict[str, Any]:
        """Return the diagnosis for a line of the journal, whose keys are fixed."""
        kinds = ("gradients", "parameters", "buffers", "carried", "carried_before", "frozen")
        tensors = {kind: [*map(NonFiniteTensor.facts, getattr(self, kind))] for kind in kinds}
        facts = {"stage": self.stage, "message": _STAGES[self.stage]} | asdict(self) | tensors
        # the key that journals have had since 0.1.0
        return facts | {"guilty_ranks": list(self.source_ranks)}

    def describe(self) -> str:
        """Return the text for users, of at most nineteen lines: the stage, the non-finite tensors, and their finite neighbours."""
        lines = [f"Stage: {_STAGES[self.stage]}"]
        if self.source_ranks:
            lines += [f"Where it began: rank {_enumerated(self.source_ranks)}"]
        if self.traced:
            lines += [f"First non-finite output: {self.traced}"]
        if self.parameters:
            lines += [f"Non-finite parameters: {_listed(self.parameters, 3)}"]
        if self.buffers:
            lines += [f"Non-finite buffers before this step: {_listed(self.buffers, 3)}"]
        if self.carried:
            lines += [
                f"Non-finite in plain attributes or frozen parameters, which a skip does not restore: {_listed(self.carried, 3)}"
            ]
        if self.carried_before:
            lines += [f"  already non-finite before this step: {_listed(self.carried_before, 3)}"]
        if self.frozen:
            lines += [f"Frozen parameters that look non-finite, as packed codes may: {_listed([it.name for it in self.frozen], 3)}"]
        lines += [f"Non-finite gradients in {len(self.gradients)} of {self.count} parameters:"]
        lines += [f"  {tensor}" for tensor in self.gradients[:MAX_LISTED]]
        if len(self.gradients) > MAX_LISTED:
            lines += [f"  and {len(self.gradients) - MAX_LISTED} more"]
        neighbours = [f"{name} ({side})" for name, side in ((self.before, "before"), (self.after, "after")) if name]
        if neighbours:
            lines += [f"Nearest finite gradients: {', '.join(neighbours)}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Spike:
    """A finite step whose total norm, or the loss of whose window, is above a threshold of the guard.

    Args:
        total_norm: The norm of all gradients.
        limit: The threshold of the norm; None if there is none, or none yet.
        loss: The loss of the window; None without a threshold of the loss, or if it is not known.
        loss_limit: The threshold of the loss; None if there is none, or none yet.
        largest: The parameters with the largest norms, each with its norm, largest first.
    """

    total_norm: float
    limit: float | None
    loss: float | None
    loss_limit: float | None
    largest: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, names: Sequence[str], norms: Tensor, total: Tensor, thresholds: Thresholds) -> Spike:
        """Select the largest norms of all parameters.

        Args:
            names: The names of the N parameters.
            norms: The norms of their gradients, shape ``(N,)``.
            total: The norm of all gradients.
            thresholds: The thresholds of the step.
        """
        places = norms.topk(min(MAX_LISTED, len(norms))).indices.tolist()
        numbers = norms.tolist()
        limit = loss = loss_limit = None
        if thresholds.norm is not None:
            limit = _finite(thresholds.norm.limit)
        if thresholds.loss is not None:
            loss, loss_limit = _finite(thresholds.loss.value), _finite(thresholds.loss.limit)
        return cls(float(total), limit, loss, loss_limit, tuple((names[place], numbers[place]) for place in places))

    @property
    def exceeded(self) -> list[str]:
        """The names of the guard's arguments whose threshold was exceeded."""
        pairs = {"skip_above": (self.total_norm, self.limit), "loss_above": (self.loss, self.loss_limit)}
        return [name for name, (value, limit) in pairs.items() if value is not None and limit is not None and value > limit]

    def facts(self) -> dict[str, Any]:
        """Return the spike for a line of the journal, whose keys are fixed; missing thresholds are left out."""
        numbers = {"total_norm": self.total_norm, "limit": self.limit, "loss": self.loss, "loss_limit": self.loss_limit}
        known = {key: number for key, number in numbers.items() if number is not None}
        largest = [{"name": name, "norm": norm} for name, norm in self.largest]
        return {"stage": "spike", "message": str(self), **known, "largest": largest}

    def __str__(self) -> str:
        """The numbers and the thresholds that they exceed, in one sentence."""
        sentences = {
            "skip_above": f"total_norm {self.total_norm:.4g} is above skip_above, now {self.limit or 0.0:.4g}",
            "loss_above": f"loss {self.loss or 0.0:.4g} is above loss_above, now {self.loss_limit or 0.0:.4g}",
        }
        return " and ".join(sentences[name] for name in self.exceeded)

    def describe(self) -> str:
        """Return the parameters with the largest norms, for users."""
        return "Largest gradients: " + ", ".join(f"{name} {norm:.4g}" for name, norm in self.largest[:4])


def _finite(value: Tensor | float) -> float | None:
    # inf in the warm-up of an adaptive limit, or NaN of a loss that is not known: JSON has no numbers for them
    number = float(value)
    if math.isfinite(number):
        return number
    return None


_STAGES: dict[FaultStage, str] = {
    "step": "the optimizer step before made parameters non-finite, from finite gradients (its learning rate, the optimizer, or "
    "code that wrote to them).",
    "parameter": "parameters were non-finite before this step (the initial weights, a checkpoint, or an earlier bad step).",
    "buffer": "buffers were non-finite before this step (an earlier bad batch, a checkpoint, or code that wrote to them).",
    "carried": "a tensor that a module carries from batch to batch was non-finite before this step. Reset it after a bad batch, or "
    "register it as a buffer, which a skip restores.",
    "loss": "the loss is non-finite (forward pass: a division by zero, log of zero, overflow, or the data).",
    "gradient": "the loss is finite, its gradients are not (backward pass: exploding gradients, or an infinite derivative).",
    "unknown": "gradients are non-finite; no non-finite loss was seen here (another rank may have had one).",
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
) -> Diagnosis:
    """Find the non-finite gradients, parameters and losses of a bad step.

    Args:
        table: The parameters of the optimizer about to step, with their gradients.
        losses: The losses of the window, 0-dim.
        after_good_step: True if the step before was taken with finite gradients.
        norms: Norms of the gradients on the host, shape ``(N,)``, for a step that is over, whose gradients are gone.
        buffers: Names of buffers that should be finite, with their values before the step's first forward pass.
        frozen: Names and values of frozen parameters, if no step has been good so far. Other frozen parameters are not examined.
    """
    if norms is None:
        # This rank's shards, without communication: what ranks have found is exchanged once, at the end (`merge_diagnoses`).
        held = [
            (name, shape, shard_of(tensor.grad))
            for name, shape, tensor in zip(table.names, table.shapes, table.tensors, strict=True)
            if tensor.grad is not None
        ]
        names, gradients = [name for name, _, _ in held], _nonfinite(held)
    else:
        # the gradients have been freed or written over since; their norms are what is left
        names, gradients = list(table.names), _nonfinite_by_norm(table, norms)
    return Diagnosis(
        gradients,
        _nonfinite(
            (name, shape, shard_of(tensor))
            for name, shape, tensor in zip(table.names, table.shapes, table.tensors, strict=True)
            # a frozen parameter may hold packed codes, some of which look like NaN
            if learns(tensor)
        ),
        *finite_neighbours(names, gradients),
        count=len(names),
        # None and not True without a loss: nobody has seen that the forward pass was good
        loss_is_finite=all_finite(losses) if losses else None,
        after_good_step=after_good_step,
        buffers=nonfinite_among(buffers),
        frozen=nonfinite_among(frozen),
    )


def nonfinite_among(named: Iterable[tuple[str, Tensor]]) -> tuple[NonFiniteTensor, ...]:
    """Return the non-finite ones of some tensors, or of this rank's shards of them. Tensors without arithmetic are left out."""
    # the shape of a lazy tensor raises an error, and it has no entries yet
    return _nonfinite((name, tuple(tensor.shape), shard_of(tensor)) for name, tensor in named if not is_lazy(tensor))


def finite_neighbours(names: Sequence[str], tensors: Sequence[NonFiniteTensor]) -> tuple[str | None, str | None]:
    """The nearest finite names before and after the first non-finite tensor."""
    nonfinite = {tensor.name for tensor in tensors}
    first = next((i for i, name in enumerate(names) if name in nonfinite), 0)
    finite = [i for i, name in enumerate(names) if name not in nonfinite]
    return next((names[i] for i in reversed(finite) if i < first), None), next((names[i] for i in finite if i > first), None)


def _entries(tensor: Tensor) -> Tensor:
    if tensor.layout is torch.sparse_coo:
        # torch refuses the values of an uncoalesced tensor; a copy, because a diagnosis changes no gradient
        tensor = tensor.coalesce()
    if tensor.layout is torch.strided:
        return tensor
    return tensor.values()


def _nonfinite(named: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> tuple[NonFiniteTensor, ...]:
    """Return the non-finite ones of tensors given by name, whole shape, and this rank's part."""
    found = []
    for name, shape, part in named:
        # isfinite raises on 8-bit floats and on some tensor subclasses
        if not has_arithmetic(part):
            continue
        entries = _entries(part.detach())
        if not bool(torch.isfinite(entries).all()):
            # counted in the bad ones only: that reads each twice more
            found.append(replace(count_nonfinite(entries, name), shape=shape))
    return tuple(found)


def _nonfinite_by_norm(table: TensorTable, norms: Tensor) -> tuple[NonFiniteTensor, ...]:
    rows = zip(table.names, table.shapes, norms.tolist(), strict=True)
    return tuple(NonFiniteTensor(name, shape, None, None, str(norm)) for name, shape, norm in rows if not math.isfinite(norm))


def count_nonfinite(tensor: Tensor, name: str = "") -> NonFiniteTensor:
    """Count the NaN and infinite entries of a tensor, and the real and imaginary parts of complex entries."""
    real = tensor
    if tensor.is_complex():
        real = torch.view_as_real(tensor)
    return NonFiniteTensor(name, tuple(tensor.shape), int(real.isnan().sum()), int(real.isinf().sum()))


def _enumerated(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _listed(tensors: Sequence[NonFiniteTensor | str], most: int) -> str:
    return listed(tensors, most, separator="; ")
