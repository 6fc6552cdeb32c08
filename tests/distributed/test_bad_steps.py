"""Bad steps and bad micro-batches on one rank, decided by all."""

from __future__ import annotations

import math
import time

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.checkpoint import checkpoint

from clip_callbacks import (
    AccumulationRescaling,
    BatchSize,
    GradientClipping,
    NonFiniteGuard,
)
from tests.helpers import parallel
from tests.helpers.agreement import (
    CARRIES,
    DIVIDED,
    DROPS_MICRO_BATCHES,
    assert_one_answer,
    assert_same_run,
    is_variant,
    nothing,
    reports,
)
from tests.helpers.laws import ADAPTIVE
from tests.helpers.matrix import matrix
from tests.helpers.parallel import STRATEGIES, Divided
from tests.helpers.ranks import RanksFailedError
from tests.helpers.training import assert_same_bits

pytestmark = pytest.mark.filterwarnings(
    "ignore:Non-finite"
)  # of the single process; those of ranks are looked at where they matter


# A bad step


@matrix(
    lambda name, _bad, _poison, deferred: name in CARRIES or not deferred,
    slow=is_variant,
    name=DIVIDED,
    bad={"first and later": (0, 5), "two in a row and the last": (2, 3, parallel.STEPS - 1)},
    poison=[math.nan, math.inf],
    deferred=[False, True],
)
def test_a_nan_on_one_rank_is_skipped_by_all(run, name, bad, poison, deferred):
    options = {"optimizer": torch.optim.AdamW, "lr": 0.05} | ({"fused": True} if deferred else {})

    def family():
        return [NonFiniteGuard(deferred=deferred), GradientClipping(ADAPTIVE)]

    run(name, function=nothing)
    start = time.monotonic()
    ours = assert_one_answer(run(name, *family(), poison={(1, number): poison for number in bad}, **options))
    assert time.monotonic() - start < 30
    clean = assert_one_answer(run(name, *family(), bad=bad, **options))
    assert_same_bits(ours["weights"], clean["weights"])
    assert ours["states"][0]["counters"][0]["skipped"] == len(bad)
    if not deferred:
        assert [step for step, skipped in enumerate(ours["skipped"]) if skipped] == list(bad)


@pytest.mark.parametrize("name", DIVIDED)
def test_the_report_names_the_guilty_rank(run, name):
    every = run(name, NonFiniteGuard(), poison={(1, 3): math.nan}, function=reports)
    (report,) = [message for message in every[0] if "Non-finite gradients" in message]
    assert "at step 3, epoch 0, batch 3, rank 0" in report
    assert "Stage: the loss is non-finite" in report
    assert "Where it began: rank 1" in report
    assert "net.down.weight [5, 6]: " + {"tp": "15 NaN on rank 1"}.get(name, "") in report
    assert "tp" in name or "net.down.weight [5, 6]: 30 NaN" in report
    assert not [message for messages in every[1:] for message in messages if "Non-finite" in message], "said once"


class LoggingItsLoss(parallel.Divided):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss


def stopped_early(name, bad):
    module = LoggingItsLoss(STRATEGIES[name][2], poison=dict.fromkeys(bad, math.nan))
    return reports(name, NonFiniteGuard(), EarlyStopping("train_loss"), module=module, max_epochs=3), module.trainer.current_epoch


@pytest.mark.parametrize(("bad", "teller"), [([(1, 3)], 1), ([(0, 3), (1, 3)], 0)], ids=["the second rank", "both"])
def test_the_rank_whose_logged_loss_is_bad_says_who_acts_on_it(run, bad, teller):
    each = run("ddp", bad, function=stopped_early)
    assert [epochs for _, epochs in each] == [1, 1], "stopped on all ranks"
    told = [[message for message in messages if "EarlyStopping stops the run" in message] for messages, _ in each]
    assert [len(messages) for messages in told] == [rank == teller for rank in (0, 1)]
    assert told[teller][0].startswith("On rank 1: train_loss" if teller else "Non-finite gradients at step 3")


