"""The factors that fused optimizers apply."""

from __future__ import annotations

import math
from importlib import import_module
from unittest import mock

import pytest
import torch
from torch import nn

from clip_callbacks import (
    ClipRule,
    ParameterTable,
    clip_step,
)
from clip_callbacks.core.fused import detach_fused_factors
from tests.helpers.fused import ALL, FUSED, two_parameters
from tests.helpers.operations import WRITES, Operations
from tests.helpers.training import assert_same_bits, weights


@ALL
def test_no_gradient_is_written_before_the_kernel_does(trainer, name):
    parameters, optimizer = two_parameters(FUSED[name][0], **{k: v for k, v in FUSED[name][1].items() if k != "lr"})
    table = ParameterTable(optimizer)
    with Operations() as operations:
        report, _ = clip_step(table, rules=[ClipRule(1.0)], scale=0.5, fused=optimizer)
    assert not WRITES & set(operations.counts)
    assert all(torch.equal(parameter.grad, torch.full_like(parameter, 2.0)) for parameter in parameters)
    optimizer.step()
    clipped = torch.cat([parameter.grad for parameter in parameters])
    torch.testing.assert_close(clipped.norm(), report.clipped_norm)
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


def test_nothing_to_clip_sets_nothing():
    _, optimizer = two_parameters()
    clip_step(optimizer, rules=[ClipRule(100.0)], fused=optimizer)
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("deferred", [False, True])
def test_attributes_are_removed_after_an_exception_in_the_step(deferred):
    parameters, optimizer = two_parameters()
    clip_step(optimizer, rules=[ClipRule(0.1)], fused=optimizer, deferred=deferred)
    assert hasattr(optimizer, "grad_scale")
    with (
        mock.patch.object(import_module("torch.optim.adam"), "adam", side_effect=RuntimeError("out of memory")),
        pytest.raises(RuntimeError),
    ):
        optimizer.step()
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()  # no factor is left for this one
    assert all(torch.equal(parameter.grad, torch.full_like(parameter, 2.0)) for parameter in parameters)
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


def test_attributes_are_removed_on_request():
    _, optimizer = two_parameters()
    hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    clip_step(optimizer, rules=[ClipRule(0.1)], fused=optimizer)
    detach_fused_factors(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)) == hooks


class OwnStep(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(
    ("optimizer", "rules", "clip_value"),
    [
        (torch.optim.AdamW, [ClipRule(0.1, "parameter")], None),
        (torch.optim.AdamW, [ClipRule(0.1)], 0.01),
        (OwnStep, [ClipRule(0.1)], None),
    ],
)
def test_gradients_that_no_fused_optimizer_can_scale_are_written(optimizer, rules, clip_value):
    parameters, fused = two_parameters(optimizer)
    clip_step(fused, rules=rules, clip_value=clip_value, fused=fused)
    assert not hasattr(fused, "grad_scale")
    assert all(parameter.grad.max() < 0.2 for parameter in parameters)


def test_double_precision_is_written_since_the_kernels_take_factors_in_single():
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
    parameter.grad = torch.full_like(parameter, 2.0)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    clip_step(optimizer, rules=[ClipRule(0.1)], fused=optimizer)
    assert not hasattr(optimizer, "grad_scale")


def test_groups_that_a_checkpoint_made_unfused_are_written():
    parameters, optimizer = two_parameters()
    optimizer.load_state_dict(torch.optim.AdamW(parameters, fused=False).state_dict())
    clip_step(optimizer, rules=[ClipRule(0.1)], fused=optimizer)
    assert not hasattr(optimizer, "grad_scale")
    optimizer.step()


def test_plain_loop_with_a_grad_scaler():
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        net = nn.Linear(4, 1)
        optimizer, scaler = torch.optim.AdamW(net.parameters(), fused=fused), torch.amp.GradScaler("cpu", init_scale=1024.0)
        state = None
        for _ in range(5):
            optimizer.zero_grad()
            scaler.scale(net(torch.ones(8, 4)).square().sum()).backward()
            scaler.unscale_(optimizer)
            report, state = clip_step(optimizer, state, rules=[ClipRule(0.5)], fused=optimizer)
            assert report.clip_coef < 1
            scaler.step(optimizer)
            scaler.update()
        results.append(weights(net))
    torch.testing.assert_close(*results)


# What has gone wrong once


def test_factors_of_a_step_that_was_not_taken_are_not_for_the_next_one():
    parameters, optimizer = two_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    parameters[0].grad[0] = math.nan
    clip_step(optimizer, rules=[ClipRule(0.1)], fused=optimizer, deferred=True)
    assert hasattr(optimizer, "found_inf")
    parameters[0].grad[0] = 2.0  # the step was not taken
    clip_step(optimizer, rules=[ClipRule(100.0)], fused=optimizer)
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
    optimizer.step()
    assert all(torch.equal(parameter.grad, torch.full_like(parameter, 2.0)) for parameter in parameters)
    assert not any(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))


