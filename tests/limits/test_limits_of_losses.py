"""Limits of losses: numbers of any sign, on a linear or a logarithmic scale."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_callbacks import (
    BlockNorms,
    ClipRule,
    CosineLimit,
    EmaLimit,
    FixedLimit,
    LinearLimit,
    QuantileLimit,
    RatioLimit,
    RobustZScoreLimit,
    TightestLimit,
    WarmupLimit,
    ZScoreLimit,
)
from clip_callbacks.core.limit_state import NamedLimitState, carry_over
from clip_callbacks.core.limits import label
from clip_callbacks.core.tensor_table import TensorTable
from tests.helpers import reference
from tests.helpers.laws import model
from tests.helpers.matrix import examples

LINEAR = RobustZScoreLimit(4.0, scale="linear")
SMALL = RobustZScoreLimit(2.0, window=12, warmup=3, floor=0.0, scale="linear")
REAL = st.floats(-1e6, 1e6, width=32)


def judged(limit, losses, state=None):
    """Return the limits of a history of losses, both of shape ``(steps, streams)``, and the state after it."""
    state, found = limit.init(losses.shape[1]) if state is None else state, []
    for now in losses:
        limits, state = limit.step(BlockNorms(now, are_losses=True), state)
        found.append(limits)
    return torch.stack(found), state


def drawn(kind, steps, streams):
    """Return losses without spikes, in units of their standard deviation where they have one."""
    normal, steps_done = torch.randn(steps, streams).double(), torch.arange(steps).double()[:, None]
    if kind in {"falling", "rising"}:
        return normal + (200 * torch.exp(-steps_done / 600) if kind == "falling" else 0.005 * steps_done)
    if kind == "normal":
        return normal
    freedom = int(kind.removeprefix("t"))
    return normal / torch.randn(freedom, steps, streams).double().square().mean(0).sqrt()


@pytest.mark.parametrize(
    ("limit", "takes"),
    [
        (LINEAR, True),
        (RobustZScoreLimit(), True),
        (FixedLimit(3.0), True),
        (LinearLimit(5.0, 1.0, 10), True),
        (CosineLimit(5.0, 1.0, 10), True),
        (TightestLimit(LINEAR, 12.0), True),
        (TightestLimit(LINEAR, QuantileLimit()), False),
        (WarmupLimit(LINEAR, steps=5, warmup_limit=12.0), True),
        (WarmupLimit(LINEAR, steps=5, warmup_limit=ZScoreLimit()), False),
        (EmaLimit(), False),
        (RatioLimit(), False),
    ],
    ids=lambda value: value if isinstance(value, bool) else label(value),
)
def test_which_limits_take_losses(limit, takes):
    assert limit.takes_losses is takes


@settings(deadline=None, max_examples=examples(60))
@given(st.lists(REAL, min_size=1, max_size=60), st.sampled_from(["linear", "log"]), st.sampled_from([0.0, 0.05]))
def test_losses_of_any_sign_equal_the_loop(losses, scale, floor):
    limit = RobustZScoreLimit(2.0, window=12, warmup=3, floor=floor, scale=scale)
    expected = reference.robust_limits_of(limit, losses, lambda loss: scale == "linear" or loss > 0)
    found = judged(limit, torch.tensor(losses, dtype=torch.float64)[:, None])[0]
    torch.testing.assert_close(found[:, 0], torch.tensor(expected, dtype=torch.float64))


@settings(deadline=None, max_examples=examples(30))
@given(st.lists(REAL, min_size=10, max_size=40), st.integers(-8, 8))
def test_scaled_losses_have_scaled_limits(losses, power):
    history = torch.tensor(losses, dtype=torch.float64)[:, None]
    assert torch.equal(judged(SMALL, history * 2.0**power)[0], judged(SMALL, history)[0] * 2.0**power)


@pytest.mark.parametrize("shift", [-7.0, 0.1, 1000.0])
def test_shifted_losses_have_shifted_limits_without_a_floor(shift):
    torch.manual_seed(0)
    losses = torch.randn(80, 20).double()
    torch.testing.assert_close(judged(SMALL, losses + shift)[0], judged(SMALL, losses)[0] + shift)


def test_streams_do_not_see_each_other():
    torch.manual_seed(1)
    losses, order = torch.randn(80, 6), torch.tensor([3, 0, 5, 1, 4, 2])
    limits, state = judged(SMALL, losses)
    permuted, state_permuted = judged(SMALL, losses[:, order])
    assert torch.equal(permuted, limits[:, order])
    assert all(torch.equal(state_permuted[key], value[..., order]) for key, value in state.items())


@pytest.mark.parametrize("height", [20.0, 1e30])
def test_spikes_hardly_lift_the_limit(height):
    torch.manual_seed(2)
    levels = torch.tensor([-3.0, 0.0, 8.0]).double().repeat(4)
    losses = levels + 0.1 * torch.randn(500, 12).double()
    quiet, _ = judged(LINEAR, losses)
    losses[[300, 400]] = height
    found, _ = judged(LINEAR, losses)
    assert (losses[[300, 400]] > found[[300, 400]]).all()
    ordinary = [step for step in range(500) if step not in {300, 400}]
    assert (found[ordinary] - levels <= 1.5 * (quiet[ordinary] - levels)).all()


def test_the_limit_follows_a_lasting_jump():
    torch.manual_seed(3)
    losses = torch.randn(420, 8).double()
    losses[250:] += 40.0
    above = losses > judged(LINEAR, losses)[0]
    assert above[250:280].all()
    assert not above[380:].any()


@pytest.mark.parametrize(
    ("z", "kinds"), [(3.0, ("normal", "t10", "t5", "t3", "falling", "rising")), (3.5, ("normal", "t10", "t5", "rising"))]
)
def test_false_alarms_of_ordinary_losses(z, kinds):
    """At most twice as many as a normal distribution has beyond z, whatever the tails; after some hundred losses."""
    torch.manual_seed(4)
    streams, unseen = 32, 500
    losses = torch.cat([drawn(kind, 1300, streams) for kind in kinds], 1)
    limits = judged(RobustZScoreLimit(z, scale="linear"), losses)[0]
    shares = (losses > limits)[unseen:].double().mean(0).unflatten(0, (-1, streams)).mean(1)
    assert (shares < 2 * NormalDist().cdf(-z)).all(), dict(zip(kinds, shares.tolist(), strict=True))
    # not because nothing is ever above the limit
    assert (shares[:3] > 0).all()


def test_jumps_of_eight_standard_deviations_are_found():
    torch.manual_seed(5)
    losses = drawn("normal", 900, 32)
    limits = judged(RobustZScoreLimit(3.5, scale="linear"), losses)[0]
    assert (losses + 8.0 > limits)[500:].double().mean() > 0.95


def test_a_loss_without_a_logarithm_leaves_no_trace():
    limit = RobustZScoreLimit(window=10, warmup=2)
    _, state = judged(limit, torch.tensor([[1.0], [2.0], [4.0]]))
    for loss in (0.0, -0.0, -5.0):
        limits, after = judged(limit, torch.tensor([[loss]]), state)
        assert loss < limits.item() < math.inf
        assert all(torch.equal(after[key], value) for key, value in state.items())


def test_zero_is_a_loss_and_no_norm():
    limit = RobustZScoreLimit(window=10, warmup=2, scale="linear")
    _, state = judged(limit, torch.tensor([[1.0], [2.0], [4.0]]))
    _, as_norm = limit.step(BlockNorms(torch.zeros(1)), state)
    assert all(torch.equal(as_norm[key], value) for key, value in state.items())
    _, as_loss = limit.step(BlockNorms(torch.zeros(1), are_losses=True), state)
    assert as_loss["count"].item() == 4
    assert as_loss["sorted"][0].item() == 0.0


def test_limits_of_norms_are_above_zero_on_the_linear_scale():
    limit, state = RobustZScoreLimit(2.0, window=5, warmup=2, floor=0.0, scale="linear"), None
    state = limit.init(2)
    for norms in ([1e-30, 3.0], [1e-30, 0.0], [0.0, 1e30], [1e-30, 1e-30], [1e-30, 2.0], [1.0, 0.0]):
        limits, state = limit.step(BlockNorms(torch.tensor(norms)), state)
        assert (limits > 0).all()


def test_a_window_of_logarithms_is_not_continued_as_one_of_values():
    table = TensorTable.of_named(model().named_parameters())
    log, linear = (NamedLimitState.fresh(ClipRule(RobustZScoreLimit(scale=scale)), table) for scale in ("log", "linear"))
    assert (log.kind, linear.kind) == ("RobustZScoreLimit", "RobustZScoreLimit(linear)")
    assert not carry_over(linear, [log]).is_carried
    assert carry_over(linear, [NamedLimitState.load(linear.dump())]).is_carried


def test_a_saved_state_continues_bit_for_bit():
    torch.manual_seed(6)
    losses = torch.randn(200, 3).double()
    whole, _ = judged(LINEAR, losses)
    first, state = judged(LINEAR, losses[:90])
    second, _ = judged(LINEAR, losses[90:], {key: value.clone() for key, value in state.items()})
    assert torch.equal(torch.cat([first, second]), whole)


def test_a_scale_is_one_of_two():
    with pytest.raises(ValueError, match="`scale` must be one of log, linear, got 'logarithmic'"):
        RobustZScoreLimit(scale="logarithmic")


@pytest.mark.parametrize("scale", ["log", "linear"])
@pytest.mark.parametrize("floor", [0.0, 0.05])
@pytest.mark.parametrize(("window", "warmup"), [(5, 2), (20, 7), (128, 25)])
def test_one_block_on_the_host_has_the_limit_of_many(scale, floor, window, warmup):
    """One block is judged with numbers of Python, several with operations of torch."""
    limit = RobustZScoreLimit(3.0, window=window, warmup=warmup, floor=floor, scale=scale)
    dice = torch.Generator().manual_seed(window)
    values = torch.randn(3 * window + 40, generator=dice, dtype=torch.float64)
    if scale == "log":
        values = values.exp()
    values[::37] *= 50.0
    values[::23] = 0.0
    values[40:60] = 1.0
    for are_losses in (False, True):
        one, two, steps = limit.init(1), limit.init(2), []
        for value in values:
            ours, one = limit.step(BlockNorms(value.reshape(1), are_losses=are_losses), one)
            theirs, two = limit.step(BlockNorms(value.expand(2).clone(), are_losses=are_losses), two)
            steps.append(({"limit": ours, **one}, {"limit": theirs, **two}))
        alone, of_many = (
            {key: torch.stack([torch.as_tensor(step[key]) for step in each]) for key in each[0]}
            for each in zip(*steps, strict=True)
        )
        torch.testing.assert_close(alone, {key: each[..., :1] for key, each in of_many.items()})


def test_a_limit_beyond_float64_is_inf():
    """The power of e that the logarithms lead to has no number."""
    limit = RobustZScoreLimit(4.0, warmup=2)
    state = limit.init(1)
    for norm in (1e-300, 1e300, 1.0):
        (found,), state = limit.step(BlockNorms(torch.tensor([norm], dtype=torch.float64)), state)
    assert state["count"].item() == 3
    assert found.item() == math.inf
