"""Adaptive limits, local norms and other options, and the count of steps, as under any other strategy."""

from __future__ import annotations

import os

import pytest
import torch

from clip_callbacks import (
    AccumulationRescaling,
    ClipRule,
    GradientClipping,
    GradientNormMonitor,
    NonFiniteGuard,
    QuantileLimit,
    RatioLimit,
    TightestLimit,
    ZScoreLimit,
)
from tests.deepspeed.conftest import alike, assert_close, cell

OPTIONS = {
    "z-score": {"max_norm": ZScoreLimit(z=0.1, decay=0.5, warmup=3)},
    "quantile": {"max_norm": TightestLimit(QuantileLimit(0.3, window=5), 8.0)},
    "ratio": {"max_norm": RatioLimit(0.5), "scope": "parameter"},
    "units": {"max_norm": 0.5, "scope": "unit"},
    "layers": {"max_norm": 1.0, "scope": "layer"},
    "inf": {"max_norm": 0.5, "norm_type": float("inf")},
    "value": {"max_norm": 3.0, "clip_value": 0.3},
    "shadow": {"max_norm": 3.0, "shadow": [1.0]},
    "rules": {"rules": [ClipRule(1.0, include="0"), ClipRule(3.0)]},
}


@pytest.fixture(scope="module")
def by_option(train):
    cells = [(stage, name) for stage in (1, 2, 3) for name in OPTIONS]
    return dict(zip(cells, train(2, *(cell(stage, [GradientClipping(**OPTIONS[name])]) for stage, name in cells)), strict=True))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_option_as_in_one_process(by_option, stage, name):
    from tests.helpers import deepspeed

    found = alike(by_option[stage, name])
    callback, module = GradientClipping(**OPTIONS[name]), deepspeed.Net()
    seen = []

    class Watcher(deepspeed.Callback):
        def on_train_batch_end(self, *_):
            seen.append(callback.last_report)

    deepspeed.fit(module, deepspeed.batches(20), [callback, Watcher()])
    assert_close(found["norms"], [float(report.total_norm) for report in seen])
    assert_close(found["coefficients"], [float(report.clip_coef) for report in seen])
    assert_close(found["limits"], [float(report.max_norm) for report in seen])
    assert_close(found["weights"], deepspeed.weights(module))
    assert min(found["coefficients"]) < 1.0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_groups_and_a_frozen_parameter(train, stage):
    from tests.helpers import deepspeed

    options = {"max_norm": 2.0, "scope": "group"}
    (found,) = train(2, cell(stage, [GradientClipping(**options), GradientNormMonitor("group")], network=deepspeed.Grouped))
    module = deepspeed.Grouped()
    trainer = deepspeed.fit(module, deepspeed.batches(20), [GradientClipping(**options), GradientNormMonitor("group")])
    assert_close(alike(found)["weights"], deepspeed.weights(module))
    for name in ("grad/total_norm", "grad/clip_coef", "grad_norm/pg1", "grad_norm/pg2"):
        assert_close(found[0]["metrics"][name], float(trainer.callback_metrics[name]))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_collective_for_all_callbacks(pools, stage):
    from tests.helpers import deepspeed

    callbacks = [GradientClipping(0.5, scope="layer"), NonFiniteGuard(), AccumulationRescaling(), GradientNormMonitor("parameter")]
    assert pools[2].run(deepspeed.collectives, stage, callbacks) == [[1] * 4] * 2


def test_a_layer_that_some_batches_do_not_use(train):
    """In stage 3 the engine would apply its last gradient again. In stages 1 and 2 its gradient is zero, which SGD does not see."""
    from tests.helpers import deepspeed

    options = {"network": deepspeed.SeldomUsed, "optimizer": torch.optim.SGD, "steps": 10}
    plain = deepspeed.SeldomUsed(optimizer=torch.optim.SGD)
    deepspeed.fit(plain, deepspeed.batches(10), [GradientClipping(3.0)])
    for stage in (1, 2, 3):
        (found,) = train(1, cell(stage, [GradientClipping(3.0)], **options))
        assert_close(alike(found)["weights"], deepspeed.weights(plain))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_metrics_of_the_monitor(train, stage):
    options = {"log_statistics": True, "log_update_ratio": True, "log_weight_norm": True, "log_contributions": True}
    two, one = (
        train(2, cell(stage, [GradientNormMonitor(**options)]))[0],
        train(1, cell(stage, [GradientNormMonitor(**options)]))[0],
    )
    found, whole = alike(two)["metrics"], alike(one)["metrics"]
    assert {"grad_norm/net.0", "update_ratio/net.2", "weight_norm/net.0", "grad_std/net.2", "grad/total_norm_p90"} <= found.keys()
    assert found.keys() == whole.keys()
    # quotients of small numbers that ranks add up in another order
    assert_close(list(found.values()), [whole[name] for name in found], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_epochs_that_end_within_a_window(train, stage):
    options = {"window": 3, "steps": 2, "left_out": (4, 5)}
    many, one, unknown = train(
        1,
        cell(stage, [GradientClipping(3.0)], epochs=2, **options),
        cell(stage, [GradientClipping(3.0)], **options),
        cell(stage, [GradientClipping(3.0)], epochs=2, has_length=False, **options),
    )
    assert many[0].startswith(
        "ValueError: An epoch must be a multiple of accumulate_grad_batches=3 batches under DeepSpeed, got 4:"
    )
    assert "limit_train_batches to a multiple of 3." in many[0]
    assert len(one[0]["norms"]) == 1
    (ended,) = train(1, cell(stage, [GradientClipping(3.0)], epochs=-1, max_steps=1, **options))
    assert len(ended[0]["norms"]) == 1
    assert unknown[0].startswith("RuntimeError: A window of 3 micro-batches has ended at another batch for DeepSpeed")


@pytest.mark.parametrize("stage", [1, 3])
def test_losses_are_divided_twice_unless_they_are_rescaled(train, stage):
    plain, rescaled = train(
        1,
        cell(stage, [GradientClipping(3.0)], window=4, steps=1),
        cell(stage, [GradientClipping(3.0), AccumulationRescaling()], window=4, steps=1),
    )
    assert_close(4 * plain[0]["norms"][0], rescaled[0]["norms"][0])
    assert rescaled[0]["metrics"]["grad/accumulation_scale"] == 4.0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_same_as_the_clip_of_the_engine(train, stage):
    ours, its = train(2, cell(stage, [GradientClipping(3.0)]), cell(stage, [GradientNormMonitor()], gradient_clip_val=3.0))
    assert_close(alike(ours)["weights"], alike(its)["weights"])
    assert_close(ours[0]["norms"], its[0]["norms"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resume(train, pools, tmp_path, stage):
    from tests.helpers import deepspeed

    whole = train(2, cell(stage, [GradientClipping(ZScoreLimit(z=0.1, decay=0.5, warmup=3))], steps=12))[0]
    resumed = pools[2].run(deepspeed.interrupted, stage, os.fspath(tmp_path / "checkpoint"))
    assert resumed[0]["weights"] == alike(whole)["weights"]
    assert resumed[0]["limits"] == whole[0]["limits"][6:]
    assert resumed[0]["steps"] == 12


def test_a_checkpoint_of_a_run_that_the_engine_clipped(pools, tmp_path):
    from tests.helpers import deepspeed

    said = pools[2].run(deepspeed.resumed_from_its_clip, os.fspath(tmp_path / "checkpoint"))
    assert all("would clip gradients a second time, at 3.0" in texts[0] and len(texts) == 1 for texts in said[:1]), said
