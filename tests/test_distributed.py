"""One answer on every rank, under every way of dividing a network, in real processes over gloo."""

from __future__ import annotations

import math
import time
from functools import lru_cache
from pathlib import Path

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
    Tightest,
)
from clip_callbacks.blocks import SCOPES
from tests import parallel
from tests.conftest import assert_same_bits, numbers
from tests.parallel import STRATEGIES
from tests.ranks import RanksFailedError
from tests.test_laws import ADAPTIVE, LIMITS

pytestmark = pytest.mark.filterwarnings(
    "ignore:Non-finite"
)  # of the single process; those of ranks are looked at where they matter

DIVIDED = [name for name, (ranks, _, _) in STRATEGIES.items() if ranks > 1]
DROPS_MICRO_BATCHES = {name for name in DIVIDED if name.startswith("ddp")}
CARRIES = {name for name in DIVIDED if name != "tp"}
ADAPTIVE_LIMITS = {
    "global": ADAPTIVE,
    "group": QuantileLimit(0.3, window=10),
    "layer": RobustZScoreLimit(0.5, window=10, warmup=2),
    "parameter": EmaLimit(warmup=2),
    "unit": Tightest(RatioLimit(0.1), ADAPTIVE),
}
NORM_TYPES = (1.0, 2.0, 3.0, math.inf)


def nothing(name):
    """The processes are there."""


def assert_one_answer(results):
    """The same bits on every rank."""
    for other in results[1:]:
        assert_same_bits(results[0]["weights"], other["weights"])
        assert str(results[0]["norms"]) == str(other["norms"])
        assert results[0]["coefficients"] == other["coefficients"]
        torch.testing.assert_close(results[0]["states"], other["states"], rtol=0, atol=0)
    return results[0]


def assert_same_run(ours, single):
    torch.testing.assert_close(ours["weights"], single["weights"])
    for what in ("norms", "coefficients"):
        torch.testing.assert_close(torch.tensor(ours[what]), torch.tensor(single[what]))


# Equal to the single process


def limits_of(scope, norm_type):
    return (0.3 if scope in {"parameter", "unit"} else 0.6) * (4 if norm_type == 1 else 1), ADAPTIVE_LIMITS[scope]


def clipped_runs(name, norm_type, combinations):
    return [parallel.result(name, GradientClipping(max_norm, scope=scope, norm_type=norm_type)) for scope, max_norm in combinations]


# four ranks share two cores here: the variants of sharding over four have half the orders
HALF = {"fsdp2_4", "fsdp2_tp_groups", "hsdp1"}
CELLS = [
    pytest.param(name, p, marks=[pytest.mark.slow] if STRATEGIES[name][0] == 4 and (name, p) != ("fsdp2_tp", 2.0) else [])
    for name in DIVIDED
    for p in NORM_TYPES
    if name not in HALF or p in {2.0, math.inf}
]


@pytest.mark.parametrize(("name", "norm_type"), CELLS)
def test_norms_coefficients_and_weights_are_those_of_one_process(run, name, norm_type):
    scopes = SCOPES if norm_type in {2.0, math.inf} else ("layer", "unit")  # of the less usual orders half, for time
    combinations = [(scope, limit) for scope in scopes for limit in limits_of(scope, norm_type)]
    each = run(name, norm_type, combinations, function=clipped_runs)
    for i, (scope, limit) in enumerate(combinations):
        ours = assert_one_answer([results[i] for results in each])
        alone = GradientClipping(limit, scope="global" if scope == "group" else scope, norm_type=norm_type)
        single = parallel.result("single", alone)
        if scope != "group" or "groups" not in name:
            assert_same_run(ours, single)
        assert min(ours["coefficients"]) < 1.0
        if scope == "global" and isinstance(limit, float):
            assert max(ours["coefficients"]) == 1.0, "some steps are clipped and some are not"


def limited_runs(name):
    """With each limit of the laws, by output rows: of shards along any dimension, and of flat pieces that cut rows."""
    return [parallel.result(name, GradientClipping(make(1.0), scope="unit"), steps=8) for make in LIMITS]


@pytest.mark.parametrize("name", ["fsdp2", "fsdp1", "tp"])
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
    ours = assert_one_answer(run(name, guard, GradientClipping(ADAPTIVE), poison=poison))
    assert [step for step, skipped in enumerate(ours["skipped"]) if skipped] == [12]
    single = parallel.result("single", NonFiniteGuard(), GradientClipping(ADAPTIVE), bad=(12,))
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


@pytest.mark.parametrize("name", DIVIDED)
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


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("name", DIVIDED)
def test_the_write_rides_on_fused_optimizers(run, name, deferred):
    options = {"optimizer": torch.optim.AdamW, "lr": 0.02}
    family = [GradientClipping(0.5), NonFiniteGuard(deferred=deferred)]
    if name not in CARRIES:
        with pytest.raises(RanksFailedError, match="mixed torch.Tensor and DTensor"):  # torch's fused kernel, with us or without
            run(name, *family, fused=True, **options)
        return
    ours = assert_one_answer(run(name, *family, fused=True, **options))
    assert_same_run(ours, parallel.result("single", GradientClipping(0.5), **options))


# A bad step


