"""A second, slow read of gradients whose norm is not reliable in the dtype that it was accumulated in.

Squares of finite entries may overflow, and those of small ones lose digits to underflow. Norms next to these ends are measured
again in float64, of entries that are scaled by the largest of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from clip_callbacks.core.tensor_norms import smallest_sound_norm, total_norm, true_norms, true_row_norms
from clip_callbacks.core.tensor_table import Gradients

Suspects: TypeAlias = list[int] | Tensor
"""Which norms are not reliable: places among the gradients that are there, or, of units, a bool for each."""


def remeasure(
    gradients: Gradients, ours: Tensor, norms: Tensor, total: Tensor, norm_type: float, *, local: bool, by_unit: bool
) -> tuple[Tensor, Tensor]:
    """Norms and total norm, those that are not reliable measured again.

    Where ranks hold parts of the tensors, the decision uses globally reduced values only, so that all ranks take part in the same
    collectives.

    Args:
        gradients: The gradients of one step.
        ours: Norms of this rank's parts, wherever they are.
        norms: Norms over all ranks, on the host.
        total: Norm of all together, on the host, shape ``(1,)``.
        norm_type: The order p.
        local: Whether the norms of single parameters matter too.
        by_unit: Whether the norms are those of units.
    """
    table = gradients.table
    reduction = table.reduction
    if by_unit:
        reduction = table.unit_reduction
        suspects = _suspect_units(norms, total, norm_type)
    elif reduction:
        suspects = _suspects_over_all_ranks(gradients, norms, total, norm_type, local=local)
    else:
        suspects = _suspects(gradients, norms, total, norm_type, local=local)
    if suspects is None:
        return norms, total

    wide = ours.double().cpu()
    for places, values in _measured_again(gradients, suspects, norm_type, are_positions=reduction is not None):
        wide[places] = values
    if reduction:
        wide = reduction.true_norms(wide, norm_type)
    return cast_if_representable(wide, sound_total(wide, norm_type), norms.dtype)


def _suspects(gradients: Gradients, norms: Tensor, total: Tensor, norm_type: float, *, local: bool) -> Suspects | None:
    """Places of unreliable norms; None if nothing is to be measured again."""
    bound = smallest_sound_norm(norm_type, norms.dtype)
    if gradients.is_uniform and _are_reliable(total, bound) and (not local or _are_reliable(norms, bound)):
        return None
    bounds = [smallest_sound_norm(norm_type, _accumulated_in(tensor.dtype)) for tensor in gradients.tensors]
    each = zip(bounds, norms.tolist(), strict=True)
    suspects = [place for place, (least, norm) in enumerate(each) if not least <= norm < math.inf]
    if not suspects and _are_reliable(total, max(bounds)):
        return None
    return suspects


def _suspects_over_all_ranks(
    gradients: Gradients, norms: Tensor, total: Tensor, norm_type: float, *, local: bool
) -> Suspects | None:
    """Places of unreliable norms where ranks hold parts; None if nothing is to be measured again.

    A norm of 0 beside others is taken for one: it is that of an unused parameter, and seldom an underflow.
    """
    highest = smallest_sound_norm(norm_type, torch.float32)
    if _are_reliable(total, highest) and not (
        local and any(norm != 0 and not highest <= norm < math.inf for norm in norms.tolist())
    ):
        return None
    bounds = [smallest_sound_norm(norm_type, _accumulated_in(tensor.dtype)) for tensor in gradients.table.tensors]
    zero = 0.0 if total.tolist()[0] > 0 else math.nan
    is_reliable = [norm == zero or least <= norm < math.inf for least, norm in zip(bounds, norms.tolist(), strict=True)]
    if (all(is_reliable) or not local) and _are_reliable(total, max(bounds, default=0.0)):
        return None
    return [place for place, position in enumerate(gradients.positions) if not is_reliable[position]]


def _suspect_units(norms: Tensor, total: Tensor, norm_type: float) -> Suspects | None:
    """Which units have an unreliable norm, a bool for each; None if nothing is to be measured again.

    Norms of 0 beside others are taken for it: they are those of rows that a batch had no use for.
    """
    bound = smallest_sound_norm(norm_type, torch.float32)
    is_reliable = (norms >= bound) & (norms < math.inf)
    if _are_reliable(total, bound):
        is_reliable |= norms == 0
        if is_reliable.all().tolist():
            return None
    return ~is_reliable


def _measured_again(
    gradients: Gradients, suspects: Suspects, norm_type: float, *, are_positions: bool
) -> Iterator[tuple[Tensor | list[int], Tensor]]:
    """Places among this rank's norms, and the norms there in float64."""
    if isinstance(suspects, Tensor):
        for entries, units, _ in gradients.rows:
            here = torch.arange(units.start, units.stop) if isinstance(units, slice) else units.cpu()
            rows = suspects[here].nonzero()[:, 0]
            if len(rows):
                yield here[rows], true_row_norms(entries.index_select(0, rows.to(entries.device)), norm_type).cpu()
    elif suspects:
        places = [gradients.positions[place] for place in suspects] if are_positions else suspects
        yield places, true_norms([gradients.tensors[place] for place in suspects], norm_type).cpu()


def _are_reliable(norms: Tensor, bound: float) -> bool:
    numbers = norms.tolist()
    return math.isfinite(sum(numbers)) and min(numbers) >= bound


def sound_total(norms: Tensor, norm_type: float) -> Tensor:
    """The p-norm of norms in float64, scaled by the largest: neither overflows nor underflows; shape ``(1,)``."""
    wide = norms.double()
    peak = wide.amax()
    scale = torch.where(torch.isfinite(peak) & (peak > 0), peak, 1.0)
    return total_norm(wide / scale, norm_type) * scale


def _accumulated_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in {torch.float64, torch.complex128} else torch.float32


def cast_if_representable(norms: Tensor, total: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Float64 norms in a narrower dtype if all of them are in its range, else as they are."""
    info = torch.finfo(dtype)
    both = torch.cat([norms, total])
    fits = (both == 0) | ~torch.isfinite(both) | ((both >= info.tiny) & (both <= info.max))
    return (norms.to(dtype), total.to(dtype)) if bool(fits.all()) else (norms, total)
