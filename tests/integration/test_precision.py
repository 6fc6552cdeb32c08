from __future__ import annotations

import math

import pytest
import torch

from clip_callbacks import AccumulationRescaling, GradientClipping, GradientNormMonitor, NonFiniteGuard
from tests.helpers.training import Poisoned, Regression, assert_same_bits, data, scaled, weights


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true", "16-true"])
def test_same_bits_as_gradient_clip_val(trainer, precision):
    results = []
    for callbacks, options in (([GradientClipping(0.5)], {}), ([], {"gradient_clip_val": 0.5})):
        torch.manual_seed(0)
        module = Regression(lr=0.01)
        trainer(*callbacks, precision=precision, **options).fit(module, data())
        results.append(weights(module))
        if callbacks:
            expected = torch.float64 if precision == "64-true" else torch.float32
            assert callbacks[0].last_report.total_norm.dtype is expected
    if precision.endswith("-true") and precision.startswith(("bf16", "16")):
        for a, b in zip(*results, strict=True):  # torch takes half-precision norms in half precision; ours are exact
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)
    else:
        assert_same_bits(*results)


def test_16_mixed_clips_unscaled_gradients_to_the_same_bits(trainer):
    results = []
    for callbacks, options in (([GradientClipping(0.5), GradientNormMonitor()], {}), ([], {"gradient_clip_val": 0.5})):
        torch.manual_seed(0)
        module = Regression(torch.optim.AdamW, lr=0.01)
        fit = trainer(*callbacks, max_epochs=3, **scaled(init_scale=1024.0), **options)
        fit.fit(module, data(size=1.0))
        results.append(weights(module))
        if callbacks:
            assert fit.callback_metrics["grad/amp_scale"] == 1024.0
            assert fit.callback_metrics["grad/clipped_norm"] <= 0.5
    assert_same_bits(*results)


def test_overflow_is_the_scalers_business(trainer):
    torch.manual_seed(0)
    guard, clipping = NonFiniteGuard("raise", max_consecutive=1), GradientClipping(0.5)
    module = Regression(torch.optim.AdamW, lr=0.01)
    fit = trainer(guard, clipping, max_epochs=2, **scaled(init_scale=2.0**30))
    fit.fit(module, data(size=1.0))
    scale = fit.precision_plugin.scaler.get_scale()
    assert 0 < guard.overflowed_steps < 24
    assert scale == 2.0 ** (30 - guard.overflowed_steps)
    assert guard.skipped_steps == 0
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_overflow_steps_are_those_that_lightning_skips_too(trainer):
    results = []
    for callbacks in ([GradientClipping(None), AccumulationRescaling()], []):
        torch.manual_seed(0)
        module = Regression(torch.optim.AdamW, lr=0.01)
        fit = trainer(*callbacks, accumulate_grad_batches=2, **scaled(init_scale=2.0**30))
        fit.fit(module, data(size=1.0))
        results.append([*weights(module), torch.tensor(fit.precision_plugin.scaler.get_scale())])
    assert_same_bits(*results)


def test_last_micro_batch_none_under_a_scaler_takes_no_step_and_reports_none(trainer):
    torch.manual_seed(0)
    clipping = GradientClipping(0.5)
    module = Poisoned({3: None}, optimizer=torch.optim.SGD)
    fit = trainer(clipping, AccumulationRescaling(), accumulate_grad_batches=2, **scaled(init_scale=1024.0))
    fit.fit(module, data(6, size=1.0))
    assert clipping.state_dict()["history"][0]["steps"] == 2
    assert fit.callback_metrics["grad/total_norm"] < 100, "never a norm with the loss scale in it"


def test_manual_optimization_under_a_scaler(trainer):
    from tests.helpers.training import TwoNetworks

    fit = trainer(GradientClipping(1.0), **scaled(init_scale=1024.0))
    fit.fit(TwoNetworks(), data())
    assert fit.callback_metrics["grad/total_norm-SGD"] < 10
    assert fit.callback_metrics["grad/clipped_norm-SGD-1"] == pytest.approx(1.0, rel=1e-3)


def test_nan_is_not_logged_under_a_scaler(trainer):
    fit = trainer(GradientClipping(0.5), **scaled(init_scale=1024.0))
    module = Poisoned({5: math.nan})
    with pytest.warns(RuntimeWarning, match="the loss is non-finite"):
        fit.fit(module, data(6, size=1.0))
    assert math.isfinite(fit.callback_metrics["grad/total_norm"])