class GradientPoison(parallel.Divided):
    """One entry of one rank's part of a gradient is bad; the losses are not."""

    def on_after_backward(self):
        if self.trainer.global_step == 2 and self.global_rank == 1:
            gradient = self.net.down.weight.grad
            (gradient.to_local() if hasattr(gradient, "to_local") else gradient).view(-1)[0] = math.nan


def poisoned_gradient(name, *callbacks, **options):
    module = GradientPoison(STRATEGIES[name][2])
    return reports(name, *callbacks, module=module, **options), parallel.whole(module), [it.skipped_steps for it in callbacks]


@pytest.mark.parametrize("name", ["fsdp2", "tp", "fsdp2_tp", "fsdp2_offload"])
def test_the_report_names_the_rank_whose_shard_is_bad(run, name):
    each = run(name, NonFiniteGuard(), function=poisoned_gradient)
    (report,) = [message for message in each[0][0] if "Non-finite gradients" in message]
    assert "Stage: the loss is finite, its gradients are not" in report
    assert "net.down.weight [5, 6]: 1 NaN on rank 1" in report
    assert "Nearest finite gradients: net.up.bias (before), net.down.bias (after)" in report
    for _, weights, skipped in each:
        assert skipped == [1]
        assert_same_bits(weights, each[0][1])


class CopyPoison(GradientPoison):
    """The copy that one rank holds of an undivided gradient is bad."""

    def on_after_backward(self):
        if self.trainer.global_step == 2 and self.global_rank == 1:
            self.net.head.bias.grad[0] = math.inf


def poisoned_copy(name, *callbacks):
    module = CopyPoison(STRATEGIES[name][2])
    found = reports(name, *callbacks, module=module)
    return found, parallel.whole(module), callbacks[0].skipped_steps


def test_a_copy_gone_bad_on_one_rank_is_bad_on_all(run):
    each = run("tp", NonFiniteGuard(), function=poisoned_copy)
    (report,) = [message for message in each[0][0] if "Non-finite gradients" in message]
    assert "net.head.bias [1]: 1 inf on rank 1" in report
    assert each[0][2] == each[1][2] == 1
    assert_same_bits(each[0][1], each[1][1])


def left_alone(name, *callbacks):
    from torch.nn.parallel import DistributedDataParallel

    module = CopyPoison()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["net.head.bias"])
    reports(name, *callbacks, module=module, steps=5)
    return callbacks[0].skipped_steps


def test_parameters_that_ddp_leaves_alone_are_decided_on_together(run):
    assert run("ddp", NonFiniteGuard(), function=left_alone) == [1, 1]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "tp", "fsdp2_tp"])
@pytest.mark.parametrize("policy", ["raise", "streak"])
def test_all_ranks_stop_together(run, name, policy):
    guard = NonFiniteGuard("raise") if policy == "raise" else NonFiniteGuard(max_consecutive=2)
    with pytest.raises(RanksFailedError) as caught:
        run(name, guard, poison={(1, 2): math.nan, (1, 3): math.nan})
    assert all("NonFiniteGradientError" in error for error in caught.value.errors)
    assert all(f"at step {2 if policy == 'raise' else 3}" in error for error in caught.value.errors)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_offload", "tp", "fsdp2_tp"])
def test_bad_entries_become_zero_on_all_ranks(run, name):
    each = run(name, NonFiniteGuard("zero"), function=poisoned_gradient)
    for messages, weights, _ in each:
        assert_same_bits(weights, each[0][1])
        assert all(torch.isfinite(weight).all() for weight in weights)
        assert not [message for message in messages if "rank 0" in message and "become 0" not in message]


