"""Fused optimizers under a GradScaler."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

from clip_callbacks import (
    AccumulationRescaling,
    GradientClipping,
    NonFiniteGuard,
)
from tests.helpers.fused import ALL, network, state_of
from tests.helpers.training import Regression, data, scaled, weights

# 16-mixed


PATHS = ({"fused": False}, {"fused": True}, {"fused": True, "deferred": True})
"""The unfused path, and the two that must equal it."""


@ALL
@pytest.mark.parametrize("steps", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_16_mixed_fused_equals_unfused_over_many_steps(trainer, tmp_path, name, steps):
    """The loss scale falls at first, and grows again several times."""
    from lightning.pytorch.loggers import CSVLogger

    pandas = pytest.importorskip("pandas")

    def run(fused, deferred=False):
        logger = CSVLogger(tmp_path, version=f"{fused} {deferred}")
        module = network(name, fused=fused)
        family = [GradientClipping(0.5), NonFiniteGuard(deferred=deferred)]
        fit = trainer(
            *family, logger=logger, max_steps=steps, max_epochs=-1, **scaled(init_scale=2.0**20, growth_interval=steps // 4)
        )
        fit.fit(module, data(20, size=1.0))
        table = pandas.read_csv(f"{logger.log_dir}/metrics.csv")
        return weights(module), table, fit.precision_plugin.scaler.get_scale(), family[1].overflowed_steps

    (theirs, other_log, other_scale, other_overflows), *fused_runs = [run(**path) for path in PATHS]
    for ours, log, scale, overflows in fused_runs:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # many float16 forward passes amplify roundings of 1e-7
        norms, other_norms = (torch.tensor(table["grad/total_norm"].dropna().to_numpy()) for table in (log, other_log))
        torch.testing.assert_close(norms, other_norms, rtol=1e-3, atol=0.0)
        assert (scale, overflows) == (other_scale, other_overflows)
        assert (log["grad/clip_coef"].dropna() < 1).any()


@ALL
def test_the_scaler_sees_overflows_and_momentum_survives_the_first(trainer, name):
    def run(guard, *, fused):
        module = network(name, fused=fused)
        fit = trainer(guard, GradientClipping(0.5), max_epochs=2, **scaled(init_scale=2.0**30))
        fit.fit(module, data(size=1.0))
        return module, fit

    other, _ = run(NonFiniteGuard(), fused=False)
    for deferred in (False, True):
        guard = NonFiniteGuard(max_consecutive=1, deferred=deferred)
        module, fit = run(guard, fused=True)
        assert 0 < guard.overflowed_steps < 24
        assert fit.precision_plugin.scaler.get_scale() == 2.0 ** (30 - guard.overflowed_steps)
        assert guard.skipped_steps == 0
        assert all(torch.isfinite(tensor).all() for tensor in [*weights(module), *state_of(fit)])
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


@pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")
@pytest.mark.parametrize("policy", ["zero", "ignore"])
def test_whatever_the_policy_the_scaler_skips(trainer, policy):
    module = network("SGD-momentum", poison={0: math.nan})
    guard = NonFiniteGuard(policy)
    fit = trainer(guard, **scaled(init_scale=1024.0))
    fit.fit(module, data(size=1.0))
    assert all(torch.isfinite(tensor).all() for tensor in [*weights(module), *state_of(fit)])


def test_manual_optimization_of_two_fused_optimizers_under_a_scaler(trainer):
    from tests.helpers.training import TwoNetworks

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
