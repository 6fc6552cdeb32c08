"""Each limit against its float64 loop, and under spikes, jumps, bad steps and wrong arguments."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import pytest
import torch
from torch import nn

import clip_callbacks
from clip_callbacks import (
    BlockNorms,
    ClipRule,
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
    clip_step,
)
from clip_callbacks.core.blocks import SCOPES
from clip_callbacks.core.limits import label, labels
from tests.helpers import reference
from tests.helpers.laws import MAKERS, NAMED, model, run
from tests.helpers.matrix import matrix

DEFAULTS = [
    FixedLimit(1.0),
    LinearLimit(10.0, 1.0, steps=300),
    CosineLimit(10.0, 1.0, steps=300),
    RatioLimit(),
    QuantileLimit(),
    QuantileLimit(0.99, window=128, warmup=20),
    ZScoreLimit(),
    ZScoreLimit(clip_to="mean"),
    ZScoreLimit(clip_to="threshold"),
    RobustZScoreLimit(),
    RobustZScoreLimit(3.0, window=50, floor=0.0),
    RobustZScoreLimit(4.0, floor=0.01, scale="linear"),
    EmaLimit(),
    TightestLimit(QuantileLimit(0.9), ZScoreLimit(), 3.0),
    WarmupLimit(RobustZScoreLimit(), steps=100, warmup_limit=1.0),
]


LONG_ENOUGH = 70
"""Number of steps after which every limit of the laws has left its warm-up and filled its window."""


def histories(steps, blocks, seed):
    """Return norms that drift, jump and spike, with zeros as those of a frozen or unused block."""
    draw = random.Random(seed)
    level = [10.0 ** draw.uniform(-3, 3) for _ in range(blocks)]
    for step in range(steps):
        if step == steps // 2:
            level = [size * 5.0 for size in level]
        spike = 1e4 if draw.random() < 0.01 else 1.0
        yield [
            0.0 if draw.random() < 0.03 else size * spike * math.exp(0.4 * draw.gauss(0, 1)) * (1 + step / steps) for size in level
        ]


def said(limit, history, p=2.0, weights=None):
    """Return the limits of each step, shape ``(steps, blocks)``."""
    state, found = limit.init(len(history[0])), []
    for norms in history:
        sizes = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        blocks = BlockNorms(torch.tensor(norms, dtype=torch.float64), p, sizes)
        value, state = limit.step(blocks, state)
        found.append(torch.as_tensor(value, dtype=torch.float64).expand(len(norms)))
    return torch.stack(found)


@matrix(
    slow=lambda *cell: cell[-1] == 1000,
    limit={label(limit): limit for limit in DEFAULTS},
    blocks=[1, 5],
    p=[2.0, math.inf],
    steps=[320, 1000],  # past the schedules and the warm-ups of defaults; past the longest window
)
def test_many_steps_equal_the_loop(limit, blocks, p, steps):
    history = list(histories(steps, blocks, seed=blocks))
    weights = [0.0, 1e-4, 2.0, 30.0, 1.0][:blocks]
    expected = torch.tensor(reference.limits(limit, history, p, weights), dtype=torch.float64)
    torch.testing.assert_close(said(limit, history, p, weights), expected)


@pytest.mark.parametrize("make", NAMED)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("steps", [LONG_ENOUGH, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_steps_of_gradients_equal_the_loop(make, scope, steps):
    limit, state, module = make(1.0), None, model()
    sizes = [norms[0] for norms in histories(steps, 1, seed=3)]
    directions = [[torch.randn_like(parameter) for parameter in module.parameters()] for _ in range(7)]
    history, limits, weights = [], [], None
    for step, size in enumerate(sizes):
        for parameter, direction in zip(module.parameters(), directions[step % 7], strict=True):
            parameter.grad = size * direction
        report, state = run(module, limit, scope, 2.0, state)
        history.append(report.norms.tolist())
        limits.append(report.limits)
    if limit.uses_weights:
        weights = [reference.norm([abs(x) for x in block], 2.0) for block in entries_of_blocks(module, scope)]
    expected = torch.tensor(reference.limits(limit, history, 2.0, weights))
    torch.testing.assert_close(torch.stack(limits).float(), expected.float())


def entries_of_blocks(module, scope):
    blocks = {}
    for name, parameter in module.named_parameters():
        for place, entry in enumerate(parameter.detach().double().flatten().tolist()):
            labels = {"global": "global", "group": "pg1", "layer": reference.layer_of(name), "parameter": name}
            blocks.setdefault(labels.get(scope) or reference.unit_of(name, parameter, place), []).append(entry)
    return list(blocks.values())


@matrix(slow=lambda *cell: cell[-1] == 200, make=MAKERS, bad=[math.nan, math.inf], at=[0, 50], after=[60, 200])
def test_the_limits_after_a_bad_step_are_those_of_a_run_without_it(make, bad, at, after):
    def limits(poisoned):
        limit, state, found, weight = make(1.0), None, [], nn.Parameter(torch.ones(1))
        for step, (size,) in enumerate(histories(at + after, 1, seed=5)):
            if step == at and poisoned:
                weight.grad = torch.tensor([bad])
                _, state = clip_step([weight], state, rules=[ClipRule(limit)])
            weight.grad = torch.tensor([size])
            report, state = clip_step([weight], state, rules=[ClipRule(limit)])
            found.append(report.limits)
        return torch.cat(found)

    assert torch.equal(limits(poisoned=True), limits(poisoned=False))


@pytest.mark.parametrize("make", NAMED)
def test_nothing_of_a_state_grows(make):
    limit = make(1.0)
    state = limit.init(3)
    shapes = {key: (value.shape, value.dtype) for key, value in state.items()}
    for norms in histories(120, 3, seed=1):
        _, state = limit.step(BlockNorms(torch.tensor(norms), weights=torch.ones(3)), state)
        assert {key: (value.shape, value.dtype) for key, value in state.items()} == shapes


@pytest.mark.parametrize("limit", [RobustZScoreLimit(), ZScoreLimit(clip_to="threshold"), QuantileLimit(0.9)], ids=label)
def test_one_spike_does_not_lift_a_limit(limit):
    draw = random.Random(2)
    history = [[math.exp(0.3 * draw.gauss(0, 1))] for _ in range(400)]
    quiet = said(limit, history)
    history[300] = [1e30]
    shaken = said(limit, history)
    assert (shaken[301:] <= 1.5 * quiet[301:]).all()


@pytest.mark.parametrize("jump", [10.0, 100.0])
def test_the_robust_limit_follows_a_lasting_jump(jump):
    draw = random.Random(4)
    history = [[math.exp(0.3 * draw.gauss(0, 1)) * (jump if step >= 300 else 1.0)] for step in range(600)]
    limits = said(RobustZScoreLimit(), history)[:, 0].tolist()
    clipped = [norms[0] > limit for norms, limit in zip(history, limits, strict=True)]
    assert all(clipped[300:330])
    assert sum(clipped[500:]) / 100 < 0.05


@matrix(spread=[0.1, 2.0], window=[50, 128], z=[2.0, 2.5, 3.0])
def test_false_alarms_of_the_robust_limit_on_lognormal_norms(spread, window, z):
    """The share of false alarms is right after the warm-up, and with a full window."""
    nominal = NormalDist().cdf(-z)
    torch.manual_seed(0)
    blocks, steps = 500, window + 40
    limit = RobustZScoreLimit(z, window=window)
    state, alarms, norms = limit.init(blocks), [], torch.exp(spread * torch.randn(steps, blocks).double())
    for step in range(steps):
        limits, state = limit.step(BlockNorms(norms[step]), state)
        alarms.append((norms[step] > limits).double().mean().item())
    early, late = alarms[limit.warmup : limit.warmup + 25], alarms[window:]
    assert nominal / 2 < sum(late) / len(late) < 2 * nominal
    assert nominal / 2 < sum(early) / len(early) < 2 * nominal


def test_parameters_that_begin_at_zero_move_under_the_ratio_limit():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    inputs, targets = torch.randn(64, 3), torch.randn(64, 2) + 3.0
    losses = []
    for _ in range(400):
        loss = nn.functional.mse_loss(layer(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        report, _ = clip_step(layer.named_parameters(), rules=[ClipRule(RatioLimit(0.05), "unit")])
        assert (report.coefficients > 0).all()
        optimizer.step()
        losses.append(loss.item())
    solution = torch.linalg.lstsq(torch.cat([inputs, torch.ones(64, 1)], 1), targets).solution
    best = nn.functional.mse_loss(torch.cat([inputs, torch.ones(64, 1)], 1) @ solution, targets)
    assert losses[-1] < 1.05 * best.item() < losses[0] / 4


def test_ema_limit_clips_all_blocks_together_at_first():
    limit = EmaLimit(warmup=2, max_norm=1.0)
    limits, state = limit.step(BlockNorms(torch.tensor([3.0, 4.0, 0.0])), limit.init(3))
    torch.testing.assert_close(limits, torch.tensor([0.6, 0.8, math.inf], dtype=torch.float64))
    _, state = limit.step(BlockNorms(torch.tensor([0.3, 0.9, 0.0])), state)
    limits, _ = limit.step(BlockNorms(torch.tensor([1.0, 1.0, 7.0])), state)
    torch.testing.assert_close(limits, torch.tensor([1.05 * 0.3, 1.05 * 0.8, math.inf], dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: LinearLimit(0.0, 1.0, 5), "start"),
        (lambda: LinearLimit(1.0, math.inf, 5), "end"),
        (lambda: CosineLimit(1.0, 2.0, 0), "steps"),
        (lambda: CosineLimit(1.0, 2.0, 2.5), "steps"),
        (lambda: RatioLimit(-0.1), "ratio"),
        (lambda: RatioLimit(0.1, 0.0), "floor"),
        (lambda: QuantileLimit(0.0), "quantile"),
        (lambda: QuantileLimit(10), "quantile"),
        (lambda: QuantileLimit(window=1), "window"),
        (lambda: QuantileLimit(warmup=-1), "warmup"),
        (lambda: ZScoreLimit(z=math.nan), "z"),
        (lambda: ZScoreLimit(decay=1.0), "decay"),
        (lambda: ZScoreLimit(warmup=1), "warmup"),
        (lambda: ZScoreLimit(clip_to="median"), "clip_to"),
        (lambda: RobustZScoreLimit(window=10, warmup=11), "warmup"),
        (lambda: RobustZScoreLimit(floor=-1.0), "floor"),
        (lambda: EmaLimit(factor=0.0), "factor"),
        (lambda: EmaLimit(max_norm=0.0), "max_norm"),
        (lambda: TightestLimit(1.0), "limits"),
        (lambda: TightestLimit(1.0, -1.0), "limits"),
        (lambda: WarmupLimit(1.0, steps=0, warmup_limit=1.0), "steps"),
        (lambda: WarmupLimit(1.0, steps=5, warmup_limit=0.0), "warmup_limit"),
        (lambda: ClipRule(1.0, exclude="("), "exclude"),
        (lambda: ClipRule(1.0, name="a b"), "name"),
    ],
)
def test_constructor_errors_name_the_argument(make, argument):
    with pytest.raises(ValueError, match=rf"`{argument}` must .*got"):
        make()


def test_limits_compare_and_hash_as_values():
    assert TightestLimit(1.0, QuantileLimit()) == TightestLimit(limits=[FixedLimit(1.0), QuantileLimit()])
    stated, made = WarmupLimit(1.0, steps=5, warmup_limit=2.0), WarmupLimit(FixedLimit(1.0), steps=5, warmup_limit=FixedLimit(2.0))
    assert len({stated, made, ZScoreLimit()}) == 2


def test_labels_consist_of_characters_that_every_logger_accepts():
    each = labels([*DEFAULTS, FixedLimit(1.0)])
    assert len(set(each)) == len(each)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.") for name in each)
    assert each[4] == "QuantileLimit"
    assert each[13] == "TightestLimit-QuantileLimit-quantile_0.9-ZScoreLimit-FixedLimit-3"


class Negative(Limit):
    """Breaks the contract of limits."""

    def __init__(self, limit):
        self.limit = limit

    def step(self, blocks, state):
        return self.limit, state


def parameters_with_gradients():
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.tensor([0.3, 0.4])
    return parameters


@pytest.mark.parametrize(
    ("scope", "limit"),
    [
        ("global", -1.0),
        ("global", torch.tensor([-1.0])),
        ("parameter", -1.0),
        ("parameter", torch.tensor([-1.0])),
        ("parameter", torch.tensor([2.0, -1.0])),
    ],
)
def test_a_limit_below_0_is_refused(scope, limit):
    parameters = parameters_with_gradients()
    with pytest.raises(ValueError, match="`step` of a limit must return limits of 0 or more, got .*-1"):
        clip_step(parameters, rules=[ClipRule(Negative(limit), scope)])
    assert all(parameter.grad.tolist() == pytest.approx([0.3, 0.4]) for parameter in parameters)


def test_a_limit_below_0_that_the_host_must_not_read_is_0():
    parameters = parameters_with_gradients()
    clip_step(parameters, rules=[ClipRule(Negative(torch.tensor([-1.0])))], nonfinite="ignore", deferred=True)
    assert all(parameter.grad.tolist() == [0.0, 0.0] for parameter in parameters)
    with pytest.raises(ValueError, match="`step` of a limit must return limits of 0 or more, got -1"):
        clip_step(parameters, rules=[ClipRule(Negative(-1.0))], nonfinite="ignore", deferred=True)


def test_lightning_cli_offers_no_limit_that_is_not_public():
    subclasses = {kind.__name__ for kind in Limit.__subclasses__() if kind.__module__.startswith("clip_callbacks.")}
    assert {name for name in subclasses if not name.startswith("_")} <= set(clip_callbacks.__all__)
