"""Where ranks do not see the same: what once made them decide differently, or wait for one another."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from clip_callbacks import (
    AccumulationRescaling,
    ClipRule,
    GradientClipping,
    NonFiniteGuard,
    clip_grad_norm_,
    clip_step,
)
from clip_callbacks.core.reduction import Reduction, averaged
from clip_callbacks.core.tensor_table import TensorTable
from tests.helpers import parallel
from tests.helpers.agreement import assert_one_answer, assert_same_run, reports
from tests.helpers.laws import ADAPTIVE
from tests.helpers.parallel import STRATEGIES
from tests.helpers.ranks import RanksFailedError
from tests.helpers.records import record_of
from tests.helpers.training import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite")

# Communication hooks


class Register(Callback):
    """As Lightning does on a GPU, before callbacks start."""

    def __init__(self, hook, state=None):
        self.hook, self.state = hook, state

    def on_fit_start(self, trainer, pl_module):
        state = self.state() if self.state else None
        trainer.strategy.model.register_comm_hook(state, self.hook)


def bf16_compress(state, bucket):
    """Under its own name torch lets it run over NCCL only."""
    return default_hooks.bf16_compress_hook(state, bucket)


def local_state():
    subgroup = [dist.new_group([0]), dist.new_group([1])][dist.get_rank()]
    return post_localSGD_hook.PostLocalSGDState(
        process_group=None, subgroup=subgroup, start_localSGD_iter=2, post_local_gradient_allreduce=True
    )


@pytest.mark.parametrize("hook", [bf16_compress, default_hooks.fp16_compress_hook])
def test_a_communication_hook_gives_the_bits_of_torchs_clip(run, hook):
    ours = assert_one_answer(run("ddp", Register(hook), GradientClipping(0.5)))
    theirs = run("ddp", Register(hook), gradient_clip_val=0.5)
    assert_same_bits(ours["weights"], theirs[0]["weights"])
    plain = run("ddp", GradientClipping(0.5))[0]
    assert not all(torch.equal(a, b) for a, b in zip(ours["weights"], plain["weights"], strict=True)), "the hook compresses"


@pytest.mark.parametrize("poison", [{}, {(1, 4): math.nan}])
def test_gradients_that_a_hook_leaves_different_are_decided_on_together(run, poison):
    family = [GradientClipping(0.5), NonFiniteGuard()]
    each = run("ddp", Register(post_localSGD_hook.post_localSGD_hook, local_state), *family, poison=poison, steps=8)
    assert str(each[0]["norms"]) == str(each[1]["norms"])
    assert each[0]["coefficients"] == each[1]["coefficients"]
    assert each[0]["skipped"] == each[1]["skipped"] == [bool(poison) and step == 4 for step in range(8)]


def test_micro_batches_are_not_dropped_behind_a_communication_hook(run):
    with pytest.raises(RanksFailedError, match='`level` must be "window" on several ranks unless plain DDP'):
        run("ddp", Register(bf16_compress), NonFiniteGuard(level="microbatch"))


# A GradScaler that finds an overflow on one rank only


class AllSharded(parallel.Divided):
    """Tensor parallel, every parameter a DTensor, the first one replicated; one shard overflows on one rank."""

    def configure_model(self):
        if self.net is not None:
            return
        self.net = parallel.Net()
        mesh = self.device_mesh["tensor_parallel"]
        parallelize_module(self.net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        for layer in (self.net.norm, self.net.head):
            distribute_module(
                layer,
                mesh,
                None,
                lambda _, inputs, mesh: tuple(DTensor.from_local(each, mesh, [Replicate()]) for each in inputs),
                lambda _, output, mesh: output.to_local(),
            )

    def on_after_backward(self):
        if self.number == 4 and self.global_rank == 1:
            self.net.down.weight.grad.to_local().view(-1)[0] = math.inf


def scaled(name):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    plugin.autocast_context_manager = lambda *_: torch.autocast("cpu", enabled=False)
    guard = NonFiniteGuard()
    found = parallel.train(name, GradientClipping(0.5), guard, module=AllSharded("tp"), steps=8, plugins=[plugin])
    return guard.overflowed_steps, guard.skipped_steps, plugin.scaler.get_scale(), found["weights"]


def test_an_overflow_on_one_rank_is_one_for_all_scalers(run):
    first, second = run("tp", function=scaled)
    assert first[:3] == second[:3] == (1, 0, 2.0)
    assert_same_bits(first[3], second[3])


# Windows of manual optimization


class Manual(parallel.Divided):
    """Two optimizers, one of a parameter of one entry, stepping at their own pace; losses are not divided."""

    def __init__(self, *args, syncs=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization, self.syncs = False, syncs

    def configure_optimizers(self):
        rest = [parameter for parameter in self.net.parameters() if parameter is not self.net.head.bias]
        return torch.optim.SGD(rest, lr=0.1), torch.optim.SGD([self.net.head.bias], lr=0.05)

    def training_step(self, batch, batch_idx):
        often, seldom = self.optimizers()
        if not self.syncs:
            self.net.set_requires_gradient_sync(batch_idx % 2 == 1)
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            often.step()
            often.zero_grad()
        if batch_idx % 4 == 3:
            seldom.step()
            seldom.zero_grad(set_to_none=batch_idx % 8 == 3)


def manual(name, *callbacks, syncs=True):
    return parallel.result(name, *callbacks, module=Manual(STRATEGIES[name][2], syncs=syncs), steps=8)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "tp", "fsdp2_tp"])
def test_windows_of_manual_optimization(run, name):
    ours = assert_one_answer(run(name, GradientClipping(0.5), AccumulationRescaling(divide=True), function=manual))
    single = manual("single", GradientClipping(0.5), AccumulationRescaling(divide=True))
    assert_same_run(ours, single)
    torch.testing.assert_close(ours["metrics"]["grad/accumulation_scale-SGD-1"], torch.tensor(0.25))


def test_gradients_that_fsdp_keeps_back_cannot_be_counted(run):
    with pytest.raises(RanksFailedError, match=r"`divide` must be False where FSDP keeps gradients back"):
        run("fsdp2", AccumulationRescaling(divide=True), function=manual, syncs=False)


class GivingUp(parallel.Divided):
    """A window begun at batch 2 is given up at batch 3."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        if batch_idx % 2 == 0 or batch_idx == 3:
            self.optimizers().zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            self.optimizers().step()


