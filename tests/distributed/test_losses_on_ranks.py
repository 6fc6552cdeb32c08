"""NonFiniteGuard(loss_above=…) on several ranks: the loss is the mean over all of them, and all of them decide alike."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from clip_callbacks import AccumulationRescaling, GradientClipping, NonFiniteGuard, RobustZScoreLimit
from tests.distributed.test_logs_and_checkpoints import counted
from tests.helpers import parallel
from tests.helpers.agreement import KINDS, assert_one_answer, is_variant
from tests.helpers.matrix import matrix
from tests.helpers.training import assert_same_bits

STEPS = 14
SPIKE = 12


def guarded(norm_type, **options):
    limit = RobustZScoreLimit(50.0, window=20, warmup=3, scale="linear")
    return NonFiniteGuard(loss_above=limit, **options), GradientClipping(0.5, norm_type=norm_type)


def lifted(name, norm_type, **options):
    """The loss of one batch is lifted on the last rank alone; its gradients are zero there."""
    poison = {(rank, SPIKE): "lifted" for rank in ((0, 1) if name == "tp" else (1,))}
    found = parallel.result(name, *guarded(norm_type), poison=poison, steps=STEPS, **options)
    return found | {"losses": found["metrics"]["grad/loss"]}


@matrix(
    lambda name, norm_type: norm_type == 2.0 or name == "fsdp2",  # the maximum takes another way through the collective
    slow=is_variant,
    name=[*KINDS, "fsdp2_offload"],
    norm_type=[2.0, math.inf],
)
def test_a_lifted_loss_on_one_rank_is_a_spike_for_all(run, name, norm_type):
    ours = assert_one_answer(run(name, norm_type, function=lifted))
    assert [step for step, skipped in enumerate(ours["skipped"]) if skipped] == [SPIKE]
    single = parallel.result("single", *guarded(norm_type), bad=(SPIKE,), steps=STEPS)
    torch.testing.assert_close(ours["weights"], single["weights"])
    torch.testing.assert_close(ours["losses"], single["metrics"]["grad/loss"])


class Recorded(parallel.Divided):
    """Keeps the loss and the weight of each micro-batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.kept.append((loss.item(), positives(batch)))
        return loss


def positives(batch):
    """A weight that differs between ranks; some are 0."""
    return float((batch[1] > 0.6).sum())


def weighted(name):
    module = Recorded()
    module.kept = []
    callbacks = [NonFiniteGuard(loss_above=1e9), AccumulationRescaling(positives)]
    found = parallel.result(name, *callbacks, module=module, steps=6, accumulate_grad_batches=2)
    return float(found["metrics"]["grad/loss"]), module.kept[-2:]


def test_a_window_is_weighted_over_all_ranks(run):
    (first, ours), (second, theirs) = run("ddp", function=weighted)
    assert first == second
    window = [*ours, *theirs]
    weights = [weight for _, weight in window]
    assert len(set(weights)) > 1, "an unweighted mean would do"
    assert first == pytest.approx(math.fsum(loss * weight for loss, weight in window) / math.fsum(weights), rel=1e-5)


def alone_weightless(name):
    """On the first rank every micro-batch has weight 0; the second one has the loss."""
    import warnings

    callbacks = [NonFiniteGuard(loss_above=1e9), AccumulationRescaling(of_other_rank)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = parallel.result(name, *callbacks, steps=4, accumulate_grad_batches=2)
    return float(found["metrics"]["grad/loss"]), [str(warning.message) for warning in caught]


def of_other_rank(batch):
    return float(dist.get_rank())


def test_a_rank_without_weight_takes_the_loss_of_the_others(run):
    (first, texts), (second, _) = run("ddp", function=alone_weightless)
    assert first == second > 0
    assert not [text for text in texts if "manual_backward" in text]


class TwoOptimizers(parallel.Divided):
    """Two optimizers step with one loss, each with some of the parameters."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        first, *others = self.parameters()
        return [torch.optim.SGD(part, lr=0.01) for part in ([first], others)]


def both_alone_weightless(name):
    guard = NonFiniteGuard(loss_above=1e9)
    callbacks = [guard, AccumulationRescaling(of_other_rank, divide=True)]
    found = parallel.result(name, *callbacks, module=TwoOptimizers(), steps=4)
    return [float(found["metrics"][f"grad/loss-SGD{ending}"]) for ending in ("", "-1")]


def test_a_rank_without_weight_takes_the_loss_of_the_others_for_each_optimizer(run):
    first, second = run("ddp", function=both_alone_weightless)
    assert first == second
    assert first[0] == pytest.approx(first[1])
    assert first[0] > 0


class Unsynchronized(TwoOptimizers):
    """The first of two passes leaves the reduction of its gradients to the second one."""

    def training_step(self, batch, batch_idx):
        optimizers, self.sum_of_losses = self.optimizers(), 0.0
        for optimizer in optimizers:
            optimizer.zero_grad()
        for is_last in (False, True):
            self.synchronize(is_last)
            loss = parallel.Divided.training_step(self, batch, batch_idx)
            self.sum_of_losses += loss.item()
            self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def synchronize(self, is_on):
        self.net.set_requires_gradient_sync(is_on)


class ShardsOnly(Unsynchronized):
    """Hybrid sharding, whose first pass leaves the sum over the copies to the second one."""

    def configure_model(self):
        if self.net is None:
            self.net = parallel.Net()
            fully_shard(self.net, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))

    def synchronize(self, is_on):
        self.net.set_requires_all_reduce(is_on)


def unsynchronized(name, made):
    module = made("fsdp")
    found = parallel.result(name, NonFiniteGuard(loss_above=1e9), module=module, steps=4)
    return [float(found["metrics"][f"grad/loss-SGD{ending}"]) for ending in ("", "-1")], module.sum_of_losses


@pytest.mark.parametrize("made", [Unsynchronized, ShardsOnly])
def test_a_pass_that_leaves_its_gradients_to_a_later_one_counts(run, made):
    results = run("fsdp2", made, function=unsynchronized)
    expected = sum(sum_of_losses for _, sum_of_losses in results) / 2
    for losses, _ in results:
        assert losses == pytest.approx([expected, expected])


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_a_threshold_of_the_loss_takes_one_collective_at_most(run, name, norm_type):
    """That of the norms, where there is one."""
    assert run(name, *guarded(norm_type), function=counted, steps=4) == [[1] * 4] * 2


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_under_warn_a_bad_loss_of_one_rank_changes_nothing(run, name):
    """Its gradients are finite: they stay as they are, on all ranks."""
    poison = {(1, 2): "no gradient", (1, 3): "lifted"}
    ours = assert_one_answer(run(name, NonFiniteGuard("warn", loss_above=100.0), poison=poison, steps=6))
    theirs = assert_one_answer(run(name, GradientClipping(None, nonfinite="ignore"), poison=poison, steps=6))
    assert_same_bits(ours["weights"], theirs["weights"])
    assert ours["metrics"]["grad/spikes"] == 1
