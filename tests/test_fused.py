"""The write that rides on fused optimizers, and steps that are decided on the device."""

from __future__ import annotations

import contextlib
import math
from importlib import import_module
from unittest import mock

import pytest
import torch
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, Subset

from clip_callbacks import (
    AccumulationRescaling,
    ClipRule,
    GradientClipping,
    GradientNormMonitor,
    NonFiniteGradientError,
    NonFiniteGuard,
    ParameterTable,
    clip_step,
)
from clip_callbacks.fused import starts_momentum, take_back
from tests.conftest import TRUSTING, Poisoned, Regression, assert_same_bits, data, weights
from tests.test_budget import WRITES, Operations

FUSED = {
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "SGD-momentum": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    "SGD-dampening": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "SGD-nesterov": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
}
ALL = pytest.mark.parametrize("name", FUSED)


def network(name, *, fused=True, poison=None, net=None):
    optimizer, options = FUSED[name]
    torch.manual_seed(0)
    return Poisoned(poison or {}, optimizer=optimizer, fused=fused, net=net, **options)


def on_device(policy="skip", **options):
    return NonFiniteGuard(policy, deferred=True, **options)


def scaled(**options):
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **options))]}


def state_of(fit):
    """Every tensor of the optimizer's state, in order."""
    states = fit.optimizers[0].state_dict()["state"]
    return [
        torch.as_tensor(value) for _, state in sorted(states.items()) for _, value in sorted(state.items()) if value is not None
    ]


def two_parameters(optimizer=torch.optim.AdamW, **options):
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    return parameters, optimizer(parameters, lr=0.1, fused=True, **options)


# The ride


@ALL
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("batches", [1, 3])
def test_equal_to_the_unfused_path(trainer, name, deferred, batches):
    results = []
    for fused in (True, False):
        family = [GradientClipping(0.5), AccumulationRescaling(), NonFiniteGuard(deferred=deferred and fused)]
        module = network(name, fused=fused)
        fit = trainer(*family, accumulate_grad_batches=batches, max_epochs=8, log_every_n_steps=3)
        fit.fit(module, data(10))
        metrics = {key: value for key, value in fit.callback_metrics.items() if key.startswith("grad/")}
        results.append((weights(module), state_of(fit), metrics))
    torch.testing.assert_close(results[0], results[1])
    assert results[0][2]["grad/clip_coef"] < 1.0


@ALL
def test_no_gradient_is_written_before_the_kernel_does(trainer, name):
    parameters, optimizer = two_parameters(FUSED[name][0], **{k: v for k, v in FUSED[name][1].items() if k != "lr"})
    table = ParameterTable.of(optimizer)
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
def test_attributes_are_taken_back_after_an_exception_in_the_step(deferred):
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
    optimizer.step()  # nothing rides on this one
    assert all(torch.equal(parameter.grad, torch.full_like(parameter, 2.0)) for parameter in parameters)
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


