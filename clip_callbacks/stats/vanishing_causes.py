"""Why blocks do not learn, and what to do: the sentences that the warning and the report page share."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

HALF_DTYPES = (torch.bfloat16, torch.float16)
"""Data types in which updates of a usual size are lost."""

USUAL_DTYPES = (*HALF_DTYPES, torch.float32)
"""Data types that the weights may have where a log does not tell."""

ZERO_CAUSES = (
    "Likely causes of gradients that are exactly 0: a ReLU that is 0 for every input; a loss with weight 0, masked out everywhere "
    "or fitted perfectly; an input that is always 0; a saturated activation, clamp or softmax; an expert that receives no token; "
    "gradients that underflow, after many layers or in float16 without a GradScaler."
)

HALF_CURES = (
    'Keep the weights in float32 (precision="bf16-mixed" instead of "bf16-true"), raise the learning rate, or use an optimizer '
    "with float32 master weights, Kahan summation or stochastic rounding."
)

WIDE_CURES = (
    "Raise the learning rate, unless the training has converged, weights are held at a bound (clamped, projected, or set to 0 by a "
    "proximal step), or the next normalization removes what the block adds."
)


def least_update(dtype: torch.dtype) -> float:
    """Return the size, as a share of a weight, below which every update is rounded away.

    Half the distance between neighbouring numbers is eps / 2 of a weight just above a power of 2, and eps / 4 just below one.
    """
    return torch.finfo(dtype).eps / 4


def describe_rounding(dtypes: Sequence[torch.dtype] = USUAL_DTYPES) -> str:
    """Say which updates are rounded away in some data types, at least one, in a sentence."""
    first, *others = dtypes
    sentence = f"In {dtype_name(first)}, updates smaller than {least_update(first):.1g} of a weight are rounded away"
    return ", ".join([sentence, *(f"in {dtype_name(each)} those smaller than {least_update(each):.1g}" for each in others)]) + "."


def describe_lost_updates(dtypes: Collection[torch.dtype] = USUAL_DTYPES) -> list[str]:
    """Say which updates are rounded away in some data types, and what to do; data types with equal cures share a paragraph."""
    half = [dtype for dtype in dtypes if dtype in HALF_DTYPES]
    wide = [dtype for dtype in dtypes if dtype not in HALF_DTYPES]
    return [f"{describe_rounding(each)} {cures}" for each, cures in ((half, HALF_CURES), (wide, WIDE_CURES)) if each]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a data type without its module."""
    return str(dtype).removeprefix("torch.")
