"""Properties that only a GPU can show; skipped elsewhere. ``python -m benchmarks.step --device cuda`` measures times."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from clip_callbacks import (
    AccumulationRescaling,
    ClipRule,
    GradientClipping,
    GradientNormMonitor,
    NonFiniteGuard,
    ParameterTable,
    clip_step,
)
from tests.helpers.laws import NAMED
from tests.helpers.reference import norm
from tests.helpers.training import Poisoned, Regression, assert_same_bits, data, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "SGD-momentum": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
}


def network(name="AdamW", *, fused=True, poison=None, normed=False):
    optimizer, options = OPTIMIZERS[name]
    torch.manual_seed(0)
    layers = [nn.Linear(4, 32), nn.BatchNorm1d(32), nn.Linear(32, 1)] if normed else [nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1)]
    return Poisoned(poison or {}, optimizer=optimizer, fused=fused, net=nn.Sequential(*layers), **options)


def with_gradients(device, dtype=torch.float32, sizes=((64, 32), (32,), (3, 3, 3), (5000,))):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.ones(size, device=device, dtype=dtype)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(device, dtype)
    return parameters


class SyncAlarm(Callback):
    """Makes every host sync in the callbacks' hooks and in the step an error, after the first steps."""

    def __init__(self, first=5):
        self.first, self.steps = first, 0

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step >= self.first:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps += torch.cuda.get_sync_debug_mode() == 2
        torch.cuda.set_sync_debug_mode("default")

    def teardown(self, *_):
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def gpu(trainer):
    return lambda *callbacks, **options: trainer(*callbacks, **({"accelerator": "gpu", "log_every_n_steps": 1000} | options))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_no_host_sync_in_fifty_fused_steps(gpu, name, normed, precision):
    alarm = SyncAlarm()
    family = [GradientClipping(0.5), NonFiniteGuard(), AccumulationRescaling(), GradientNormMonitor()]
    gpu(*family, alarm, precision=precision).fit(network(name, normed=normed), data(60, size=1.0))
    assert alarm.steps >= 50


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scope", ["global", "layer", "parameter", "unit"])
def test_at_most_one_host_sync_otherwise(fused, scope):
    parameters = with_gradients("cuda")
    optimizer = torch.optim.AdamW(parameters, fused=fused)
    table, rules = ParameterTable(optimizer), [ClipRule(0.1, scope)]
    clip_step(table, rules=rules, fused=optimizer)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing CUDA operation") as caught:
            clip_step(table, rules=rules, fused=optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchronizing" in str(w.message)]) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_norms_equal_a_float64_loop(dtype, p):
    parameters = with_gradients("cuda", dtype)
    report, _ = clip_step(parameters, rules=[], norm_type=p)
    exact = norm([float(x) for parameter in parameters for x in parameter.grad.flatten().tolist()], p)
    torch.testing.assert_close(report.total_norm.float(), torch.tensor(exact, dtype=torch.float32))


@pytest.mark.parametrize("scope", ["global", "layer", "parameter"])
@pytest.mark.parametrize("deferred", [False, True])
def test_equal_to_the_cpu(scope, deferred):
    if deferred and scope != "global":
        pytest.skip("local norms are decided on the host")
    written = []
    for device in ("cuda", "cpu"):
        parameters = with_gradients(device)
        clip_step(parameters, rules=[ClipRule(0.3, scope)], nonfinite="ignore", deferred=deferred)
        written.append([parameter.grad.cpu() for parameter in parameters])
    torch.testing.assert_close(*written)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("poisoned", [(0,), (5,), (5, 6), (11,)])
def test_a_skip_without_a_sync_never_happened(gpu, name, poisoned):
    from torch.utils.data import DataLoader, Subset

    guard, bad, clean = (
        NonFiniteGuard(),
        network(name, poison=dict.fromkeys(poisoned, math.nan), normed=True),
        network(name, normed=True),
    )
    fit = gpu(guard, GradientClipping(0.5))
    with pytest.warns(RuntimeWarning, match="the step is skipped"):
        fit.fit(bad, data(12))
    everything = data(12).dataset
    good = [row for row in range(len(everything)) if row // 4 not in poisoned]
    gpu(GradientClipping(0.5)).fit(clean, DataLoader(Subset(everything, good), batch_size=4))
    assert_same_bits(weights(bad), weights(clean))
    assert_same_bits(list(bad.buffers()), list(clean.buffers()))
    assert guard.skipped_steps == len(poisoned)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_real_autocast_fused_equals_unfused(gpu, name, precision):
    results = []
    for fused in (True, False):
        module = network(name, fused=fused)
        fit = gpu(GradientClipping(0.5), precision=precision, max_steps=200, max_epochs=-1, log_every_n_steps=1)
        fit.fit(module, data(20, size=1.0))
        results.append((weights(module), fit.callback_metrics["grad/total_norm"]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_overflows_lower_the_scale(gpu, name):
    from lightning.pytorch.plugins import MixedPrecision

    guard = NonFiniteGuard(max_consecutive=1)
    plugin = MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cuda", init_scale=2.0**30))
    fit = gpu(guard, GradientClipping(0.5), plugins=[plugin], max_epochs=2)
    fit.fit(network(name), data(size=1.0))
    assert 0 < guard.overflowed_steps < 24
    assert plugin.scaler.get_scale() == 2.0 ** (30 - guard.overflowed_steps)


def test_clip_step_is_captured_by_a_cuda_graph():
    parameters = with_gradients("cuda")
    fresh = [parameter.grad.clone() for parameter in parameters]
    table = ParameterTable(parameters)

    def step():
        return clip_step(table, rules=[ClipRule(0.3)], nonfinite="ignore", deferred=True)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = step()
    for size in (1.0, 10.0, 1e-4):
        for parameter, gradient in zip(parameters, fresh, strict=True):
            parameter.grad.copy_(size * gradient)
        graph.replay()
        expected = size * torch.cat([gradient.flatten() for gradient in fresh]).norm()
        torch.testing.assert_close(report.total_norm, expected)
        after = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()
        torch.testing.assert_close(after, expected.clamp(max=0.3))


def test_a_captured_fused_step_clips_and_skips():
    parameters = with_gradients("cuda")
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True, capturable=True)
    table = ParameterTable(optimizer)
    fresh = [parameter.grad.clone() for parameter in parameters]

    def step():
        clip_step(table, rules=[ClipRule(0.3)], fused=optimizer, deferred=True)
        optimizer.step()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(poison):
        for parameter, gradient in zip(parameters, fresh, strict=True):
            parameter.grad.copy_(gradient)
        parameters[0].grad[0, 0] = poison
        before = weights(nn.ParameterList(parameters))
        graph.replay()
        return before, weights(nn.ParameterList(parameters))

    assert_same_bits(*replay(math.nan))
    before, after = replay(1.0)
    assert not torch.equal(before[0], after[0])
    assert torch.isfinite(torch.cat([parameter.flatten() for parameter in after])).all()


class Wrapped(Regression):
    """For Lightning's FSDPStrategy, the first FullyShardedDataParallel: it runs on GPUs only."""

    def configure_model(self):
        from torch.distributed.fsdp.wrap import wrap

        self.net = nn.Sequential(*(wrap(layer) if isinstance(layer, nn.Linear) else layer for layer in self.net))


@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_the_first_fsdp_of_lightning(trainer, policy):
    from lightning.pytorch.strategies import FSDPStrategy

    results = []
    for options in ({"strategy": FSDPStrategy()}, {}):
        torch.manual_seed(0)
        module = (Wrapped if options else Regression)(torch.optim.AdamW)
        clipping = GradientClipping(0.5)
        fit = trainer(clipping, NonFiniteGuard(policy), accelerator="cuda", **options)
        fit.fit(module, data())
        results.append((fit.callback_metrics["grad/total_norm_p50"], fit.callback_metrics["grad/clip_fraction_epoch"]))
    torch.testing.assert_close(*results)


def decided(device, make, scope, *, deferred):
    """Limits of ten steps, and the states after them."""
    limit, state, found = make(1.0), None, []
    parameters = with_gradients(device)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    table, rules = ParameterTable(optimizer), [ClipRule(limit, scope)]
    fresh = [parameter.grad.clone() for parameter in parameters]
    for step in range(10):
        for parameter, gradient in zip(parameters, fresh, strict=True):
            parameter.grad = gradient * (1 + step % 3)
        torch.cuda.set_sync_debug_mode("error" if deferred and step > 1 else "default")
        try:
            options = {"shadow": [ClipRule(limit)], "skip_above": 1e6, "fused": optimizer, "deferred": deferred}
            report, state = clip_step(table, state, rules=rules, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append(report.limits.cpu())
    return found, [{key: value.cpu() for key, value in held.items()} for held in state]


@pytest.mark.parametrize("make", NAMED)
@pytest.mark.parametrize(("scope", "deferred"), [("global", True), ("global", False), ("parameter", False), ("unit", False)])
def test_limits_decide_as_on_the_cpu(make, scope, deferred):
    torch.testing.assert_close(decided("cuda", make, scope, deferred=deferred), decided("cpu", make, scope, deferred=False))