def test_attributes_are_taken_back_on_request():
    _, optimizer = two_parameters()
    hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    clip_step(optimizer, rules=[ClipRule(0.1)], fused=optimizer)
    take_back(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)) == hooks


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("scaler", [False, True])
def test_attributes_are_taken_back_after_an_exception_in_the_trainer(trainer, deferred, scaler):
    class Bomb(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 2:
                raise KeyError("boom")

    module = network("AdamW")
    fit = trainer(GradientClipping(1e-3), NonFiniteGuard(deferred=deferred), Bomb(), **(scaled() if scaler else {}))
    with pytest.raises(KeyError):
        fit.fit(module, data())
    (optimizer,) = fit.optimizers
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
    assert not optimizer._optimizer_step_pre_hooks


def test_a_step_without_the_callback_is_not_scaled_by_an_earlier_one(trainer):
    class Twice(Regression):
        def __init__(self):
            super().__init__(torch.optim.SGD, lr=1.0, fused=True)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.zero_grad()
            self.manual_backward(self.loss(batch, batch_idx))
            self.optimizers().step()
            before = [parameter.grad.clone() for parameter in self.parameters()]
            self.optimizers().optimizer.step()  # around Lightning: no hook is called
            assert_same_bits(before, [parameter.grad for parameter in self.parameters()])

    trainer(GradientClipping(0.1)).fit(Twice(), data(3))


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
def test_what_cannot_ride_is_written(optimizer, rules, clip_value):
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


# Decided on the device


@ALL
@pytest.mark.parametrize("poisoned", [(0,), (3,), (0, 1), (4, 5), (7,)])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_deferred_skip_never_happened(trainer, name, poisoned, poison):
    """Bit for bit the run that never saw the bad batches, batch statistics too."""

    def net():
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    guard = on_device()
    bad = network(name, poison=dict.fromkeys(poisoned, poison), net=net())
    torch.manual_seed(1)
    bad.net = net()
    fit = trainer(guard, GradientClipping(0.5))
    with pytest.warns(RuntimeWarning, match="the step is skipped"):
        fit.fit(bad, data(8))

    clean = network(name, net=net())
    torch.manual_seed(1)
    clean.net = net()
    everything = data(8).dataset
    good = [row for row in range(len(everything)) if row // 4 not in poisoned]
    other = trainer(on_device(), GradientClipping(0.5))
    other.fit(clean, DataLoader(Subset(everything, good), batch_size=4))

    assert_same_bits(weights(bad), weights(clean))
    assert_same_bits(list(bad.buffers()), list(clean.buffers()))
    assert_same_bits(state_of(fit), state_of(other))
    assert guard.skipped_steps == len(poisoned)


def test_the_first_step_of_momentum_is_decided_on_the_host():
    parameters, optimizer = two_parameters(torch.optim.SGD, momentum=0.9)
    assert starts_momentum(optimizer)
    optimizer.step()
    assert not starts_momentum(optimizer)
    for parameter in parameters:
        parameter.grad = None
    assert not starts_momentum(torch.optim.SGD(parameters, lr=0.1, fused=True))


def test_the_verdict_is_known_one_step_later_or_when_asked_for(trainer):
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(guard.state_dict()["counters"][0]["skipped"] if trainer.global_step == 6 else guard.skipped_steps_of(0))

    guard = on_device()
    with pytest.warns(RuntimeWarning) as caught:
        trainer(guard, GradientClipping(0.5), Watch(), log_every_n_steps=100).fit(
            network("AdamW", poison={1: math.nan, 5: math.nan}), data(8)
        )
    assert seen == [0, 0, 1, 1, 1, 2, 2, 2]
    messages = [str(w.message) for w in caught if "Non-finite" in str(w.message)]
    assert [message.split(":")[0] for message in messages] == [
        f"Non-finite gradients at step {step}, epoch 0, batch {step}, rank 0" for step in (1, 5)
    ]
    assert "Stage: the loss is non-finite" in messages[0]
    assert "net.0.weight [8, 4]: norm nan" in messages[0]


def test_logged_values_are_those_of_the_step(trainer, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logs = []
    for deferred in (True, False):
        logger = CSVLogger(tmp_path, version=str(deferred))
        family = [NonFiniteGuard(deferred=deferred), GradientClipping(0.5), GradientNormMonitor()]
        with pytest.warns(RuntimeWarning, match="skipped"):
            trainer(*family, logger=logger, log_every_n_steps=2, max_epochs=2).fit(network("AdamW", poison={4: math.nan}), data(9))
        logs.append((tmp_path / "lightning_logs" / str(deferred) / "metrics.csv").read_text())
    assert logs[0] == logs[1]


def test_a_streak_of_deferred_bad_steps_stops_the_run(trainer):
    guard = on_device(max_consecutive=3)
    fit = trainer(guard)
    with pytest.raises(NonFiniteGradientError, match=r"at step 4.*bad step 3 in a row"), pytest.warns(RuntimeWarning):
        fit.fit(network("SGD", poison=dict.fromkeys(range(2, 20), math.nan)), data(12))
    assert fit.global_step == 5, "learnt one step later; the parameters are as they were before the first"


def test_a_streak_at_the_end_is_not_lost(trainer):
    with pytest.raises(NonFiniteGradientError, match="bad step 2 in a row"), pytest.warns(RuntimeWarning):
        trainer(on_device(max_consecutive=2)).fit(network("SGD", poison={6: math.nan, 7: math.nan}), data(8))


def test_resume_counts_deferred_skips(trainer, tmp_path):
    fit = trainer(on_device(), GradientClipping(0.5))
    with pytest.warns(RuntimeWarning, match="skipped"):
        fit.fit(network("AdamW", poison={7: math.nan}), data(8))
    fit.save_checkpoint(tmp_path / "end.ckpt")
    guard = on_device()
    trainer(guard, GradientClipping(0.5), max_epochs=2).fit(network("AdamW"), data(8), ckpt_path=tmp_path / "end.ckpt", **TRUSTING)
    assert guard.skipped_steps == 1


@pytest.mark.parametrize(
    ("family", "optimizer", "reason"),
    [
        ([GradientClipping(1.0, scope="layer")], {"fused": True}, "more than one factor"),
        ([GradientClipping(1.0, clip_value=0.1)], {"fused": True}, "more than one factor"),
        ([], {"foreach": True}, "is not fused"),
        ([], {"fused": True, "schedule": True}, "hold_schedulers"),
    ],
)
def test_what_cannot_be_deferred_is_refused_if_asked_for_and_decided_at_once_if_not(trainer, family, optimizer, reason):
    class Scheduled(Regression):
        def configure_optimizers(self):
            made = super().configure_optimizers()
            return {"optimizer": made, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LinearLR(made), "interval": "step"}}

    schedule = optimizer.pop("schedule", False)
    make = Scheduled if schedule else Regression
    with pytest.raises(ValueError, match=f"`deferred` cannot be True here: .*{reason}"):
        trainer(on_device(), *family).fit(make(torch.optim.AdamW, **optimizer), data(3))
    trainer(NonFiniteGuard(), *family).fit(make(torch.optim.AdamW, **optimizer), data(3))
    optimizer["schedule"] = schedule


@pytest.mark.parametrize("policy", ["raise", "zero"])
def test_policies_that_look_first_are_not_deferred(trainer, policy):
    with pytest.raises(ValueError, match="`deferred` cannot be True here: the guard looks at bad gradients"):
        trainer(on_device(policy)).fit(network("AdamW"), data(3))


def test_clip_step_refuses_what_it_cannot_defer():
    _, optimizer = two_parameters()
    with pytest.raises(ValueError, match="one factor for all gradients"):
        clip_step(optimizer, rules=[ClipRule(1.0, "parameter")], fused=optimizer, deferred=True)
    with pytest.raises(ValueError, match="only a fused optimizer can stand still"):
        clip_step(optimizer, deferred=True)
    with pytest.raises(ValueError, match="only a fused optimizer can stand still"):
        clip_step(optimizer, fused=optimizer, nonfinite="zero", deferred=True)


@pytest.mark.parametrize("size", [0.0, 1.0, 1e-3, math.nan])
def test_deferred_without_an_optimizer_multiplies_and_leaves_bad_gradients_alone(size):
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), size)
    expected = torch.full((3,), size) * (0.1 / (math.sqrt(3) * size + 1e-6) if size == 1.0 else 1.0)
    report, _ = clip_step([parameter], rules=[ClipRule(0.1)], nonfinite="ignore", deferred=True)
    torch.testing.assert_close(parameter.grad, expected, equal_nan=True)
    assert bool(report.finite) is math.isfinite(size)
    assert 0 <= report.clip_coef <= 1


