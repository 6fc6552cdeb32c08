"""What the package must compute, in plain Python floats (float64): slow and obviously right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def entries(tensor: Tensor) -> list[float]:
    """Magnitudes of all entries of a gradient."""
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return [abs(x) for x in tensor.detach().to(wide).reshape(-1).tolist()]


def norm(magnitudes: Sequence[float], p: float) -> float:
    """The p-norm, scaled by the largest entry."""
    peak = max(magnitudes, default=0.0)
    if peak == 0.0 or math.isinf(p):
        return peak
    return peak * math.fsum((x / peak) ** p for x in magnitudes) ** (1.0 / p)


def coefficient(total: float, limit: float) -> float:
    return min(1.0, limit / (total + 1e-6))


def layer_of(name: str) -> str:
    return name.rpartition(".")[0] or "(root)"


def clip(gradients: dict[str, Tensor], limit: float, scope: str, p: float) -> tuple[dict[str, float], dict[str, float]]:
    """Norms and coefficients by block name."""
    label = {"global": lambda name: "global", "group": lambda name: "pg1", "layer": layer_of, "parameter": lambda name: name}[scope]
    blocks: dict[str, list[float]] = {}
    for name, gradient in gradients.items():
        blocks.setdefault(label(name), []).extend(entries(gradient))
    norms = {block: norm(magnitudes, p) for block, magnitudes in blocks.items()}
    return norms, {block: coefficient(value, limit) for block, value in norms.items()}
