"""What the package must compute, in plain Python floats (float64): slow and obviously right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from clip_callbacks import (
    CosineLimit,
    EmaLimit,
    FixedLimit,
    Limit,
    LinearLimit,
    QuantileLimit,
    RatioLimit,
    RobustZScoreLimit,
    TightestLimit,
    WarmupLimit,
    ZScoreLimit,
)


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


def unit_of(name: str, gradient: Tensor, place: int) -> str:
    """The unit of an entry, by its place in the flattened gradient."""
    return name if gradient.ndim <= 1 else f"{name}[{place // (gradient.numel() // len(gradient))}]"


def clip(gradients: dict[str, Tensor], limit: float, scope: str, p: float) -> tuple[dict[str, float], dict[str, float]]:
    """Norms and coefficients by block name."""
    label = {"global": lambda name: "global", "group": lambda name: "pg1", "layer": layer_of, "parameter": lambda name: name}
    blocks: dict[str, list[float]] = {}
    for name, gradient in gradients.items():
        for place, magnitude in enumerate(entries(gradient)):
            block = unit_of(name, gradient, place) if scope == "unit" else label[scope](name)
            blocks.setdefault(block, []).append(magnitude)
    norms = {block: norm(magnitudes, p) for block, magnitudes in blocks.items()}
    return norms, {block: coefficient(value, limit) for block, value in norms.items()}


def quantile(values: Sequence[float], share: float) -> float:
    """With linear interpolation, of values in any order."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def limits(limit: Limit, history: Sequence[Sequence[float]], p: float, weights: Sequence[float] | None = None) -> list[list[float]]:
    """What a limit says at each step of a history of the blocks' norms: one float64 loop for each class."""
    loop = {
        FixedLimit: fixed_limits,
        LinearLimit: schedule_limits,
        CosineLimit: schedule_limits,
        RatioLimit: ratio_limits,
        QuantileLimit: quantile_limits,
        ZScoreLimit: zscore_limits,
        RobustZScoreLimit: robust_limits,
        EmaLimit: ema_limits,
        TightestLimit: tightest_limits,
        WarmupLimit: warmup_limits,
    }[type(limit)]
    return loop(limit, history, p, weights)


def fixed_limits(limit, history, p, weights):
    return [[limit.max_norm] * len(norms) for norms in history]


def schedule_limits(limit, history, p, weights):
    found = []
    for step, norms in enumerate(history):
        done = min(1.0, step / limit.steps)
        done = (1 - math.cos(math.pi * done)) / 2 if isinstance(limit, CosineLimit) else done
        found.append([limit.start + (limit.end - limit.start) * done] * len(norms))
    return found


def ratio_limits(limit, history, p, weights):
    return [[limit.ratio * max(weight, limit.floor) for weight in weights] for _ in history]


def per_block(block_limits):
    """From a loop over one block's norms to one over steps."""

    def loop(limit, history, p, weights):
        each = [block_limits(limit, [norms[block] for norms in history]) for block in range(len(history[0]))]
        return [list(row) for row in zip(*each, strict=True)]

    return loop


@per_block
def quantile_limits(limit, norms):
    seen: list[float] = []
    found = []
    count = 0
    for norm in norms:
        if norm > 0:
            seen = [*seen, min(norm, 10 * max(seen, default=math.inf))][-limit.window :]
            count += 1
        found.append(quantile(seen, limit.quantile) if seen and count > limit.warmup else math.inf)
    return found


@per_block
def zscore_limits(limit, norms):
    found = []
    warm: list[float] = []
    mean = variance = 0.0
    for norm in norms:
        if len(warm) < limit.warmup:
            found.append(math.inf)
            if norm > 0:
                warm.append(min(norm, 10 * math.fsum(warm) / len(warm)) if warm else norm)
                mean = math.fsum(warm) / len(warm)
                variance = math.fsum((x - mean) ** 2 for x in warm) / len(warm)
            continue
        threshold = mean + limit.z * math.sqrt(variance)
        now = threshold
        if norm > threshold:
            if limit.clip_to == "mean":
                now = mean
            if limit.clip_to == "reciprocal":
                zscore = (norm - mean) / math.sqrt(variance) if variance else math.inf
                now = mean + limit.z * math.sqrt(variance) / (zscore / limit.z)
        found.append(now)
        if norm > 0:
            mean = limit.decay * mean + (1 - limit.decay) * min(norm, now)
            variance = limit.decay * variance + (1 - limit.decay) * (min(norm, now) - mean) ** 2
    return found


@per_block
def robust_limits(limit, norms):
    return robust_limits_of(limit, norms, lambda norm: norm > 0)


def robust_limits_of(limit, values, enters):
    """Of one block, whose values enter the window if ``enters`` says so."""
    found = []
    seen: list[float] = []
    share, judged = 0.02, 0
    for value in values:
        now = far = extreme = math.inf
        if len(seen) >= limit.warmup:
            median = quantile(seen, 0.5)
            deviation = 1.4826 * quantile([abs(x - median) for x in seen], 0.5)
            wide = widened(limit.z, len(seen))
            if limit.scale == "log":
                now = math.exp(median + wide * max(deviation, limit.floor))
            else:
                deviation = max(deviation, limit.floor * abs(median))
                if deviation > 0:
                    now = median + min(wide * heavier(limit.z, share), 3 * limit.z) * deviation
                far, extreme = (median + widened(z, len(seen)) * deviation for z in (2.5, 6.0))
        found.append(now)
        if enters(value):
            if far < math.inf:
                share += ((far < value <= max(now, extreme)) - share) / min(judged + 101, 1000)
                judged += 1
            entering = min(value, now)
            seen = [*seen, math.log(entering) if limit.scale == "log" else entering][-limit.window :]
    return found


def widened(z, count):
    freedom = 0.37 * (count - 1)
    return min(z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2), 1.5 * z)


def heavier(z, share):
    """Ratio of a quantile of Tukey's h distribution to the normal one, h from the share beyond 2.5."""
    normal = min(max(-NormalDist().inv_cdf(share), 1.0), 2.5)
    return math.exp(1.4 * 2 * math.log(2.5 / normal) / normal**2 * z**2 / 2)


def ema_limits(limit, history, p, weights):
    means = [math.inf] * len(history[0])
    found = []
    for step, norms in enumerate(history):
        total = norm(norms, p)
        now = []
        for block, size in enumerate(norms):
            if step < limit.warmup:
                now.append(size * limit.max_norm / total if size > 0 else math.inf)
                means[block] = min(means[block], size, now[-1]) if size > 0 else means[block]
            else:
                now.append(limit.factor * means[block])
                if size > 0:
                    seen = min(size, now[-1])
                    means[block] = limit.decay * means[block] + (1 - limit.decay) * seen if means[block] < math.inf else seen
        found.append(now)
    return found


def tightest_limits(limit, history, p, weights):
    each = [limits(inner, history, p, weights) for inner in limit.members]
    return [[min(blocks) for blocks in zip(*rows, strict=True)] for rows in zip(*each, strict=True)]


def warmup_limits(limit, history, p, weights):
    first, then = limits(limit.warmup_limit, history, p, weights), limits(limit.limit, history, p, weights)
    return [first[step] if step < limit.steps else then[step] for step in range(len(history))]