# 16-mixed


@ALL
@pytest.mark.parametrize("deferred", [False, True])
def test_16_mixed_fused_equals_unfused_over_200_steps(trainer, tmp_path, name, deferred):
    from lightning.pytorch.loggers import CSVLogger

    pandas = pytest.importorskip("pandas")
    results = []
    for fused in (True, False):
        logger = CSVLogger(tmp_path, version=f"{fused}")
        module = network(name, fused=fused)
        family = [GradientClipping(0.5), NonFiniteGuard(deferred=deferred and fused)]
        fit = trainer(*family, logger=logger, max_steps=200, max_epochs=-1, **scaled(init_scale=2.0**20, growth_interval=50))
        fit.fit(module, data(20, size=1.0))
        table = pandas.read_csv(tmp_path / "lightning_logs" / f"{fused}" / "metrics.csv")
        results.append((weights(module), table, fit.precision_plugin.scaler.get_scale(), family[1].overflowed_steps))
    (ours, log, scale, overflows), (theirs, other_log, other_scale, other_overflows) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # 200 float16 forward passes amplify roundings of 1e-7
    norms, other_norms = (torch.tensor(table["grad/total_norm"].dropna().to_numpy()) for table in (log, other_log))
    torch.testing.assert_close(norms, other_norms, rtol=1e-3, atol=0.0)
    assert (scale, overflows) == (other_scale, other_overflows)
    assert (log["grad/clip_coef"].dropna() < 1).any()


