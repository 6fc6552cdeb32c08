"""A second, slow read of the gradients whose norm is not reliable in the dtype in which it was accumulated.

Squares of finite entries may overflow, and those of small entries lose digits to underflow. Norms near either end of the range are
measured again in float64, of entries scaled by the largest of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from clip_callbacks.core.few_values import extremes
from clip_callbacks.core.gradients import Gradients
from clip_callbacks.core.tensor_norms import (
    norms_in_float64,
    row_norms_in_float64,
    smallest_reliable_norm,
    tensor_norms,
    total_norm,
)

Unreliable: TypeAlias = list[int] | Tensor
"""Unreliable norms: places among the gradients that are there, or, for units, a bool for each."""


def remeasure(
    gradients: Gradients, shard_norms: Tensor, norms: Tensor, total: Tensor, norm_type: float, *, local: bool, by_unit: bool
) -> tuple[Tensor, Tensor]:
    """Measure unreliable norms again, and return all norms and the total norm.

    Where ranks hold parts of the tensors, the decision uses globally reduced values only, so that all ranks take part in the same
    collectives.

    Args:
        gradients: The gradients of one step.
        shard_norms: Norms of this rank's parts, on the device of the gradients.
        norms: Norms over all ranks, on the host.
        total: Norm of all gradients, on the host, 0-dim.
        norm_type: The order p.
        local: If True, the norms of single parameters must be reliable too, not only the total norm.
        by_unit: If True, the norms are those of units.
    """
    table = gradients.table
    reduction = table.reduction
    bound = smallest_reliable_norm(norm_type, norms.dtype)
    number: Any = total.tolist()
    # Most steps end here, before anything is looked up for single gradients. Their dtypes are those of the parameters, whose answer
    # is cached.
    is_plain = table.is_uniform and reduction is None and not by_unit
    if is_plain and bound <= number < math.inf and (not local or _are_reliable(norms, bound)):
        return norms, total
    if by_unit:
        reduction = table.unit_reduction
        unreliable = _unreliable_units(norms, total, norm_type)
    elif reduction:
        unreliable = _unreliable_over_all_ranks(gradients, norms, total, norm_type, local=local)
    else:
        unreliable = _unreliable(gradients, norms, total, norm_type)
    # None means that no rank measures again. A rank whose list is empty still takes part in the collectives below.
    if unreliable is None:
        return norms, total

    # of this rank's shards, not of whole tensors: reliable norms are reduced once more, beside those that are new
    wide = shard_norms.double().cpu()
    for places, values in _remeasured(gradients, unreliable, norm_type, are_positions=reduction is not None):
        wide[places] = values
    if reduction:
        wide = reduction.norms_in_float64(wide, norm_type)
    return cast_if_representable(wide, total_norm_in_float64(wide, norm_type), norms.dtype)


def _unreliable(gradients: Gradients, norms: Tensor, total: Tensor, norm_type: float) -> Unreliable | None:
    """Places of unreliable norms; None if nothing is to be measured again."""
    bounds = [smallest_reliable_norm(norm_type, norms.dtype)] * len(norms)
    if not gradients.table.is_uniform:  # each norm has the bound of its own dtype
        bounds = [smallest_reliable_norm(norm_type, _accumulated_in(tensor.dtype)) for tensor in gradients.tensors]
    numbers = norms.tolist()
    # negated, so that a NaN, which fails every comparison, is unreliable
    unreliable = [place for place, least in enumerate(bounds) if not least <= numbers[place] < math.inf]
    # A norm of 0 is below any bound: it may come from an underflow. The largest entries tell, in one read of these tensors.
    if zeros := [place for place in unreliable if numbers[place] == 0]:
        largest = tensor_norms([gradients.tensors[place] for place in zeros], math.inf).tolist()
        true_zeros = {place for place, entry in zip(zeros, largest, strict=True) if entry == 0}
        unreliable = [place for place in unreliable if place not in true_zeros]
    # norms that are reliable each may still overflow together: then the list is empty, and only the total is computed again
    if not unreliable and _is_reliable(total, max(bounds)):
        return None
    return unreliable


def _unreliable_over_all_ranks(
    gradients: Gradients, norms: Tensor, total: Tensor, norm_type: float, *, local: bool
) -> Unreliable | None:
    """Places of this rank's unreliable norms where ranks hold parts; None if no rank is to measure again.

    A norm of 0 beside other norms is taken as true: it is that of an unused parameter, and seldom an underflow.
    """
    # the bound of float32, the highest of all dtypes: most steps need no other
    highest = smallest_reliable_norm(norm_type, torch.float32)
    if _is_reliable(total, highest) and not (
        local and any(norm != 0 and not highest <= norm < math.inf for norm in norms.tolist())
    ):
        return None
    bounds = [smallest_reliable_norm(norm_type, _accumulated_in(tensor.dtype)) for tensor in gradients.table.tensors]
    # If the total is 0 too, all of it may be an underflow. NaN, to which no norm is equal, then stands in for a true zero.
    zero = 0.0 if total > 0 else math.nan
    is_reliable = [norm == zero or least <= norm < math.inf for least, norm in zip(bounds, norms.tolist(), strict=True)]
    if (all(is_reliable) or not local) and _is_reliable(total, max(bounds, default=0.0)):
        return None
    return [place for place, position in enumerate(gradients.positions) if not is_reliable[position]]


def _unreliable_units(norms: Tensor, total: Tensor, norm_type: float) -> Unreliable | None:
    """A bool for each unit, True if its norm is unreliable; None if nothing is to be measured again.

    Norms of 0 beside other norms are taken as true: they are those of rows that a batch did not use.
    """
    # the highest bound, whatever the dtype: at worst a row of tiny float64 entries is read again
    bound = smallest_reliable_norm(norm_type, torch.float32)
    is_reliable = (norms >= bound) & (norms < math.inf)
    if _is_reliable(total, bound):
        is_reliable |= norms == 0
        if is_reliable.all().tolist():
            return None
    return ~is_reliable


def _remeasured(
    gradients: Gradients, unreliable: Unreliable, norm_type: float, *, are_positions: bool
) -> Iterator[tuple[Tensor | list[int], Tensor]]:
    """Yield places among this rank's norms, and the norms there in float64.

    Args:
        gradients: The gradients of one step.
        unreliable: The norms to measure again.
        norm_type: The order p.
        are_positions: If True, norms are laid out for all parameters of the table, else for the gradients that are there.
    """
    if isinstance(unreliable, Tensor):
        for entries, units, _ in gradients.rows:
            if isinstance(units, slice):
                here = torch.arange(units.start, units.stop, dtype=torch.int64, device="cpu")
            else:
                here = units.cpu()
            # these rows alone: the one bad row of an embedding must not cost a float64 copy of all
            rows = unreliable[here].nonzero()[:, 0]
            if len(rows):
                yield here[rows], row_norms_in_float64(entries.index_select(0, rows.to(entries.device)), norm_type).cpu()
    elif unreliable:
        places = [gradients.positions[place] for place in unreliable] if are_positions else unreliable
        yield places, norms_in_float64([gradients.tensors[place] for place in unreliable], norm_type).cpu()


def _are_reliable(norms: Tensor, bound: float) -> bool:
    """Return whether all norms are finite and at least as large as a bound."""
    smallest, largest = extremes(norms)
    return bound <= smallest and largest < math.inf  # False for a NaN


def _is_reliable(total: Tensor, bound: float) -> bool:
    number: Any = total.tolist()
    is_reliable: bool = bound <= number < math.inf
    return is_reliable


def total_norm_in_float64(norms: Tensor, norm_type: float) -> Tensor:
    """The p-norm of norms in float64, scaled by the largest, which neither overflows nor underflows; 0-dim."""
    wide = norms.double()
    peak = wide.amax()
    scale = torch.where(torch.isfinite(peak) & (peak > 0), peak, 1.0)
    return total_norm(wide / scale, norm_type) * scale


def _accumulated_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in {torch.float64, torch.complex128} else torch.float32


def cast_if_representable(norms: Tensor, total: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cast float64 norms to a narrower dtype if all of them are in its range; else return them as they are."""
    info = torch.finfo(dtype)
    both = torch.cat([norms, total.reshape(1)])
    # 0, inf and NaN are the same in every dtype; numbers below `tiny` would lose digits
    fits = (both == 0) | ~torch.isfinite(both) | ((both >= info.tiny) & (both <= info.max))
    return (norms.to(dtype), total.to(dtype)) if bool(fits.all()) else (norms, total)