class Counting(BatchSize):
    """Fails on one rank."""

    def __call__(self, batch):
        import torch.distributed as dist

        return -1 if dist.get_rank() == 1 and batch[0][0, 0] == self.bad else super().__call__(batch)

    bad = parallel.rows(12)[5 * parallel.BATCH + 1][0][0]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_bad_weight_on_one_rank_stops_all(run, name):
    run(name, function=nothing)
    start = time.monotonic()
    with pytest.raises(RanksFailedError) as caught:
        run(name, AccumulationRescaling(Counting()), accumulate_grad_batches=2, steps=6)
    assert time.monotonic() - start < 30
    good, bad = caught.value.errors
    assert "`weight` must return a finite number of at least 0, got -1 from" in bad
    assert "for batch 5" in bad
    assert "`weight` failed on another rank" in good


# Bad micro-batches


def dropping(optimizer=torch.optim.AdamW, **options):
    family = [NonFiniteGuard(level="microbatch"), GradientClipping(0.5), AccumulationRescaling()]
    return family, {
        "optimizer": optimizer,
        "lr": 0.05,
        "accumulate_grad_batches": 3,
        "steps": 5,
        "limit_train_batches": 13,
    } | options


@pytest.mark.parametrize("name", ["ddp", "ddp_find_unused_parameters_true", "fsdp2", "tp", "fsdp1"])
def test_a_bad_loss_on_one_rank_is_skipped_by_all_though_its_gradients_are_zero(run, name):
    """Under DDP no rank would know: the loss leaves a NaN in a gradient before it is averaged."""
    bad, options = (0, 5), {"optimizer": torch.optim.AdamW, "lr": 0.05}
    poison = {(1, number): "no gradient" for number in bad}
    ours = assert_one_answer(run(name, NonFiniteGuard(), GradientClipping(1.0), poison=poison, **options))
    clean = assert_one_answer(run(name, NonFiniteGuard(), GradientClipping(1.0), bad=bad, **options))
    assert sum(ours["skipped"]) == 2
    assert_same_bits(ours["weights"], clean["weights"])


class DistributedLoss(Divided):
    """Its loss is a DTensor, as ``loss_parallel`` leaves it."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return DTensor.from_local(loss, self.device_mesh["tensor_parallel"], [Replicate()])


def with_a_distributed_loss(name, poison):
    return parallel.result(name, NonFiniteGuard(), GradientClipping(1.0), module=DistributedLoss("tp", poison=poison), steps=4)


def test_a_loss_may_be_distributed(run):
    bad, good = ({(rank, 1): factor for rank in (0, 1)} for factor in ("no gradient", 1.0))
    assert assert_one_answer(run("tp", bad, function=with_a_distributed_loss))["skipped"] == [False, True, False, False]
    assert not any(assert_one_answer(run("tp", good, function=with_a_distributed_loss))["skipped"])


def scales(name, kind, fused):
    """The loss scale and its growth counter after a loss that is NaN on one rank, and what was counted."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=4)
    guard, poison = NonFiniteGuard(), {(1, 5): math.nan if kind == "nan" else kind}
    options = {"optimizer": torch.optim.AdamW, "lr": 0.05, "fused": fused, "plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    parallel.train(name, guard, poison=poison, **options)
    return scaler.state_dict(), guard.skipped_steps, guard.overflowed_steps


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["nan", "no gradient"])
def test_a_loss_that_is_nan_on_one_rank_leaves_the_loss_scale_of_all(run, kind, fused):
    first, second = run("ddp", kind, fused, function=scales)
    assert first == second
    state, skipped, overflowed = first
    assert (skipped, overflowed) == (1, 0)
    assert state["scale"] >= 64.0