@ALL
@pytest.mark.parametrize("deferred", [False, True])
def test_the_scaler_sees_overflows_and_momentum_survives_the_first(trainer, name, deferred):
    guard = NonFiniteGuard(max_consecutive=1, deferred=deferred)
    module = network(name)
    fit = trainer(guard, GradientClipping(0.5), max_epochs=2, **scaled(init_scale=2.0**30))
    fit.fit(module, data(size=1.0))
    assert 0 < guard.overflowed_steps < 24
    assert fit.precision_plugin.scaler.get_scale() == 2.0 ** (30 - guard.overflowed_steps)
    assert guard.skipped_steps == 0
    assert all(torch.isfinite(tensor).all() for tensor in [*weights(module), *state_of(fit)])
    other = network(name, fused=False)
    trainer(NonFiniteGuard(), GradientClipping(0.5), max_epochs=2, **scaled(init_scale=2.0**30)).fit(other, data(size=1.0))
    torch.testing.assert_close(weights(module), weights(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["layer", "parameter"])
def test_16_mixed_fused_with_local_norms(trainer, scope):
    results = []
    for fused in (True, False):
        module = network("AdamW", fused=fused)
        trainer(GradientClipping(0.1, scope=scope), **scaled(init_scale=1024.0)).fit(module, data(size=1.0))
        results.append(weights(module))
    torch.testing.assert_close(*results)


def test_16_mixed_fused_needs_no_pass_of_the_scaler(trainer):
    with mock.patch("torch.amp.GradScaler._unscale_grads_", side_effect=AssertionError):
        trainer(GradientClipping(0.5), **scaled()).fit(network("AdamW"), data(size=1.0))


@pytest.mark.parametrize("deferred", [False, True])
def test_last_micro_batch_none_takes_no_step(trainer, deferred):
    clipping = GradientClipping(0.5)
    module = network("SGD", poison={3: None})
    family = [clipping, AccumulationRescaling(), NonFiniteGuard(deferred=deferred)]
    fit = trainer(*family, accumulate_grad_batches=2, **scaled(init_scale=1024.0))
    fit.fit(module, data(6, size=1.0))
    assert clipping.state_dict()["history"][0]["steps"] == 2
    assert fit.callback_metrics["grad/total_norm"] < 100, "never a norm with the loss scale in it"


@pytest.mark.parametrize("deferred", [False, True])
def test_an_earlier_micro_batch_none(trainer, deferred):
    results = []
    for fused in (True, False):
        module = network("AdamW", fused=fused, poison={2: None})
        family = [GradientClipping(0.5), AccumulationRescaling(), NonFiniteGuard(deferred=deferred and fused)]
        trainer(*family, accumulate_grad_batches=2, **scaled(init_scale=1024.0)).fit(module, data(6, size=1.0))
        results.append(weights(module))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("deferred", [False, True])
def test_a_loss_that_no_scale_can_cure_counts_as_bad(trainer, deferred):
    guard = NonFiniteGuard(deferred=deferred)
    with pytest.warns(RuntimeWarning, match="the loss is non-finite"):
        trainer(guard, GradientClipping(0.5), **scaled(init_scale=1024.0)).fit(
            network("AdamW", poison={4: math.nan}), data(size=1.0)
        )
    assert (guard.skipped_steps, guard.overflowed_steps) == (1, 0)


@pytest.mark.parametrize("policy", ["zero", "ignore"])
def test_whatever_the_policy_the_scaler_skips(trainer, policy):
    module = network("SGD-momentum", poison={0: math.nan})
    guard = NonFiniteGuard(policy)
    with mock.patch("clip_callbacks.callbacks._bad_steps.rank_zero_warn"):
        fit = trainer(guard, **scaled(init_scale=1024.0))
        fit.fit(module, data(size=1.0))
    assert all(torch.isfinite(tensor).all() for tensor in [*weights(module), *state_of(fit)])


def test_manual_optimization_of_two_fused_optimizers_under_a_scaler(trainer):
    from tests.test_clipping import TwoNetworks

    class Fused(TwoNetworks):
        def configure_optimizers(self):
            return [torch.optim.AdamW(net.parameters(), lr=0.01, fused=True) for net in self.children()]

    fit = trainer(GradientClipping(1.0), **scaled(init_scale=1024.0))
    fit.fit(Fused(), data())
    assert fit.callback_metrics["grad/total_norm-AdamW"] < 100
    assert fit.callback_metrics["grad/clipped_norm-AdamW-1"] <= 1.0


def test_optimizers_that_unscale_for_themselves_are_refused(trainer):
    class Apex(torch.optim.AdamW):
        _step_supports_amp_scaling = True

        def step(self, closure=None, *, grad_scaler=None):
            return super().step(closure)

    with pytest.raises(ValueError, match=r"`optimizer` must leave unscaling to its caller under a GradScaler, got Apex"):
        trainer(GradientClipping(0.5), **scaled()).fit(Regression(Apex), data())


# What has gone wrong once


def test_what_has_not_ridden_is_not_for_the_next_step():
    parameters, optimizer = two_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    parameters[0].grad[0] = math.nan
    clip_step(optimizer, rules=[ClipRule(0.1)], fused=optimizer, deferred=True)
    assert hasattr(optimizer, "found_inf")
    parameters[0].grad[0] = 2.0  # the user left the step out
    clip_step(optimizer, rules=[ClipRule(100.0)], fused=optimizer)
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
    optimizer.step()
    assert all(torch.equal(parameter.grad, torch.full_like(parameter, 2.0)) for parameter in parameters)
    assert not any(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))


