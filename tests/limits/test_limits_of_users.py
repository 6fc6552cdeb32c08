"""Limits that users write: what their steps return is checked in the step that returns it."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from clip_callbacks import ClipRule, FixedLimit, GradientClipping, Limit, NonFiniteGuard, TightestLimit, WarmupLimit, clip_step
from tests.helpers.training import Regression, data, make_trainer


class Returning(Limit):
    """A limit whose step returns what it is given, in place of the limits and the state."""

    takes_losses = True

    def __init__(self, returned, start=None):
        self.returned, self.start = returned, start

    def init(self, blocks):
        return {"k": torch.zeros(blocks)} if self.start is None else self.start

    def step(self, blocks, state):
        return self.returned(state) if callable(self.returned) else self.returned


PAIR, LIMITS, STATE = (f"`Returning.step` must return {what}" for what in ("the limits and the", "limits as one", "a state with"))
WRONG = [
    (None, PAIR, "None"),
    (1.0, PAIR, "1.0"),
    (torch.ones(2), PAIR, r"a tensor of shape \(2,\)"),
    ((1.0, {}, {}), PAIR, r"\(1.0, {}, {}\)"),
    (lambda state: (None, state), LIMITS, "None"),
    (lambda state: ([1.0, 1.0], state), LIMITS, r"\(1.0, 1.0\)"),
    (lambda state: (np.ones(2), state), LIMITS, r"array\(\[1., 1.\]\)"),
    (lambda state: (True, state), LIMITS, "True"),
    (lambda state: ("1", state), LIMITS, "'1'"),
    (lambda state: (10**400, state), LIMITS, "10000"),
    (lambda state: (1j, state), LIMITS, "1j"),
    (lambda state: (torch.ones(3), state), LIMITS, r"a tensor of shape \(3,\), torch.float32"),
    (lambda state: (torch.ones(1, 1), state), LIMITS, r"a tensor of shape \(1, 1\)"),
    (lambda state: (torch.ones((), dtype=torch.complex64), state), LIMITS, r"a tensor of shape \(\), torch.complex64"),
    ((1.0, None), STATE, "None"),
    ((1.0, {}), STATE, "{}"),
    ((1.0, {"other": torch.zeros(1)}), STATE, "{'other': a tensor"),
    ((1.0, {"k": torch.zeros(9)}), STATE, r"{'k': a tensor of shape \(9,\), torch.float32}: let `init`"),
    ((1.0, {"k": 0.0}), STATE, "{'k': 0.0}"),
    (lambda state: (1.0, {"k": state["k"].long()}), STATE, r".*torch.int64}: let"),
]
"""What a step may return by mistake, and what the error says."""

WITHIN = {
    "alone": lambda limit: limit,
    "tightest": lambda limit: TightestLimit(2.0, limit),
    "warm-up": lambda limit: WarmupLimit(1.0, steps=5, warmup_limit=limit),
}


def two():
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.tensor([0.3, 0.4])
    return parameters


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("scope", ["global", "parameter"])
@pytest.mark.parametrize(("returned", "contract", "got"), WRONG)
def test_what_a_step_must_not_return(returned, contract, got, scope, within):
    rule = ClipRule(WITHIN[within](Returning(returned)), scope)
    parameters = two()
    for options in ({"rules": [rule]}, {"shadow": [rule]}):
        with pytest.raises(ValueError, match=f"{contract}.* got {got}"):
            clip_step(parameters, **options)
    assert all(torch.equal(parameter.grad, torch.tensor([0.3, 0.4])) for parameter in parameters)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("option", ["max_norm", "skip_above"])
def test_other_places_of_a_limit(option, deferred):
    with pytest.raises(ValueError, match="`Returning.step` must return the limits"):
        clip_step(two(), **{option: Returning(None)}, nonfinite="ignore", deferred=deferred)


@pytest.mark.parametrize("make", [GradientClipping, lambda limit: NonFiniteGuard(loss_above=limit)])
def test_the_first_step_of_a_fit_raises(tmp_path, make):
    limit = Returning((1.0, {"k": torch.zeros(9)}))
    with pytest.raises(ValueError, match=r"`Returning.step` must return a state .* got {'k': a tensor of shape \(9,\)"):
        make_trainer(tmp_path, make(limit)).fit(Regression(), data(2))


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("deferred", [False, True])
def test_a_state_keeps_its_dtype_though_norms_have_another(within, deferred):
    """Norms of float64 gradients are float64, and so is one that overflows float32."""
    limit = WITHIN[within](Returning(lambda state: (2.0, {"k": state["k"].double() + 0.1})))
    _, state = clip_step(two(), max_norm=limit, nonfinite="ignore", deferred=deferred)
    _, state = clip_step(two(), state, max_norm=limit, nonfinite="ignore", deferred=deferred)
    (kept,) = [value for key, value in state[0].items() if key.endswith("k")]
    torch.testing.assert_close(kept, torch.tensor([0.2]))


class Writes(Limit):
    """Writes to everything that it is given, as a limit written with in-place operations does."""

    takes_losses = uses_weights = True

    def init(self, blocks):
        return {"k": torch.zeros(3, blocks), "steps": torch.zeros((), dtype=torch.int64)}

    def step(self, blocks, state):
        state["steps"] += 1
        state["k"].fill_(float("nan"))
        if blocks.weights is not None:
            blocks.weights.fill_(float("nan"))
        blocks.norms.mul_(0.5)
        return blocks.norms.clamp(min=1e-3), state


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("deferred", [False, True])
def test_a_limit_that_writes_to_what_it_is_given_changes_nothing_else(within, deferred):
    limit = WITHIN[within](Writes())
    _, before = clip_step(two(), max_norm=limit, nonfinite="ignore", deferred=deferred)
    kept = {key: value.clone() for key, value in before[0].items()}
    parameters = two()
    report, _ = clip_step(parameters, before, max_norm=limit, nonfinite="ignore", deferred=deferred)
    torch.testing.assert_close(report.total_norm, torch.tensor(0.5**0.5))
    torch.testing.assert_close(report.clipped_norm, 0.5 * report.total_norm)
    for key, value in kept.items():
        torch.testing.assert_close(before[0][key], value, equal_nan=True, msg=key)


@pytest.mark.filterwarnings("ignore:Spike:RuntimeWarning")
def test_a_threshold_that_writes_to_the_loss_changes_nothing_else(tmp_path):
    guard = NonFiniteGuard("warn", loss_above=Writes(), max_consecutive=100)
    fit = make_trainer(tmp_path, guard)
    fit.fit(Regression(), data(3))
    assert guard.spikes == 3
    torch.testing.assert_close(fit.callback_metrics["grad/loss_limit"], 0.5 * fit.callback_metrics["grad/loss"])


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("start", [torch.zeros(9), torch.zeros(1, 9), torch.zeros(2, 0)])
def test_a_state_has_the_blocks_as_its_last_dimension(start, within):
    with pytest.raises(ValueError, match=r"`Returning.init` must return tensors that are 0-dim or have the blocks as their last"):
        clip_step(two(), max_norm=WITHIN[within](Returning(None, {"k": start})))


@pytest.mark.parametrize("start", [{"k": 0}, [torch.zeros(1)], 3])
@pytest.mark.parametrize("within", WITHIN)
def test_what_init_must_not_return(start, within):
    with pytest.raises(ValueError, match="`Returning.init` must return a dictionary of tensors, got "):
        clip_step(two(), max_norm=WITHIN[within](Returning(None, start)))


@pytest.mark.parametrize("number", [1, Fraction(1), np.float64(1.0), np.float32(1.0), np.int64(1)])
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_a_number_of_any_type_limits_as_a_float(number, scope):
    """With the 1e-6 that torch adds to the norm under a fixed limit."""
    results = []
    for limit in (FixedLimit(1.0), Returning(lambda state: (number, state))):
        parameters = two()
        parameters[0].grad.mul_(3.0)
        clip_step(parameters, rules=[ClipRule(limit, scope)])
        results.append(torch.cat([parameter.grad for parameter in parameters]))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "limits", [math.inf, torch.tensor(0.1), torch.tensor([0.1]), torch.tensor([0.1, 0.2]), torch.tensor([1, 2])]
)
def test_limits_of_every_shape_that_fits(limits):
    report, _ = clip_step(two(), rules=[ClipRule(Returning(lambda state: (limits, state)), "parameter")])
    torch.testing.assert_close(report.limits, torch.as_tensor(limits, dtype=torch.float32).expand(2))


def test_steps_of_this_package_are_not_checked():
    class Inherited(FixedLimit):
        def step(self, blocks, state):
            return None

    assert FixedLimit._is_ours
    assert TightestLimit._is_ours
    assert not Inherited._is_ours
    with pytest.raises(ValueError, match="`Inherited.step` must return the limits"):
        clip_step(two(), max_norm=Inherited(1.0))