class Parts(LightningModule):
    """An encoder and a head, each with an optimizer of its own, or one for both behind a checkpoint; one loss for all."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head, self.kind = nn.Linear(4, 4), nn.Linear(4, 1), kind
        self.automatic_optimization = kind == "checkpoint"

    def forward(self, inputs):
        return self.head(self.encoder(inputs).tanh())

    def training_step(self, batch, batch_idx):
        outputs = self(batch[0]) if self.kind != "checkpoint" else checkpoint(self, batch[0].requires_grad_(), use_reentrant=True)
        loss = nn.functional.mse_loss(outputs, batch[1])
        if batch_idx == 5 and self.global_rank == 1:
            loss = loss * 0.0 + math.nan
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def configure_optimizers(self):
        if self.kind == "checkpoint":
            return torch.optim.AdamW(self.parameters(), lr=0.05)
        return [torch.optim.AdamW(part.parameters(), lr=0.05) for part in (self.encoder, self.head)]


@pytest.mark.parametrize(("kind", "steps"), [("an optimizer each", 2), ("checkpoint", 1)])
def test_a_bad_loss_reaches_every_optimizer_and_through_checkpoints(run, kind, steps):
    found = run("ddp", NonFiniteGuard(), module=Parts(kind))
    for each in found:
        assert sum(counters["skipped"] for counters in each["states"][0]["counters"].values()) == steps
    assert_same_bits(found[0]["weights"], found[1]["weights"])


@matrix(
    slow=is_variant,
    name=sorted(DROPS_MICRO_BATCHES),
    bad=[(1,), (0,), (2,), (4, 5), (3, 4, 5), (0, 1, 8), (12,)],
)
def test_a_bad_micro_batch_of_one_rank_is_dropped_by_all(run, name, bad):
    """The first, a middle and the last of a window, all of one, and one alone: as in one process that has the large batches."""
    family, options = dropping()
    ours = assert_one_answer(run(name, *family, poison={(1, number): math.nan for number in bad}, **options))
    family, options = dropping()
    single = parallel.result("single", *family, poison={(0, number): math.nan for number in bad}, **options)
    assert_same_run(ours, single)
    for what in ("counters", "dropped_micro_batches"):
        assert ours["states"][0][what] == single["states"][0][what]
    assert ours["states"][0]["dropped_micro_batches"] == len(bad)


class Halves(parallel.Divided):
    """Some micro-batches leave a layer without a gradient, on one rank only; and one micro-batch is bad."""

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        used = (self.global_rank + batch_idx) % 3 != 0
        net = self.net
        hidden = torch.tanh(net.up(net.norm(inputs)))
        outputs = net.head(torch.tanh(net.down(hidden))) if used else hidden.sum(1, keepdim=True)
        loss = torch.nn.functional.mse_loss(outputs, targets)
        return loss * math.nan if (batch_idx, self.global_rank) == (4, 1) else loss


def halves(name, *callbacks, **options):
    return parallel.result(name, *callbacks, module=Halves(), **options)


def test_gradients_that_only_some_ranks_have(run):
    """As DDP itself does with the window level, where nothing is bad; and one answer where something is."""
    options = {"accumulate_grad_batches": 3, "limit_train_batches": 4, "steps": 2}
    ours = assert_one_answer(run("ddp_find_unused_parameters_true", NonFiniteGuard(level="microbatch"), function=halves, **options))
    theirs = assert_one_answer(run("ddp_find_unused_parameters_true", NonFiniteGuard(), function=halves, **options))
    torch.testing.assert_close(ours["weights"], theirs["weights"])
    options["limit_train_batches"] = 6
    ours = assert_one_answer(run("ddp_find_unused_parameters_true", NonFiniteGuard(level="microbatch"), function=halves, **options))
    assert ours["states"][0]["dropped_micro_batches"] == 1


@pytest.mark.parametrize("name", sorted({*DIVIDED} - DROPS_MICRO_BATCHES))
def test_micro_batches_are_not_dropped_where_gradients_are_sharded(run, name):
    with pytest.raises(RanksFailedError, match='`level` must be "window" on several ranks unless plain DDP'):
        run(name, NonFiniteGuard(level="microbatch"))