class Veto(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if pl_module.batch_idx in (1, 4):
            raise KeyError("not now")


@pytest.mark.parametrize("deferred", [False, True])
def test_a_step_that_a_later_callback_prevented_leaves_nothing_behind(trainer, deferred):
    class Manual(Regression):
        def __init__(self, **options):
            super().__init__(torch.optim.AdamW, lr=0.1, **options)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.batch_idx = batch_idx
            self.zero_grad()
            self.manual_backward(self.loss(batch, batch_idx) * (1.0 if batch_idx in (0, 1, 4) else 1e-3))
            with contextlib.suppress(KeyError):
                self.optimizers().step()

    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        module = Manual(fused=fused)
        trainer(GradientClipping(0.1), NonFiniteGuard(deferred=deferred and fused), Veto()).fit(module, data(8))
        results.append(weights(module))
    torch.testing.assert_close(*results)


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


def test_manual_optimization_in_bf16_true(trainer):
    class Manual(Regression):
        def __init__(self, **options):
            super().__init__(torch.optim.SGD, lr=0.1, **options)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.zero_grad()
            self.manual_backward(self.loss(batch, batch_idx))
            self.optimizers().step()

    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        module = Manual(fused=fused)
        trainer(GradientClipping(0.1), precision="bf16-true").fit(module, data(3))
        results.append(weights(module))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path:UserWarning")  # Lightning looks for a checkpoint of its own
def test_a_pending_verdict_is_in_the_checkpoint_that_an_exception_leaves(trainer, tmp_path):
    class Bomb(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 5:
                raise KeyError("boom")

    guard = on_device()
    family = [OnExceptionCheckpoint(tmp_path, filename="last"), guard, GradientClipping(0.5), Bomb()]
    with pytest.raises(KeyError), pytest.warns(RuntimeWarning, match="at step 5"):
        trainer(*family, log_every_n_steps=100, enable_checkpointing=True).fit(network("AdamW", poison={5: math.nan}), data(8))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][guard.state_key]
    assert saved["counters"][0]["skipped"] == 1


def test_an_optimizer_replaced_in_mid_epoch_loses_no_verdict(trainer):
    class Replacing(Poisoned):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 4:
                old = self.trainer.optimizers[0]
                self.old = old
                self.trainer.optimizers = [torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)]

    guard = on_device()
    module = Replacing({3: math.nan, 6: math.nan}, optimizer=torch.optim.AdamW, fused=True)
    with pytest.warns(RuntimeWarning, match="the step is skipped"):
        trainer(guard, GradientClipping(0.01), log_every_n_steps=100).fit(module, data(8))
    assert guard.skipped_steps == 2
    assert not {"grad_scale", "found_inf"} & set(vars(module.old))
    assert not module.old._optimizer_step_pre_hooks