BAD = [((0,), math.nan), ((7,), math.inf), ((0, 1, 19), math.nan)]
BAD_STEPS = [
    (name, bad, poison, deferred)
    for name in DIVIDED
    for bad, poison in (BAD if STRATEGIES[name][0] == 2 else BAD[2:])
    for deferred in ([False, True] if name in CARRIES else [False])
]


@pytest.mark.parametrize(("name", "bad", "poison", "deferred"), BAD_STEPS)
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


def reports(name, *callbacks, **options):
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parallel.result(name, *callbacks, **options)
    return [str(warning.message) for warning in caught]


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


@pytest.mark.parametrize("bad", [(1,), (0,), (2,), (4, 5), (3, 4, 5), (0, 1, 8), (12,)])
@pytest.mark.parametrize("name", sorted(DROPS_MICRO_BATCHES))
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


# What is logged


def warnings_of(name, folder):
    from lightning.pytorch.loggers import CSVLogger

    family = [GradientClipping(0.5), NonFiniteGuard(), AccumulationRescaling(), GradientNormMonitor()]
    found = reports(name, *family, logger=CSVLogger(folder), accumulate_grad_batches=2, steps=6, log_every_n_steps=2)
    return [message for message in found if "sync_dist" in message or "grad/" in message]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "tp"])
def test_metrics_are_logged_without_a_warning(run, name, tmp_path):
    assert run(name, tmp_path, function=warnings_of) == [[], []]
    (log,) = tmp_path.rglob("metrics.csv")
    assert log.read_text().count("\n") > 3


# How many collectives


def counted(name, *callbacks, **options):
    """Collectives of each step's pass, counted by torch."""
    from lightning.pytorch import Callback
    from torch.distributed.tensor.debug import CommDebugMode

    counts, mode = [], CommDebugMode()

    class Begin(Callback):
        def on_before_optimizer_step(self, *_):
            mode.__enter__()

    class End(Callback):
        def on_before_optimizer_step(self, *_):
            mode.__exit__(None, None, None)
            counts.append(mode.get_total_counts())

    parallel.result(name, Begin(), *callbacks, End(), **options)
    return counts


@pytest.mark.parametrize(("name", "expected"), parallel.COLLECTIVES.items())
def test_collectives_of_a_step(run, name, expected):
    family = [
        GradientClipping(0.5, scope="layer"), NonFiniteGuard(), AccumulationRescaling(),
        GradientNormMonitor(), GradientNormMonitor(scope="parameter"),
    ]  # fmt: skip
    for counts in run(name, *family, function=counted, steps=4):
        assert counts == [expected] * 4


def test_the_page_says_what_was_tested():
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in page.splitlines() if line.startswith("| `")]
    table = {row[0].strip("`"): row[1:] for row in rows if len(row) == 5}
    assert list(table) == [name for name in STRATEGIES if name in DIVIDED]
    for name, (_, collectives, micro_batches, rides) in table.items():
        assert int(collectives) == parallel.COLLECTIVES[name]
        assert micro_batches == ("dropped by all ranks" if name in DROPS_MICRO_BATCHES else "refused")
        assert rides.startswith("yes" if name in CARRIES else "no")


# Checkpoints


def saved(name, folder, *callbacks, **options):
    found = parallel.train(name, *callbacks, **options)
    found["trainer"].save_checkpoint(folder / "half.ckpt")
    return True


def resumed(name, folder, *callbacks, **options):
    found = parallel.train(name, *callbacks, ckpt_path=folder / "half.ckpt", **options)
    return {key: found[key] for key in ("weights", "norms", "coefficients")} | {
        "states": [numbers(member.state_dict()) for member in found["members"]]
    }


def stateful():
    return [GradientClipping(ADAPTIVE), NonFiniteGuard()]


AFTER = {"fsdp2": ["fsdp2_1", "fsdp2", "fsdp2_4", "single", "ddp"], "ddp": ["single", "ddp"]}
RESUMED = [(before, after, False) for before, every in AFTER.items() for after in every]
RESUMED += [("fsdp2", after, True) for after in ("fsdp2_1", "fsdp2", "fsdp2_4")]


@pytest.mark.parametrize(("before", "after", "is_distributed"), RESUMED)
def test_a_run_saved_on_two_ranks_resumes_on_one_and_on_four(run, tmp_path, before, after, is_distributed):
    """Lightning reads a checkpoint folder by the strategy that wrote it, a single file by all but that one."""
    options = {"max_epochs": 2, "steps": 8, "poison": {(0, 3): math.nan}, "lr": 0.02, "momentum": 0.9}
    whole = parallel.result("single", *stateful(), **options)
    kept = {} if before == "ddp" else {"save_distributed_checkpoint": is_distributed}
    run(before, tmp_path, *stateful(), **options | {"max_epochs": 1}, function=saved, strategy_options=kept)
    assert (tmp_path / "half.ckpt").is_dir() is is_distributed
    options["poison"] = {}
    if after == "single":
        ours = resumed(after, tmp_path, *stateful(), **options)
    else:
        ours = assert_one_answer(run(after, tmp_path, *stateful(), **options, function=resumed))
    torch.testing.assert_close(ours["weights"], whole["weights"])
    torch.testing.assert_close(torch.tensor(ours["norms"]), torch.tensor(whole["norms"][8:]))
    assert ours["states"][1]["counters"][0]["skipped"] == 1
    assert ours["states"][0]["history"][0]["steps"] == 16
