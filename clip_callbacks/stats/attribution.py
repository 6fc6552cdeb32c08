r"""Attribution of the total norm, and of clipping, to blocks.

Under a limit on the global norm, one block with a large norm makes all others smaller. Let :math:`n_b` be the norm of a block,
:math:`N` the total norm, :math:`n'_b` the norm of the block after clipping, and :math:`\tilde n_b` what that would be if all other
gradients were 0. Then

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
    """Return the fraction of the total norm, to the power p, that belongs to each block.

    For p = 2 it is a fraction of the sum of squares; for p = inf it is 1 for the blocks with the largest norm, and 0 for others.

    Args:
        norms: Norms of the blocks, shape ``(B,)``.
        total: Total norm, 0-dim.
        norm_type: Order p of the norms.

    Returns:
        Fractions between 0 and 1, float64 of shape ``(B,)``; 0 for all blocks if the total norm is 0.
    """
    shares = torch.where(total > 0, norms.double() / total.double(), 0.0)
    return (shares >= 1.0).double() if math.isinf(norm_type) else shares.pow(norm_type)


def spill_over(outcomes: Sequence[Outcome], norms: Tensor, factors: Tensor | None, blocks: Partition, norm_type: float) -> Tensor:
    """Return the fraction of each block's norm that clipping removed because of other blocks.

    Args:
        outcomes: Decisions of the rules, in the order in which they were applied.
        norms: Norms before clipping of N tensors or U output rows, shape ``(N,)`` or ``(U,)``.
        factors: Factors by which clipping multiplied these, or one entry for all of them; None stands for 1.
        blocks: Partition of the tensors or rows into B blocks.
        norm_type: Order p of the norms.

    Returns:
        Fractions between 0 and 1, float64 of shape ``(B,)``.
    """
    if factors is None:
        return torch.zeros(len(blocks.names), dtype=torch.float64, device="cpu")
    alone = norms
    for outcome in outcomes:
        alone = alone * _factors_alone(outcome, alone, blocks, norm_type)
    left, kept = block_norms(norms * factors, blocks, norm_type).double(), block_norms(alone, blocks, norm_type).double()
    return torch.where(kept > 0, 1.0 - left / kept, 0.0).clamp(0.0, 1.0)


def _factors_alone(outcome: Outcome, norms: Tensor, blocks: Partition, norm_type: float) -> Tensor:
    """Return the factor that a rule would have for each tensor or row if all blocks but its own were 0."""
    pairs, ruled = blocks.meet(outcome.partition)
    limits = outcome.limits
    if isinstance(limits, Tensor):
        limits = limits[ruled]
    found = coefficients(block_norms(norms, pairs, norm_type), limits)[0]
    return pairs.spread(found.reshape(-1))
