"""One answer on every rank, under every way of dividing a network, in real processes over gloo."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch

from clip_callbacks import (
    AccumulationRescaling,
    BatchSize,
    EmaLimit,
    GradientClipping,
    GradientNormMonitor,
    NonFiniteGuard,
    QuantileLimit,
    RatioLimit,
    RobustZScoreLimit,
    TightestLimit,
)
from clip_callbacks.core.blocks import SCOPES
from tests.helpers import parallel
from tests.helpers.agreement import CARRIES, DIVIDED, assert_one_answer, assert_same_run, is_variant
from tests.helpers.laws import ADAPTIVE, LIMITS
from tests.helpers.matrix import matrix
from tests.helpers.parallel import STRATEGIES
from tests.helpers.ranks import RanksFailedError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Non-finite"
)  # of the single process; those of ranks are looked at where they matter


FIXED_LIMITS = {"global": 0.6, "group": 0.6, "layer": 0.6, "parameter": 0.3, "unit": 0.3}
ADAPTIVE_LIMITS = {
    "global": ADAPTIVE,
    "group": QuantileLimit(0.3, window=10),
    "layer": RobustZScoreLimit(0.5, window=10, warmup=2),
    "parameter": EmaLimit(warmup=2),
    "unit": TightestLimit(RatioLimit(0.1), ADAPTIVE),
}
NORM_TYPES = (1.0, 2.0, 3.0, math.inf)


# Equal to the single process


def run_of(name, norm_type, scope, kind):
    limit = ADAPTIVE_LIMITS[scope] if kind == "adaptive" else FIXED_LIMITS[scope] * (4 if norm_type == 1 else 1)
    return parallel.result(name, GradientClipping(limit, scope=scope, norm_type=norm_type), steps=10)


@lru_cache
def single_run_of(norm_type, scope, kind):
    return run_of("single", norm_type, scope, kind)


@matrix(slow=is_variant, name=DIVIDED, norm_type=NORM_TYPES, scope=SCOPES, kind=["fixed", "adaptive"])
def test_norms_coefficients_and_weights_are_those_of_one_process(run, name, norm_type, scope, kind):
    ours = assert_one_answer(run(name, norm_type, scope, kind, function=run_of))
    if scope != "group" or "groups" not in name:
        assert_same_run(ours, single_run_of(norm_type, scope, kind))
    assert min(ours["coefficients"]) < 1.0
    if (scope, kind) == ("global", "fixed"):
        assert max(ours["coefficients"]) == 1.0, "some steps are clipped and some are not"


def limited_runs(name):
    """With each limit of the laws, by output rows: of shards along any dimension, and of flat pieces that cut rows."""
    return [parallel.result(name, GradientClipping(make(1.0), scope="unit"), steps=5) for make in LIMITS]


@pytest.mark.parametrize("name", [pytest.param("fsdp2", marks=pytest.mark.slow), "fsdp1", "tp"])
def test_every_limit_of_the_laws_says_the_same_on_every_rank(run, name):
    each = run(name, function=limited_runs)
    for i in range(len(LIMITS)):
        assert_same_run(assert_one_answer([results[i] for results in each]), single_limited_runs()[i])


@lru_cache
def single_limited_runs():
    return limited_runs("single")


@pytest.mark.filterwarnings("ignore:Spike")
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp1", "tp"])
def test_a_spike_on_one_rank_is_skipped_by_all(run, name):
    """As if its batch had never come: the weights are those of the run without it."""
    guard = NonFiniteGuard(skip_above=RobustZScoreLimit(4.0, warmup=3))
    poison = {(rank, 12): 1e9 for rank in ((0, 1) if name == "tp" else (1,))}
    ours = assert_one_answer(run(name, guard, GradientClipping(ADAPTIVE), poison=poison, steps=14))
    assert [step for step, skipped in enumerate(ours["skipped"]) if skipped] == [12]
    single = parallel.result("single", NonFiniteGuard(), GradientClipping(ADAPTIVE), bad=(12,), steps=14)
    torch.testing.assert_close(ours["weights"], single["weights"])


def grouped_reference():
    """Two groups on one device, parameters of the 1-dim mesh and of the 2-dim one."""

    class Grouped(parallel.Divided):
        def configure_optimizers(self):
            inner = [parameter for module in (self.net.up, self.net.down) for parameter in module.parameters()]
            known = {id(parameter) for parameter in inner}
            outer = [parameter for parameter in self.parameters() if id(parameter) not in known]
            return torch.optim.SGD([{"params": outer}, {"params": inner}], lr=0.1)

    return parallel.result("single", GradientClipping(0.4, scope="group"), module=Grouped())


def test_parameter_groups_on_different_meshes_have_norms_of_their_own(run):
    ours = assert_one_answer(run("fsdp2_tp_groups", GradientClipping(0.4, scope="group")))
    assert_same_run(ours, grouped_reference())
    assert min(ours["coefficients"]) < 1.0


@matrix(slow=lambda name: STRATEGIES[name][0] == 4 and is_variant(name), name=DIVIDED)
def test_with_momentum_clip_value_rescaling_and_all_metrics(run, name):
    def family():
        return [
            GradientClipping(1.0, clip_value=0.3), NonFiniteGuard(), AccumulationRescaling(), GradientNormMonitor(scope="parameter")
        ]  # fmt: skip

    options = {"accumulate_grad_batches": 3, "steps": 5, "optimizer": torch.optim.AdamW, "lr": 0.05}
    ours = assert_one_answer(run(name, *family(), **options))
    single = parallel.result("single", *family(), **options)
    assert_same_run(ours, single)
    torch.testing.assert_close(ours["metrics"], single["metrics"])
    assert any(name.startswith("grad_norm/") for name in ours["metrics"])


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "tp", "fsdp2_tp"])
def test_windows_weighted_by_samples(run, name):
    """With a short last window."""

    def family():
        return [GradientClipping(0.5), AccumulationRescaling(BatchSize())]

    options = {"accumulate_grad_batches": 3, "steps": 4, "limit_train_batches": 11}
    assert_same_run(assert_one_answer(run(name, *family(), **options)), parallel.result("single", *family(), **options))


class Unlabelled(parallel.Divided):
    """On one rank a micro-batch without a label, whose loss is a mean over nothing."""

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        if (self.global_rank, batch_idx) == (self.trainer.world_size - 1, 2):
            inputs, targets = inputs[:0], targets[:0]
        return torch.nn.functional.mse_loss(self.net(inputs), targets)


class Labelled(BatchSize):
    calls = 0

    def __call__(self, batch):
        import torch.distributed as dist

        type(self).calls += 1
        is_empty = (self.calls - 1) % 6 == 2 and (not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1)
        return 0 if is_empty else super().__call__(batch)


def unlabelled(name, *callbacks, **options):
    Labelled.calls = 0
    return parallel.result(name, *callbacks, module=Unlabelled(STRATEGIES[name][2]), steps=3, accumulate_grad_batches=2, **options)


@pytest.mark.parametrize("name", ["ddp", "fsdp1", "fsdp2", "fsdp2_4"])
def test_a_micro_batch_of_weight_zero_on_one_rank_contributes_nothing(run, name):
    guard = NonFiniteGuard()
    ours = assert_one_answer(run(name, AccumulationRescaling(Labelled()), guard, function=unlabelled))
    assert ours["states"][1]["counters"][0]["skipped"] == 0
    assert all(map(math.isfinite, ours["norms"]))
    plain = assert_one_answer(run(name, AccumulationRescaling(BatchSize()), NonFiniteGuard(), steps=3, accumulate_grad_batches=2))
    torch.testing.assert_close(ours["norms"][0], plain["norms"][0])
    assert ours["norms"][2] != plain["norms"][2]


@matrix(slow=is_variant, name=DIVIDED, deferred=[False, True])
def test_the_write_rides_on_fused_optimizers(run, name, deferred):
    options = {"optimizer": torch.optim.AdamW, "lr": 0.02}
    family = [GradientClipping(0.5), NonFiniteGuard(deferred=deferred)]
    if name not in CARRIES:
        with pytest.raises(RanksFailedError, match="mixed torch.Tensor and DTensor"):  # torch's fused kernel, with us or without
            run(name, *family, fused=True, **options)
        return
    ours = assert_one_answer(run(name, *family, fused=True, **options))
    assert_same_run(ours, parallel.result("single", GradientClipping(0.5), **options))