def test_a_part_of_an_optimizers_parameters_does_not_ride():
    """What rides is for all that the optimizer holds: of two calls each writes its own part."""
    parameters, optimizer = two_parameters()
    clip_step(parameters[:1], rules=[ClipRule(1.0)], fused=optimizer)
    clip_step(parameters[1:], rules=[ClipRule(0.5)], fused=optimizer)
    assert not hasattr(optimizer, "grad_scale")
    for parameter, limit in zip(parameters, (1.0, 0.5), strict=True):
        torch.testing.assert_close(parameter.grad.norm(), torch.tensor(limit))


def test_counts_are_up_to_date_when_asked_for(trainer):
    seen = []

    class Ask(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append((guard.skipped_steps, guard.overflowed_steps))

    guard = on_device()
    with pytest.warns(RuntimeWarning, match="the step is skipped"):
        trainer(guard, Ask(), log_every_n_steps=100, **scaled(init_scale=2.0**20)).fit(
            network("AdamW", poison={9: math.nan}), data(12, size=1.0)
        )
    assert seen[:3] == [(0, 1), (0, 2), (0, 3)]
    assert [skipped for skipped, _ in seen] == [0] * 9 + [1] * 3
    assert seen[-1] == (1, guard.overflowed_steps)


def test_parameters_given_other_entries_in_mid_run():
    """Buckets of small tensors are planned once; shapes and dtypes may change under them."""
    parameters = [nn.Parameter(torch.zeros(8)) for _ in range(20)]
    table = ParameterTable.of_tensors(parameters)
    for change in (lambda i: torch.zeros(8), lambda i: torch.zeros(9 if i == 3 else 8), lambda i: torch.zeros(4, 2).double()):
        for i, parameter in enumerate(parameters):
            parameter.grad = None
            parameter.data = change(i)
            parameter.grad = torch.full_like(parameter, float(i))
        report, _ = clip_step(table, rules=[])
        expected = math.sqrt(sum(i * i * parameter.numel() for i, parameter in enumerate(parameters)))
        assert report.total_norm.item() == pytest.approx(expected, rel=1e-6)


def test_transposed_gradients_have_the_bits_of_torch():
    parameters = [nn.Parameter(torch.zeros(5, 7).t() if i % 2 else torch.zeros(7, 5)) for i in range(24)]
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.randn(5, 7).t() if i % 2 else torch.randn(7, 5)
    expected = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    for _ in range(2):
        report, _ = clip_step(ParameterTable.of_tensors(parameters), rules=[])
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
    finally:
        torch.set_default_device(None)