@pytest.mark.parametrize("deferred", [False, True])
def test_half_precision_as_default_keeps_factors_in_single(deferred):
    torch.set_default_dtype(torch.bfloat16)
    try:
        parameters, optimizer = two_parameters()
        clip_step(optimizer, rules=[ClipRule(0.1)], fused=optimizer, deferred=deferred)
        assert optimizer.grad_scale.dtype is torch.float32
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    clipped = torch.cat([parameter.grad for parameter in parameters]).float()
    torch.testing.assert_close(clipped.norm(), torch.tensor(0.1), rtol=1e-2, atol=0.0)


def test_a_part_of_an_optimizers_parameters_is_written():
    """A fused factor applies to all that the optimizer holds: each of two calls writes its own part."""
    parameters, optimizer = two_parameters()
    clip_step(parameters[:1], rules=[ClipRule(1.0)], fused=optimizer)
    clip_step(parameters[1:], rules=[ClipRule(0.5)], fused=optimizer)
    assert not hasattr(optimizer, "grad_scale")
    for parameter, limit in zip(parameters, (1.0, 0.5), strict=True):
        torch.testing.assert_close(parameter.grad.norm(), torch.tensor(limit))


def test_parameters_given_other_entries_in_mid_run():
    """Buckets of small tensors are planned once, although shapes and dtypes may change later."""
    parameters = [nn.Parameter(torch.zeros(8)) for _ in range(20)]
    table = ParameterTable(parameters)
    for change in (lambda i: torch.zeros(8), lambda i: torch.zeros(9 if i == 3 else 8), lambda i: torch.zeros(4, 2).double()):
        for i, parameter in enumerate(parameters):
            parameter.grad = None
            parameter.data = change(i)
            parameter.grad = torch.full_like(parameter, float(i))
        report, _ = clip_step(table, rules=[])
        expected = math.sqrt(sum(i * i * parameter.numel() for i, parameter in enumerate(parameters)))
        assert report.total_norm.item() == pytest.approx(expected, rel=1e-6)


def test_transposed_gradients_have_the_bits_of_torch():
    parameters = [nn.Parameter(torch.zeros(5, 7).t() if i % 2 else torch.zeros(7, 5)) for i in range(80)]
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.randn(5, 7).t() if i % 2 else torch.randn(7, 5)
    expected = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    for _ in range(2):
        report, _ = clip_step(ParameterTable(parameters), rules=[])
        assert torch.equal(report.total_norm, expected)


def test_a_default_device_is_not_where_reports_live():
    _, optimizer = two_parameters()
    torch.set_default_device("meta")
    try:
        for rules in ([ClipRule(1.0)], [ClipRule(1.0, "parameter")], [ClipRule(100.0)], []):
            report, _ = clip_step(optimizer, rules=rules, fused=optimizer)
            assert report.total_norm.is_cpu
            assert report.clip_coef.item() <= 1.0
            assert report.coefficients.is_cpu
        report, _ = clip_step(optimizer, rules=[ClipRule(0.5, "layer", name="each"), ClipRule(1.0, name="all")], fused=optimizer)
        assert all(value.is_cpu for value in report.metrics().values())
    finally:
        torch.set_default_device(None)


def test_a_fused_optimizer_that_holds_a_part_carries_no_factor():
    """Its kernel would leave the gradients of the rest unclipped; frozen parameters it need not hold."""
    held, rest, frozen = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = torch.optim.AdamW([held], fused=True)
    held.grad, rest.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    clip_step([held, rest], max_norm=1.0, fused=optimizer)
    torch.testing.assert_close(torch.stack([held.grad, rest.grad]), torch.tensor([[0.6, 0.0], [0.0, 0.8]]))
    held.grad = torch.tensor([3.0, 0.0])
    clip_step([held, frozen], max_norm=1.0, fused=optimizer)
    assert torch.equal(held.grad, torch.tensor([3.0, 0.0]))
    assert float(optimizer.grad_scale) == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize(("nonfinite", "skip_above", "bad"), [("skip", None, math.nan), ("ignore", 1e3, 1e6), ("skip", 1e3, 1e6)])
