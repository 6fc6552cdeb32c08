"""A block that does not learn, and the warning that names such blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clip_callbacks.core.wording import plural
from clip_callbacks.stats.vanishing_causes import ZERO_CAUSES, describe_lost_updates, dtype_name

MAX_LINES = 12
"""Largest number of blocks that one warning lists."""


@dataclass(frozen=True)
class VanishedBlock:
    """A block of which more than half does not learn.

    Args:
        name: Name of the block.
        share: Share of its entries whose gradient was exactly zero throughout, or whose weights the updates did not change.
        is_zero: If True, most of these entries had a gradient of exactly zero; if False, updates too small to change them.
        dtype: Data type of the largest of the block's parameters that do not learn.
        rate: Learning rate of that parameter; NaN if the optimizer chooses it.
        size: Median size of that parameter's weights; NaN if it is not known or does not matter.
    """

    name: str
    share: float
    is_zero: bool
    dtype: torch.dtype
    rate: float
    size: float

    def __str__(self) -> str:
        """Return a line of the warning."""
        if self.is_zero:
            which = "all entries" if self.share == 1.0 else f"{self.share:.0%} of the entries"
            return f"{self.name}: the gradient of {which} was exactly 0 in every step"
        text = f"{self.name}: the updates left {self.share:.0%} of the {dtype_name(self.dtype)} weights unchanged"
        if not math.isnan(self.rate):
            text += f", the learning rate is {self.rate:.2g}"
        if not math.isnan(self.size):
            text += f", the weights are about {self.size:.2g}"
        return text


def describe(blocks: Sequence[VanishedBlock], steps: int, last: int) -> str:
    """Return the text of a warning that names blocks, with likely causes.

    Args:
        blocks: The blocks, at least one.
        steps: The number of optimizer steps in the span.
        last: The number of optimizer steps in the run, up to the end of the span.
    """
    do = plural(len(blocks), "1 block does", f"{len(blocks)} blocks do")
    lines = [f"{do} not learn, as the {steps} optimizer steps up to step {last} show:"]
    lines += [f"  {block}" for block in blocks[:MAX_LINES]]
    if len(blocks) > MAX_LINES:
        lines.append(f"  and {len(blocks) - MAX_LINES} more")
    if any(block.is_zero for block in blocks):
        lines.append(ZERO_CAUSES)
    lines += describe_lost_updates(dict.fromkeys(block.dtype for block in blocks if not block.is_zero))
    lines.append("Each block is named once; `grad_vanished/<block>` shows it at the end of each epoch.")
    return "\n".join(lines)