class FailsOnce:
    calls = 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls == 3 and dist.get_rank() == 1:
            raise KeyError("no labels")
        return 2.0


def given_up(name):
    return parallel.result(name, AccumulationRescaling(FailsOnce(), divide=True), module=GivingUp(), steps=8)


def test_a_weight_that_failed_in_a_window_given_up_is_not_forgotten(run):
    with pytest.raises(RanksFailedError) as caught:
        run("ddp", function=given_up)
    assert "`weight` failed on another rank" in caught.value.errors[0]
    assert "KeyError: 'no labels'" in caught.value.errors[1]


# Micro-batches


class ChannelsLast(parallel.Divided):
    def configure_model(self):
        if self.net is None:
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(3, 1))
            self.net[1].weight = nn.Parameter(torch.randn(2, 1, 2, 3).permute(3, 1, 0, 2))


def channels_last(name, *callbacks):
    options = {"steps": 4, "accumulate_grad_batches": 2}
    return parallel.result(name, *callbacks, module=ChannelsLast(optimizer=torch.optim.AdamW, fused=True), **options)


def test_means_are_laid_out_as_their_parameters_are(run):
    """Fused kernels read memory in order."""
    whole = assert_one_answer(run("ddp", NonFiniteGuard(), function=channels_last))
    dropping = assert_one_answer(run("ddp", NonFiniteGuard(level="microbatch"), function=channels_last))
    torch.testing.assert_close(dropping["weights"], whole["weights"])


class FailsLater(FailsOnce):
    def __call__(self, batch):
        self.calls += 1
        if self.calls == 5 and dist.get_rank() == 1:
            raise KeyError("no labels")
        return 2.0


@pytest.mark.parametrize("level", ["window", "microbatch"])
def test_a_weight_that_failed_is_not_dropped_with_its_micro_batch(run, level):
    with pytest.raises(RanksFailedError) as caught:
        run("ddp", NonFiniteGuard(level=level), AccumulationRescaling(FailsLater()), accumulate_grad_batches=2, steps=8)
    assert "`weight` failed on another rank" in caught.value.errors[0]
    assert "KeyError: 'no labels'" in caught.value.errors[1]


class Embedded(parallel.Divided):
    def configure_model(self):
        if self.net is None:
            self.net = nn.Sequential(nn.EmbeddingBag(4, 4, sparse=True), parallel.Net())

    def training_step(self, batch, batch_idx):
        return self.net((batch[0] > 0).long()).square().mean()


def embedded(name, *callbacks):
    return parallel.result(name, *callbacks, module=Embedded(), accumulate_grad_batches=2, steps=2)


@pytest.mark.parametrize("name", ["ddp", "ddp_find_unused_parameters_true"])
def test_sparse_micro_batches_are_refused(run, name):
    with pytest.raises(RanksFailedError, match='`level` must be "window" with sparse gradients on several ranks'):
        run(name, NonFiniteGuard(level="microbatch"), function=embedded)


def ignoring(name, *callbacks):
    module = parallel.Divided()
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["net.head.bias"])
    return parallel.result(name, *callbacks, module=module)


