"""Limits of a single block on the host, in numbers of Python."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_callbacks import (
    BlockNorms,
    FixedLimit,
    NonFiniteGuard,
    QuantileLimit,
    RobustZScoreLimit,
    TightestLimit,
    WarmupLimit,
    ZScoreLimit,
)
from clip_callbacks.core.limits import of_one
from clip_callbacks.core.limits._window_of_one import WindowOfOne
from clip_callbacks.core.measurement import FALSE, TRUE, Measurement
from clip_callbacks.core.rules import Plan, SpikeLimits
from clip_callbacks.core.spikes import evaluate
from clip_callbacks.core.tensor_table import TensorTable
from tests.helpers.laws import MAKERS, model
from tests.helpers.matrix import examples
from tests.helpers.operations import Operations
from tests.helpers.training import Regression, assert_same_bits, data

MADE = {name: make(1.0) for name, make in MAKERS.items()}
IN_NUMBERS = {name: limit for name, limit in MADE.items() if of_one(limit, limit.init(1)) is not None}
WITH_STATE = [pytest.param(limit, id=name) for name, limit in IN_NUMBERS.items() if limit.init(1)]
ALL = [pytest.param(limit, id=name) for name, limit in IN_NUMBERS.items()]


def stream(steps=120):
    """Values with spikes, zeros, a run of equal ones, and one that is far too small."""
    dice = torch.Generator().manual_seed(0)
    values = torch.randn(steps, generator=dice, dtype=torch.float64).exp()
    values[::37] *= 50.0
    values[::23] = 0.0
    values[40:60] = 1.0
    values[30] = 1e-300
    return values.tolist()


def same_states(one, other):
    assert one.keys() == other.keys()
    assert_same_bits(list(one.values()), [other[key] for key in one])


def test_all_limits_that_need_only_norms_have_numbers():
    assert {type(limit).__name__ for limit in IN_NUMBERS.values()} >= {
        "FixedLimit",
        "QuantileLimit",
        "ZScoreLimit",
        "RobustZScoreLimit",
        "EmaLimit",
        "WarmupLimit",
    }
    both = TightestLimit(ZScoreLimit(), 1.0)
    assert of_one(both, both.init(1)) is not None


@pytest.mark.parametrize("limit", [*ALL, TightestLimit(ZScoreLimit(warmup=2), 1.0, QuantileLimit(0.5, window=10))])
def test_numbers_follow_the_tensors(limit):
    one, two = of_one(limit, limit.init(1)), limit.init(2)
    for value in stream():
        ours, one = one.step(value)
        # of the order in which two equal blocks together have the norm of one
        theirs, two = limit.step(BlockNorms(torch.tensor([value, value], dtype=torch.float64), math.inf), two)
        theirs = theirs if isinstance(theirs, torch.Tensor) else torch.tensor([theirs])
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs[0].double())
        torch.testing.assert_close(one.state(), {key: each[..., :1] if each.ndim else each for key, each in two.items()})


@pytest.mark.parametrize("limit", WITH_STATE)
def test_a_state_comes_back_bit_for_bit(limit):
    """However often the form changes, as in a resume or where the device decides some steps: nothing depends on it."""
    state, one = limit.init(1), of_one(limit, limit.init(1))
    for value in stream():
        _, one = one.step(value)
        _, state = limit.step(BlockNorms(torch.tensor([value], dtype=torch.float64)), state)
        same_states(one.state(), state)
        again = of_one(limit, state).state()
        assert list(again) == list(limit.init(1))
        same_states(again, state)
        assert {key: (each.dtype, each.shape) for key, each in again.items()} == {
            key: (each.dtype, each.shape) for key, each in limit.init(1).items()
        }
    file = io.BytesIO()
    torch.save(one.state(), file)
    file.seek(0)
    same_states(torch.load(file, weights_only=True), state)


@pytest.mark.parametrize("limit", WITH_STATE)
def test_a_step_changes_nothing(limit):
    """A step that is skipped leaves the limit of before in use."""
    one = of_one(limit, limit.init(1))
    for value in stream(60):
        before = one.state()
        first, after = one.step(value)
        second, other = one.step(value)
        assert first == second
        same_states(one.state(), before)
        same_states(after.state(), other.state())
        one = after


@given(
    values=st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3)), min_size=1, max_size=25),
    window=st.integers(2, 12),
)
@settings(max_examples=examples(300), deadline=None)
def test_the_median_and_the_deviation_are_those_of_a_sort(values, window):
    one = WindowOfOne([math.inf] * window, [math.inf] * window, 0)
    for end, value in enumerate(values, 1):
        one = one.added(value)
        held = sorted(values[max(0, end - window) : end])
        half, other = (len(held) - 1) // 2, len(held) // 2
        median = held[half] + 0.5 * (held[other] - held[half])
        distances = sorted(abs(each - median) for each in held)
        assert one.median_and_deviation() == (median, 0.5 * (distances[half] + distances[other]))
        assert one.largest() == held[-1]


def test_a_subclass_with_a_step_of_its_own_has_no_numbers():
    class Doubled(ZScoreLimit):
        def step(self, blocks, state):
            limits, after = super().step(BlockNorms(blocks.norms.expand(2)), {key: each.expand(2) for key, each in state.items()})
            return 2.0 * limits[:1], {key: each[:1] for key, each in after.items()}

    limit, plain = Doubled(warmup=2), ZScoreLimit(warmup=2)
    assert of_one(limit, limit.init(1)) is None
    assert of_one(WarmupLimit(limit, steps=1, warmup_limit=1.0), {"steps": torch.tensor(0)} | limit.init(1)) is None
    one, other = limit.init(1), plain.init(1)
    for norm in (1.0, 2.0, 3.0):
        doubled, one = limit.step(BlockNorms(torch.tensor([norm])), one)
        limits, other = plain.step(BlockNorms(torch.tensor([norm])), other)
    assert doubled == 2.0 * limits


def test_a_limit_of_weights_has_no_numbers():
    assert all(of_one(limit, limit.init(1)) is None for limit in MADE.values() if limit.uses_weights)


BOTH = SpikeLimits(RobustZScoreLimit(), RobustZScoreLimit(4.0, scale="linear"))


def plan_of(limits):
    return Plan.of(TensorTable.of_named(model().named_parameters()), (), (), limits)


def measured(norm, loss=None):
    total = torch.tensor([norm])
    return Measurement(total, total[0], total, 2.0, TRUE, is_finite=True, loss=None if loss is None else torch.tensor([loss]))


def test_a_healthy_step_with_thresholds_dispatches_nothing():
    plan, states = plan_of(BOTH), tuple(of_one(limit, limit.init(1)) for limit in BOTH[:2])
    for loss in torch.rand(40).tolist():
        _, states = evaluate(plan, measured(1.0 + loss, loss), states)
    step = measured(1.5, 0.5)
    with Operations() as operations:
        thresholds, _ = evaluate(plan, step, states)
        assert thresholds.is_exceeded is FALSE
    assert not operations.counts


def test_states_keep_their_form():
    """Tensors of a plain loop come back as tensors, numbers of a guard as numbers, with equal thresholds."""
    plan, limits = plan_of(BOTH), BOTH[:2]
    numbers, tensors = tuple(of_one(limit, limit.init(1)) for limit in limits), tuple(limit.init(1) for limit in limits)
    for loss in [*torch.rand(40).tolist(), math.nan, 1e6]:
        ours, numbers = evaluate(plan, measured(2.0, loss), numbers)
        theirs, tensors = evaluate(plan, measured(2.0, loss), tensors)
        assert (ours.norm.limit, ours.loss.limit) == (theirs.norm.limit, theirs.loss.limit)
        for one, other in zip(numbers, tensors, strict=True):
            same_states(one.state(), other)
    assert bool(ours.is_exceeded)


def test_a_number_beyond_float32_limits_nothing():
    thresholds, _ = evaluate(plan_of(SpikeLimits(FixedLimit(1e39))), measured(3e38), ({},))
    assert not bool(thresholds.is_exceeded)


def test_a_checkpoint_holds_tensors(trainer):
    """Whatever the steps are decided in: they can be loaded without running code, and by other versions."""
    guard = NonFiniteGuard(skip_above=RobustZScoreLimit(), loss_above=RobustZScoreLimit(4.0, scale="linear"))
    trainer(guard).fit(Regression(), data(5))
    state = guard.state_dict()
    for name, keys in (("skip_above", {"recent", "sorted", "count"}), ("loss_above", {"recent", "sorted", "count", "tail"})):
        held = state[name][0]["state"]
        assert held.keys() == keys
        assert all(isinstance(each, torch.Tensor) for each in held.values())
        assert held["count"].item() == 5


class Halved:
    """A mixin that is no limit."""

    def step(self, blocks, state):
        limits, after = super().step(blocks, state)
        return 0.5 * limits, after


class HalvedZScore(Halved, ZScoreLimit):
    """A limit whose step comes from the mixin."""


class HalvedAgain(HalvedZScore):
    """And one that inherits it."""


class HalvedLater(ZScoreLimit):
    """Its step is set once the class is there."""


HalvedLater.step = Halved.step


@pytest.mark.parametrize("kind", [HalvedZScore, HalvedAgain, HalvedLater])
def test_a_step_from_a_mixin_counts(kind):
    assert of_one(kind(warmup=2), kind(warmup=2).init(1)) is None
    assert of_one(ZScoreLimit(), ZScoreLimit().init(1)) is not None
