"""Bad input gets a clear error before anything is trained: argument, contract, value, what to do."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from lightning.pytorch import LightningModule

from clip_callbacks import (
    AccumulationRescaling,
    ClipRule,
    FixedLimit,
    GradientClipping,
    GradientNoiseScale,
    GradientNormMonitor,
    LabelTokens,
    NonFiniteGuard,
    clip_step,
)
from clip_callbacks.core.blocks import Selection
from clip_callbacks.core.tensor_table import TensorTable
from tests.helpers.training import Regression, assert_same_bits, data, weights


@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, "one", True, [1.0]])
@pytest.mark.parametrize("make", [GradientClipping, FixedLimit, ClipRule])
def test_max_norm(make, value):
    with pytest.raises(ValueError, match=r"`max_norm` must be a number above 0, .*got "):
        make(value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, "two", None])
@pytest.mark.parametrize("make", [GradientClipping, GradientNormMonitor])
def test_norm_type(make, value):
    with pytest.raises(ValueError, match=r'`norm_type` must be a number above 0 or "inf", got '):
        make(norm_type=value)


@pytest.mark.parametrize("make", [GradientClipping, ClipRule, GradientNormMonitor])
def test_scope(make):
    with pytest.raises(ValueError, match="`scope` must be one of global, group, layer, parameter(, unit)?, got 'tensor'"):
        make(scope="tensor")


def test_policy():
    with pytest.raises(ValueError, match="`nonfinite` must be one of skip, raise, zero, ignore, got 'drop'"):
        GradientClipping(nonfinite="drop")
    with pytest.raises(ValueError, match="`policy` must be one of skip, raise, zero, ignore, warn, got 'drop'"):
        NonFiniteGuard("drop")
    with pytest.raises(ValueError, match="`nonfinite` must be one of"):
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.grad = torch.tensor([math.nan])
        clip_step([weight], nonfinite="drop")


@pytest.mark.parametrize("value", [0, -1, 2.5, None])
def test_max_consecutive(value):
    with pytest.raises(ValueError, match="`max_consecutive` must be a whole number of at least 1, got "):
        NonFiniteGuard(max_consecutive=value)


FLAGS = [
    (kind, name)
    for kind in (AccumulationRescaling, GradientClipping, GradientNormMonitor, LabelTokens, NonFiniteGuard)
    for name, parameter in inspect.signature(kind).parameters.items()
    if parameter.annotation in {"bool", "bool | None"}
]


@pytest.mark.parametrize(("make", "name"), FLAGS)
@pytest.mark.parametrize("value", ["false", torch.ones(2), 2])
def test_flags(make, name, value):
    options = {"key": "labels"} if make is LabelTokens else {}
    with pytest.raises(ValueError, match=f"`{name}` must be True or False, got "):
        make(**options, **{name: value})


@pytest.mark.parametrize(("make", "name"), FLAGS)
def test_flags_of_0_and_1_are_kept_as_false_and_true(make, name):
    options = {"key": "labels"} if make is LabelTokens else {}
    if name == "both":
        options = {"skip_above": 1.0, "loss_above": 1.0}
    made = make(**options, **{name: 1})
    kept = getattr(made._options if make is NonFiniteGuard and name != "summary" else made, name)
    assert kept is True


def test_clip_value():
    with pytest.raises(ValueError, match="`clip_value` must be a number above 0"):
        GradientClipping(clip_value=-0.5)


@pytest.mark.parametrize("value", [0, 1.5])
def test_every_n_steps(value):
    with pytest.raises(ValueError, match="`every_n_steps` must be a whole number of at least 1, or None, got "):
        GradientNormMonitor(every_n_steps=value)


@pytest.mark.parametrize("options", [{"max_norm": 2.0}, {"scope": "layer"}])
def test_rules_beside_max_norm(options):
    with pytest.raises(ValueError, match="`rules` must not be given beside `max_norm` or `scope`"):
        GradientClipping(rules=[ClipRule(1.0)], **options)


def test_rules_of_the_wrong_kind():
    with pytest.raises(TypeError, match="`rules` must be a list of ClipRule, got"):
        GradientClipping(rules=[1.0])
    with pytest.raises(ValueError, match="`rules` must hold at least one ClipRule"):
        GradientClipping(rules=[])
    with pytest.raises(ValueError, match=r"`include` must be a regular expression, got '\('"):
        ClipRule(include="(")


def refused(trainer, match, *callbacks, module=None, loader=None, **options):
    module = module or Regression()
    before = weights(module)
    with pytest.raises(ValueError, match=match):
        trainer(*callbacks, **options).fit(module, loader or data())
    assert_same_bits(weights(module), before)


def test_a_pattern_without_a_match_lists_near_names(trainer):
    refused(
        trainer,
        r"`include` must match the name of a parameter, got 'net.0.wieght', which matches none of 4. Near names: net.0.weight",
        GradientClipping(rules=[ClipRule(1.0, include="net.0.wieght")]),
    )
    with pytest.raises(ValueError, match="Near names: 0.weight"):
        TensorTable.of(torch.nn.Sequential(torch.nn.Linear(2, 2)).named_parameters()).partition("layer", Selection("0.wait"))


def test_gradient_clip_val_beside_it(trainer):
    refused(trainer, r"`gradient_clip_val` must not be set beside GradientClipping", GradientClipping(), gradient_clip_val=0.5)


def test_a_package_that_sets_gradient_clip_val_is_told_none(trainer):
    def package(**trainer_kwargs):
        return trainer(GradientClipping(), **{"gradient_clip_val": 10.0, **trainer_kwargs})

    with pytest.raises(ValueError, match=r"pass gradient_clip_val=None through .*trainer_kwargs or pl_trainer_kwargs\)"):
        package().fit(Regression(), data(2))
    package(gradient_clip_val=None).fit(Regression(), data(2))


def test_a_package_whose_module_clips_is_derived_from(trainer):
    class OfPackage(Regression):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, gradient_clip_val=1.0)

    class Derived(OfPackage):
        configure_gradient_clipping = LightningModule.configure_gradient_clipping

    line = "configure_gradient_clipping = LightningModule.configure_gradient_clipping"
    refused(trainer, f"derive a class from it with the line `{line}`", GradientClipping(), module=OfPackage())
    trainer(GradientClipping()).fit(Derived(), data(2))


def test_configure_gradient_clipping_beside_it(trainer):
    class Own(Regression):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, gradient_clip_val=1.0)

    refused(trainer, r"`configure_gradient_clipping` must not be overridden", GradientClipping(), module=Own())
    trainer(NonFiniteGuard()).fit(Own(), data())  # the guard alone clips nothing


def test_two_of_a_kind(trainer):
    class Other(GradientClipping):
        pass

    twice = "must hold at most one clipping callback, got GradientClipping, {}: gradients would be clipped twice; give one"
    refused(trainer, twice.format(".*Other"), GradientClipping(), Other())
    refused(trainer, twice.format("GradientClipping"), GradientClipping(1.0), GradientClipping(2.0))
    refused(
        trainer,
        "must hold at most one guard callback, got NonFiniteGuard, NonFiniteGuard",
        NonFiniteGuard(),
        NonFiniteGuard("zero"),
    )
    refused(trainer, "must hold at most one rescaling callback", AccumulationRescaling(), AccumulationRescaling())
    refused(
        trainer, "one GradientNormMonitor for each scope, got .* every metric would be logged twice",
        GradientNormMonitor("layer"), GradientNormMonitor("layer", every_n_steps=3),
    )  # fmt: skip
    refused(trainer, "one noise scale callback, got .* would be logged twice", GradientNoiseScale(), GradientNoiseScale())


def test_different_norm_types(trainer):
    refused(
        trainer, r"`norm_type` must be the same for all callbacks of one Trainer, got \[1.0, 2.0\]",
        GradientClipping(), GradientNormMonitor(norm_type=1.0),
    )  # fmt: skip


def test_accumulation_under_lbfgs(trainer):
    refused(
        trainer, "AccumulationRescaling must not be used with LBFGS", AccumulationRescaling(),
        module=Regression(torch.optim.LBFGS),
    )  # fmt: skip


def test_the_state_of_other_rules_in_a_plain_loop():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    with pytest.raises(TypeError, match="`state` must be what the last call returned.*got 1.0. Pass a limit by name: "):
        clip_step([weight], 1.0)
    with pytest.raises(ValueError, match="`state` must hold one entry for each of 1 rules, shadows and skip_above, got 2"):
        clip_step([weight], ({}, {}))