def test_micro_batches_are_not_dropped_where_ddp_ignores_parameters(run):
    with pytest.raises(RanksFailedError, match="cannot be set aside if they are sharded or ignored"):
        run("ddp", NonFiniteGuard(level="microbatch"), function=ignoring)


def half_means():
    return averaged([torch.full((2,), 40000.0).half()], [torch.zeros(2).half()])[0].tolist()


def test_means_of_half_precision_do_not_overflow(two_ranks):
    assert two_ranks.run(half_means) == [[40000.0] * 2] * 2


# One rank asks alone


class TwoNets(parallel.Divided):
    """Two optimizers, one after the other; the second one's loss is bad at batch 2."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_model(self):
        if self.net is None:
            self.net = nn.ModuleList([parallel.Net(), parallel.Net()])

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1, fused=True) for net in self.net]

    def training_step(self, batch, batch_idx):
        for number, (net, optimizer) in enumerate(zip(self.net, self.optimizers(), strict=True)):
            optimizer.zero_grad()
            self.manual_backward(net(batch[0]).square().mean() * (math.nan if (number, batch_idx) == (1, 2) else 1.0))
            optimizer.step()


def two_nets(name, *callbacks):
    return parallel.result(name, *callbacks, module=TwoNets(), steps=8, log_every_n_steps=1000)


def test_a_verdict_is_raised_at_its_own_optimizers_step(run):
    with pytest.raises(RanksFailedError) as caught:
        run("ddp_find_unused_parameters_true", NonFiniteGuard(deferred=True, max_consecutive=1), AskAlone(), function=two_nets)
    assert all("NonFiniteGradientError" in error for error in caught.value.errors)


class AskAlone(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.is_global_zero:
            guard = next(callback for callback in trainer.callbacks if isinstance(callback, NonFiniteGuard))
            _ = guard.skipped_steps, guard.state_dict()


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_deferred_verdict_read_by_one_rank_stops_all(run, name):
    guard = NonFiniteGuard(deferred=True, max_consecutive=2)
    with pytest.raises(RanksFailedError) as caught:
        run(name, guard, AskAlone(), optimizer=torch.optim.AdamW, fused=True, poison={(1, 2): math.nan, (1, 3): math.nan})
    assert all("NonFiniteGradientError" in error for error in caught.value.errors)
    assert all("at step 3" in error for error in caught.value.errors)


# Optimizers and parameters


class Sneaky(torch.optim.SGD):
    """Decays parameters without a gradient too."""

    @torch.no_grad()
    def step(self, closure=None):
        closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.99)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "tp"])
def test_an_optimizer_that_moves_without_gradients_is_found_out_by_all(run, name):
    with pytest.raises(RanksFailedError) as caught:
        run(name, NonFiniteGuard(), optimizer=Sneaky, poison={(1, 2): math.nan})
    assert all("`optimizer` must leave parameters without a gradient alone, got Sneaky" in error for error in caught.value.errors)


def parameter(gradient, mesh):
    made = nn.Parameter(distribute_tensor(torch.zeros_like(gradient), mesh, [Shard(0)]))
    made.grad = distribute_tensor(gradient, mesh, [Shard(0)])
    return made


def on_meshes(first, second):
    pair = [parameter(torch.full((4,), size), DeviceMesh("cpu", ranks)) for size, ranks in ((1.0, first), (10.0, second))]
    report, _ = clip_step(pair, rules=[ClipRule(4.0, "parameter")])
    return record_of(report).parameter_norms.tolist(), report.coefficients.tolist()


@pytest.mark.parametrize(("first", "second"), [([0, 1], [2, 3]), ([0, 1, 2, 3], [2, 3]), ([2, 3], [1, 2])])
def test_meshes_of_some_of_the_ranks(four_ranks, first, second):
    assert four_ranks.run(on_meshes, first, second) == [([2.0, 20.0], [1.0, pytest.approx(0.2)])] * 4


def met_before():
    """First each rank a table on its own mesh, in the place of the other's; then one on a mesh that only one of them knows."""
    together = partial(Reduction.of, whole_world=True)
    totals = []
    for gradient, mesh in (
        (torch.ones(3), [DeviceMesh("cpu", [0]), DeviceMesh("cpu", [1])][dist.get_rank()]),
        (torch.ones(4), DeviceMesh("cpu", [1])),
    ):
        optimizer = torch.optim.SGD([parameter(gradient, mesh)], lr=0.1)
        report, _ = clip_step(TensorTable.of_optimizer(optimizer, reduce=together), rules=[])
        totals.append(report.total_norm.item())
    return totals


def test_a_mesh_that_one_rank_has_met_before(two_ranks):
    assert two_ranks.run(met_before) == [[pytest.approx(math.sqrt(3)), 2.0]] * 2