def test_a_bad_first_step_leaves_no_uninitialized_momentum(nonfinite, skip_above, bad, dampening):
    def trained(gradients, **options):
        parameter = torch.nn.Parameter(torch.zeros(1000))
        optimizer, state = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, dampening=dampening, fused=True), None
        for gradient in gradients:
            parameter.grad = torch.full((1000,), gradient)
            _, state = clip_step([parameter], state, max_norm=1e9, fused=optimizer, **options)
            optimizer.step()
        return [parameter]

    ours = trained([bad, 1.0, 2.0, bad, 3.0], nonfinite=nonfinite, skip_above=skip_above, deferred=True)
    assert_same_bits(ours, trained([1.0, 2.0, 3.0]))


def pair_of_which_the_optimizer_holds_the_first():
    held, lacking = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    lacking.requires_grad_(False)
    optimizer = torch.optim.SGD([held], lr=1.0, fused=True)
    table = ParameterTable([held, lacking])
    held.grad = torch.full((1,), 3.0)
    clip_step(table, max_norm=1.0, fused=optimizer)
    assert hasattr(optimizer, "grad_scale")
    held.grad, lacking.grad = torch.full((1,), 3.0), None
    return held, lacking, optimizer, table


@pytest.mark.parametrize("unfreezes", [True, False], ids=["unfrozen", "a gradient by hand"])
def test_a_gradient_that_the_optimizer_lacks_is_clipped_from_the_step_on_in_which_it_appears(unfreezes):
    held, lacking, optimizer, table = pair_of_which_the_optimizer_holds_the_first()
    lacking.requires_grad_(unfreezes)
    lacking.grad = torch.full((1,), 4.0)
    clip_step(table, max_norm=1.0, fused=optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert [float(held.grad), float(lacking.grad)] == pytest.approx([0.6, 0.8])
    held.grad, lacking.grad = torch.full((1,), 3.0), None
    clip_step(table, max_norm=1.0, fused=optimizer)
    assert float(held.grad) == 3.0, "left to the kernel again"
    assert float(optimizer.grad_scale) == pytest.approx(3.0, rel=1e-5)


def test_a_deferred_step_with_a_gradient_that_the_optimizer_lacks_is_refused():
    _, lacking, optimizer, table = pair_of_which_the_optimizer_holds_the_first()
    lacking.requires_grad_(True).grad = torch.full((1,), 4.0)
    with pytest.raises(ValueError, match="`deferred` needs nonfinite"):
        clip_step(table, max_norm=1.0, fused=optimizer, deferred=True)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [(slice(0, 1), torch.float32), (slice(0, 3), torch.float32), (slice(0, 2), torch.float64)],
    ids=["fewer", "more", "float64"],
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_first_step_that_cannot_be_deferred_is_refused_as_those_after_it(given, dtype, momentum):
    """The host would decide about a first step with momentum; of fewer parameters the others would move unclipped."""
    tensors = [nn.Parameter(torch.zeros(1, dtype=dtype)) for _ in range(3)]
    for tensor in tensors:
        tensor.grad = torch.full((1,), 3.0, dtype=dtype)
    optimizer = torch.optim.SGD(tensors[:2], lr=1.0, momentum=momentum, fused=True)
    with pytest.raises(ValueError, match="`deferred` needs nonfinite"):
        clip_step(tensors[given], max_norm=1.0, fused=optimizer, deferred=True)


def test_a_parameter_that_another_one_takes_the_place_of_is_lacking():
    first, second, other = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=1.0, fused=True)
    table = ParameterTable([first, second])
    for replaced in (False, True):
        if replaced:
            optimizer.param_groups[1]["params"][0] = other
        first.grad, second.grad = torch.full((1,), 3.0), torch.full((1,), 4.0)
        clip_step(table, max_norm=1.0, fused=optimizer)
        expected = [0.6, 0.8] if replaced else [3.0, 4.0]
        assert [float(first.grad), float(second.grad)] == pytest.approx(expected)
