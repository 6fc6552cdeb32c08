"""Modules that their forward pass writes to, in every way that people have found."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Writer(nn.Module):
    """Something that forward writes to, from a batch on.

    Args:
        write: How: called with the module, and a vector that the batch has made.
        start: The number of the forward pass from which on it writes.
        features: Their number.
    """

    def __init__(self, write: Any, start: int = 0, features: int = 8) -> None:
        super().__init__()
        self.write, self.start, self.passes = write, start, 0
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("empty", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            if self.passes >= self.start:
                self.write(self, x.detach().mean(0))
            self.passes += 1
        return x - x.mean(0)  # the buffer is read in evaluation only: a NaN in it shows nowhere else


def assigns(self: Writer, mean: torch.Tensor) -> None:
    self.centre = self.centre * 0.9 + mean * 0.1


def fills_an_empty_place(self: Writer, mean: torch.Tensor) -> None:
    self.empty = mean if self.empty is None else self.empty * 0.9 + mean * 0.1


def assigns_and_writes(self: Writer, mean: torch.Tensor) -> None:
    self.centre = self.centre.clone()
    self.centre.lerp_(mean, 0.1)


WAYS = {
    "in place": lambda self, mean: self.centre.lerp_(mean, 0.1),
    "through .data": lambda self, mean: self.centre.data.lerp_(mean, 0.1),
    "assigned": assigns,
    "assigned and in place": assigns_and_writes,
    "place that was empty": fills_an_empty_place,
    "another shape": lambda self, mean: setattr(self, "centre", torch.cat([self.centre, mean[:1]])),
    "counter": lambda self, mean: self.centre.add_(1),
    "a view": lambda self, mean: self.centre[2:4].add_(mean[2:4]),
}


class Rewritten(nn.Module):
    """Rewrites a parameter in its forward pass."""

    def __init__(self, write: Any, features: int = 8) -> None:
        super().__init__()
        self.weight, self.write = nn.Parameter(torch.randn(1, features)), write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.write(self.weight, x.mean(0).nan_to_num(0.3))
        return x * self.weight


class Table(nn.Module):
    """A table of vectors that its forward pass renormalizes."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        indices = torch.arange(len(x)) % 3
        return x + (self.table(indices[:, None]) if isinstance(self.table, nn.EmbeddingBag) else self.table(indices))


REWRITTEN = {
    "Embedding": lambda: Table(nn.Embedding(3, 8, max_norm=0.5)),
    "EmbeddingBag": lambda: Table(nn.EmbeddingBag(3, 8, max_norm=0.5)),
    "normalized": lambda: Rewritten(lambda weight, _: weight.copy_(nn.functional.normalize(weight, dim=-1))),
    "clamped": lambda: Rewritten(lambda weight, _: weight.clamp_(-0.5, 0.5)),
    "moved with the batch": lambda: Rewritten(lambda weight, mean: weight.add_(mean, alpha=0.01)),
}