def sparse_beside():
    mesh = init_device_mesh("cpu", (2,))
    sharded, embedding = parameter(torch.full((6,), 2.0), mesh), nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([0, 1, 1])).sum().backward()
    report, _ = clip_step([sharded, embedding.weight], rules=[ClipRule(1.0)])
    return report.total_norm.item()


def test_sparse_gradients_beside_dtensors(two_ranks):
    assert two_ranks.run(sparse_beside) == [pytest.approx(math.sqrt(6 * 4 + 2 * 1 + 2 * 4))] * 2


def order(norm_type):
    clip_grad_norm_([parameter(torch.ones(5), init_device_mesh("cpu", (2,)))], 1.0, norm_type)


@pytest.mark.parametrize("norm_type", [0.0, -1.0, -math.inf])
def test_orders_that_parts_do_not_have(two_ranks, norm_type):
    with pytest.raises(RanksFailedError, match="`norm_type` must be above 0 where ranks hold parts of the parameters"):
        two_ranks.run(order, norm_type)


# Checkpoints that load late


class Scheduled(parallel.Divided):
    def configure_optimizers(self):
        made = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.StepLR(made, 1, 0.5)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 3}}


class Rates(Callback):
    def __init__(self, path=None):
        self.path, self.rates = path, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if self.path and batch_idx == 4:
            trainer.save_checkpoint(self.path)


def rates(name, path, is_first):
    note, guard = Rates(path if is_first else None), NonFiniteGuard()
    module = Scheduled(STRATEGIES[name][2], momentum=0.5, poison={(1, 1): math.nan} if is_first else {})
    family = [guard, GradientClipping(ADAPTIVE), note]
    parallel.train(name, *family, module=module, steps=12, ckpt_path=None if is_first else path)
    return note.rates, guard.state_dict()


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_held_schedules_go_on_where_they_were(run, name, tmp_path):
    whole = run(name, tmp_path / "a.ckpt", is_first=True, function=rates)
    resumed = run(name, tmp_path / "a.ckpt", is_first=False, function=rates)
    for (before, state), (after, end) in zip(whole, resumed, strict=True):
        assert after == before[5:]
        assert end["skipped_batches"] == state["skipped_batches"]
        assert end["history"][0]["steps"] == state["history"][0]["steps"] == 12


def finished(name, path):
    family = [NonFiniteGuard(), GradientClipping(ADAPTIVE)]
    first = parallel.train(name, *family, steps=6, momentum=0.5)
    first["trainer"].save_checkpoint(path)
    again = [NonFiniteGuard(), GradientClipping(ADAPTIVE)]
    parallel.train(name, *again, steps=6, momentum=0.5, ckpt_path=path)
    return [str(member.state_dict()) for member in family], [str(member.state_dict()) for member in again]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_finished_run_resumed_forgets_nothing(run, name, tmp_path):
    for before, after in run(name, tmp_path / "a.ckpt", function=finished):
        assert before == after


# Reports


class Infinite(parallel.Divided):
    """The loss of rank 1 is finite, its gradient is not."""

    def training_step(self, batch, batch_idx):
        outputs = self.net(batch[0])
        if batch_idx == 3 and self.global_rank == 1:
            outputs.register_hook(lambda gradient: gradient * math.inf)
        return nn.functional.mse_loss(outputs, batch[1])

    def configure_model(self):
        super().configure_model()
        self.net.down.bias.requires_grad_(False)


def infinite(name):
    return reports(name, NonFiniteGuard(), module=Infinite(STRATEGIES[name][2]), steps=5)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_no_rank_is_named_where_none_is_known(run, name):
    (report,) = [message for message in run(name, function=infinite)[0] if "Non-finite" in message]
    assert "the loss is finite, its gradients are not" in report
    assert "rank 1" not in report
    assert "Where it began" not in report
    assert "in 7 of 7 parameters" in report
    assert "Nearest finite" not in report


# Gradients that other code sets to zero


class ForgetsOnOneRank(parallel.Divided):
    """Sets gradients to zero after the first batch of each window, on the last rank alone."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_rank == 1 and batch_idx % 3 == 0:
            self.optimizers().zero_grad()


def forgetting(name, *callbacks):
    return parallel.result(name, *callbacks, module=ForgetsOnOneRank(), steps=4, accumulate_grad_batches=3)


@pytest.mark.parametrize(
    "callback",
    [AccumulationRescaling(), NonFiniteGuard(level="microbatch"), NonFiniteGuard(loss_above=1e9)],
    ids=["rescaling", "microbatch", "loss"],
)
def test_a_rank_that_sets_gradients_to_zero_divides_its_window_as_the_others(run, callback):
    """Gradients are averaged over ranks before they are divided: factors of their own would part the weights of the ranks."""
    assert_one_answer(run("ddp", GradientClipping(0.5), callback, function=forgetting))
