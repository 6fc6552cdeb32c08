r"""How much of a block's clipping is the doing of others.

Under a global norm a block that is large by itself makes all others smaller. With the block's norm as it is after clipping,
:math:`n'_b`, and as it would be if all other gradients were 0, :math:`\tilde n_b`,

.. math::
    \text{contribution}_b = \frac{n_b^p}{N^p}, \qquad \text{spill\_over}_b = 1 - \frac{n'_b}{\tilde n_b} .
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clip_callbacks.core.blocks import Partition
from clip_callbacks.core.coefficients import coefficients
from clip_callbacks.core.decisions import Outcome
from clip_callbacks.core.measurement import block_norms


def contributions(norms: Tensor, total: Tensor, norm_type: float) -> Tensor:
    """The share of each block in the total norm: with p = 2 of the sum of squares; with p = inf 1 for the largest, 0 for others.

    Args:
        norms: Of the blocks, shape ``(B,)``.
        total: Of all gradients, shape ``(1,)``.
        norm_type: The order p.

    Returns:
        Shape ``(B,)``, between 0 and 1; 0 if all norms are.
    """
    shares = torch.where(total > 0, norms.double() / total.double(), 0.0)
    return (shares >= 1.0).double() if math.isinf(norm_type) else shares.pow(norm_type)


def spill_over(outcomes: Sequence[Outcome], norms: Tensor, factors: Tensor | None, blocks: Partition, norm_type: float) -> Tensor:
    """The share of each block's norm that it lost because of the others.

    Args:
        outcomes: What each rule decided.
        norms: Of the parts that were measured, before clipping, shape ``(N,)`` or ``(U,)``.
        factors: What each was multiplied by, or one entry for all; None is 1.
        blocks: The parts in B blocks.
        norm_type: The order p.

    Returns:
        Shape ``(B,)``, between 0 (none) and 1.
    """
    if factors is None:
        return torch.zeros(len(blocks.names), dtype=torch.float64)
    alone = norms
    for outcome in outcomes:
        alone = alone * _factors_alone(outcome, alone, blocks, norm_type)
    left, kept = block_norms(norms * factors, blocks, norm_type).double(), block_norms(alone, blocks, norm_type).double()
    return torch.where(kept > 0, 1.0 - left / kept, 0.0).clamp(0.0, 1.0)


def _factors_alone(outcome: Outcome, norms: Tensor, blocks: Partition, norm_type: float) -> Tensor:
    """What the rule would multiply each part by, if there were only the block that it is in."""
    pairs, ruled = blocks.meet(outcome.partition)
    limits = outcome.limits
    if isinstance(limits, Tensor):
        limits = limits[ruled]
    found = coefficients(block_norms(norms, pairs, norm_type), limits)[0]
    return pairs.spread(found.reshape(-1))
