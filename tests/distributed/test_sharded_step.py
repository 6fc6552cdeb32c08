"""``clip_step`` and ``clip_grad_norm_`` on sharded gradients, without Lightning.

The counterparts of PyTorch's own tests, read for what they check: ``test_fully_shard_clip_grad_norm_.py`` (norm types on meshes of
one and two dimensions against a copy that is not sharded; the clipped norm), ``test_fsdp_clip_grad_norm.py`` (parity with a whole
copy for every sharding strategy and both kinds of flat parameters, low precision, no gradients at all), and those that clip the
DTensors of tensor parallel layers.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from clip_callbacks import ClipRule, ParameterTable, clip_grad_norm_, clip_step
from clip_callbacks.core.reduction import Reduction, shard_of
from clip_callbacks.core.tensor_table import TensorTable
from tests.helpers.matrix import matrix
from tests.helpers.operations import Transfers
from tests.helpers.ranks import RanksFailedError
from tests.helpers.records import record_of

NORM_TYPES = (1.0, 2.0, 3.0, 8.0, math.inf)
RULES = (
    [ClipRule(1.0)],
    [ClipRule(0.3, "parameter")],
    [ClipRule(0.5, "layer"), ClipRule(0.6)],
    [ClipRule(0.1, include=r"^0\.")],
    [ClipRule(1e9)],
)


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 1))


def whole_gradients(module):
    return [grad.full_tensor() if isinstance(grad := parameter.grad, DTensor) else grad for parameter in module.parameters()]


def backward(module, inputs, size=1.0):
    module.zero_grad()
    (size * module(inputs).square().sum()).backward()


def sharded(kind):
    module, reference = network(), network()
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(module, mesh=mesh)
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(module[2], mesh=mesh)
        fully_shard(module, mesh=mesh)
    elif kind == "tp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallelize_module(module, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(module, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(module, mesh=mesh["dp"])
    return module, reference


def steps(kind, norm_type):
    """Each rule list on the sharded network and on a whole one; inputs are the same on all ranks, and so are means over them."""
    module, reference = sharded(kind)
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    found = []
    for rules in RULES:
        backward(module, inputs)
        backward(reference, inputs)
        ours, theirs = (
            record_of(clip_step(each.named_parameters(), rules=rules, norm_type=norm_type)[0]) for each in (module, reference)
        )
        torch.testing.assert_close(whole_gradients(module), whole_gradients(reference))
        for name in ("total_norm", "clip_coef", "clipped_norm", "parameter_norms", "norms", "coefficients"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), msg=lambda text, name=name: f"{name}: {text}")
        found.append([ours.total_norm.item(), ours.clip_coef.item()])
    return found


@matrix(
    lambda kind, ranks, _: ranks == 4 if kind in {"hsdp", "fsdp_tp"} else kind == "fsdp" or ranks == 2,
    slow=lambda kind, ranks, p: ranks == 4 and kind != "fsdp_tp" and p != 2.0,
    kind=["fsdp", "tp", "hsdp", "fsdp_tp"],
    ranks=[2, 4],
    norm_type=NORM_TYPES,
)
def test_sharded_steps_are_those_of_a_whole_network(two_ranks, four_ranks, kind, ranks, norm_type):
    each = {2: two_ranks, 4: four_ranks}[ranks].run(steps, kind, norm_type)
    assert all(found == each[0] for found in each)
    assert min(coefficient for _, coefficient in each[0]) < 1.0 == max(coefficient for _, coefficient in each[0])


def dropped_in(kind, norm_type, size):
    """Against torch's own on a whole copy in float64, where nothing overflows."""
    module, _ = sharded(kind)
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    backward(module, inputs, size)
    gradients = [gradient.double() for gradient in whole_gradients(module)]
    total = clip_grad_norm_(module.parameters(), 0.5, norm_type)
    expected = torch.nn.utils.get_total_norm(gradients, norm_type)
    assert not isinstance(total, DTensor)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0.0)
    clipped = torch.nn.utils.get_total_norm([gradient.double() for gradient in whole_gradients(module)], norm_type)
    torch.testing.assert_close(clipped, expected.clamp(max=0.5), rtol=1e-5, atol=0.0)
    return total.item()


@matrix(kind=["fsdp", "tp", "fsdp_tp"], norm_type=NORM_TYPES, size=[1.0, 1e25, 1e-25])
def test_the_drop_in_has_the_true_norm_also_where_powers_leave_the_range(two_ranks, four_ranks, kind, norm_type, size):
    each = (four_ranks if kind == "fsdp_tp" else two_ranks).run(dropped_in, kind, norm_type, size)
    assert len(set(each)) == 1


def torchs_own(kind):
    module, _ = sharded(kind)
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    backward(module, inputs)
    ours = copy.deepcopy([gradient.clone() for gradient in whole_gradients(module)])
    theirs = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5).full_tensor()
    their_gradients = [gradient.clone() for gradient in whole_gradients(module)]
    backward(module, inputs)
    torch.testing.assert_close(whole_gradients(module), ours)
    torch.testing.assert_close(clip_grad_norm_(module.parameters(), 0.5), theirs)
    torch.testing.assert_close(whole_gradients(module), their_gradients)


def test_the_drop_in_equals_torchs_where_that_works(two_ranks):
    two_ranks.run(torchs_own, "fsdp")


def test_torchs_own_fails_with_dtensors_beside_plain_tensors(two_ranks):
    """Which ours does not (pytorch/pytorch#180346): if this fails, the comparison above can have more rows."""
    with pytest.raises(RanksFailedError):
        two_ranks.run(torchs_own, "tp")


def without_gradients():
    module, _ = sharded("fsdp")
    report, _ = clip_step(module.parameters())
    assert clip_grad_norm_(module.parameters(), 1.0) == 0.0
    return report.total_norm.item(), report.outcome == "taken"


def test_no_gradients_at_all(two_ranks):
    assert two_ranks.run(without_gradients) == [(0.0, True)] * 2


def half(dtype):
    module, _ = sharded("fsdp")
    module.to(dtype)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 1000.0)
    count = sum(parameter.numel() for parameter in module.parameters())
    report, _ = clip_step(module.parameters(), rules=[ClipRule(1.0)])
    torch.testing.assert_close(report.total_norm, torch.tensor(1000.0 * math.sqrt(count)))
    assert report.total_norm.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(two_ranks, dtype):
    two_ranks.run(half, dtype)


def pending():
    """A gradient whose sum over ranks is still to be made, one laid out otherwise, and one of a sequence parallel layer."""
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.arange(6.0)
    pend, other = (nn.Parameter(distribute_tensor(weight, mesh, [place])) for place in (Replicate(), Shard(0)))
    pend.grad = DTensor.from_local(torch.full((6,), 1.0 + dist.get_rank()), mesh, [Partial()])
    other.grad = distribute_tensor(weight, mesh, [Replicate()])
    module = nn.Sequential(nn.LayerNorm(4))
    parallelize_module(module, mesh, {"0": SequenceParallel()})
    inputs = DTensor.from_local(torch.randn(1, 3, 4), mesh, [Shard(1)])
    (module(inputs) * inputs).sum().backward()
    weights = [pend, other, *module.parameters()]
    report, _ = clip_step(weights, rules=[ClipRule(1.0)])
    gradients = [parameter.grad.full_tensor() for parameter in weights]
    torch.testing.assert_close(torch.nn.utils.get_total_norm(gradients), torch.tensor(1.0))
    torch.testing.assert_close(record_of(report).parameter_norms[:2], torch.tensor([3.0 * math.sqrt(6), weight.norm()]))
    return report.total_norm.item()


def test_gradients_that_are_laid_out_otherwise_than_their_parameters(two_ranks):
    first, second = two_ranks.run(pending)
    assert first == second


def no_full_gradient():
    """Peak memory: the pass makes nothing of the size of a gradient."""
    mesh = init_device_mesh("cpu", (2,))
    parameters = [nn.Parameter(distribute_tensor(torch.zeros(1 << 18), mesh, [Shard(0)])) for _ in range(8)]
    table = ParameterTable(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    clip_step(table)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        report, _ = clip_step(table)
    assert report.clip_coef < 1
    return max(abs(event.self_cpu_memory_usage) for event in profile.key_averages()) / (8 * 4 * (1 << 17))


def test_extra_memory_is_less_than_a_hundredth_of_the_shards(two_ranks):
    assert max(two_ranks.run(no_full_gradient)) < 0.01


def collectives_of(bad):
    from torch.distributed.tensor.debug import CommDebugMode

    module, _ = sharded("fsdp")
    backward(module, torch.ones(4, 5))
    if bad and dist.get_rank() == 1:
        shard_of(module[0].weight.grad)[0] = math.nan
    with CommDebugMode() as mode:
        clip_step(module.named_parameters(), rules=[ClipRule(0.3, "parameter"), ClipRule(0.2)], nonfinite="skip")
    assert all((parameter.grad is None) is bad for parameter in module.parameters())
    return mode.get_total_counts()


def test_collectives(two_ranks):
    assert two_ranks.run(collectives_of, False) == [1, 1]
    assert two_ranks.run(collectives_of, True) == [3, 3], "the norms are measured again, the largest first"


# Flat parameters: FullyShardedDataParallel, the first


def flat(strategy, use_orig_params, norm_type, precision):
    options = {}
    if "HYBRID" in strategy:
        options["device_mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if precision:
        options["mixed_precision"] = MixedPrecision(reduce_dtype=torch.bfloat16)
    reference, inner = network(), network()
    options |= {"device_id": torch.device("cpu"), "use_orig_params": use_orig_params}
    module = FullyShardedDataParallel(inner, sharding_strategy=ShardingStrategy[strategy], **options)
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    totals = []
    for scope in ("global", "parameter") if use_orig_params else ("global",):
        rules = [ClipRule(0.5, scope)]
        backward(module, inputs)
        backward(reference, inputs)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        table = TensorTable.of_optimizer(
            optimizer, module.named_parameters(), reduce=lambda tensors: Reduction.of_flat(tensors, module)
        )
        assert not any("_fsdp_wrapped_module" in name for name in table.names)
        ours, _ = clip_step(table, rules=rules, norm_type=norm_type)
        theirs, _ = clip_step(reference.named_parameters(), rules=rules, norm_type=norm_type)
        tolerance = {"rtol": 2e-2, "atol": 1e-2} if precision else {}
        torch.testing.assert_close(ours.total_norm, theirs.total_norm, **tolerance)
        torch.testing.assert_close(ours.clip_coef, theirs.clip_coef, **tolerance)
        if use_orig_params:
            torch.testing.assert_close(record_of(ours).parameter_norms, record_of(theirs).parameter_norms, **tolerance)
        again, _ = clip_step(table, rules=[], norm_type=norm_type)
        torch.testing.assert_close(again.total_norm, theirs.clipped_norm, **tolerance)
        totals.append(ours.total_norm.item())
    return totals


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize(
    ("strategy", "ranks", "precision"),
    [
        ("FULL_SHARD", 2, False), ("SHARD_GRAD_OP", 2, False), ("NO_SHARD", 2, False), ("FULL_SHARD", 2, True),
        ("FULL_SHARD", 4, False), ("HYBRID_SHARD", 4, False),
    ],
)  # fmt: skip
def test_flat_parameters(two_ranks, four_ranks, strategy, ranks, precision, use_orig_params, norm_type):
    each = {2: two_ranks, 4: four_ranks}[ranks].run(flat, strategy, use_orig_params, norm_type, precision)
    assert all(totals == each[0] for totals in each)


# Groups smaller than the world


def part_of_the_world():
    """A mesh of two dimensions on two of four ranks is reduced along one dimension after the other; others take no part."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("pipeline", "shard", "tensor"))["shard", "tensor"]
    weight = nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Shard(0), Replicate()]))
    weight.grad = distribute_tensor(torch.full((6,), 1.0 + rank // 2), mesh, [Shard(0), Replicate()])
    plain = nn.Parameter(torch.ones(1))
    plain.grad = torch.full((1,), 1.0 + rank // 2)
    if rank == 3:
        plain.grad = torch.full((1,), 100.0)  # a copy that is not that of the mesh's first rank
    report, _ = clip_step([weight, plain], rules=[])
    return report.total_norm.item()


def test_each_mesh_has_a_norm_of_its_own(four_ranks):
    first, second = math.sqrt(7), 2 * math.sqrt(7)
    assert four_ranks.run(part_of_the_world) == pytest.approx([first, first, second, second])


# Host syncs, told without a GPU: fake CUDA shards in a fake process group


@pytest.fixture
def fake_shards():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh, mode = DeviceMesh("cuda", [0, 1]), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        shards = [DTensor.from_local(torch.zeros(10, device="cuda"), mesh, [Shard(0)], run_check=False) for _ in range(5)]
        parameters = [nn.Parameter(shard) for shard in shards]
        for parameter in parameters:
            parameter.grad = DTensor.from_local(torch.ones(10, device="cuda"), mesh, [Shard(0)], run_check=False)
        optimizer = torch.optim.AdamW(parameters, fused=True)
    with mock.patch("clip_callbacks.core.reduction._device", return_value=torch.device("cpu")):  # there is no current CUDA device
        reduction = Reduction.of(parameters)
    with mode:
        on_device = dataclasses.replace(reduction, counts=torch.ones(5, dtype=torch.float64, device="cuda"))
        yield optimizer, TensorTable.of_optimizer(optimizer, reduce=lambda _: on_device)
    dist.destroy_process_group()


def test_a_deferred_sharded_step_reads_nothing_on_the_host(fake_shards):
    optimizer, table = fake_shards
    with Transfers() as transfers:
        report, _ = clip_step(table, fused=optimizer, deferred=True)
        record_of(report).to_host()
    assert transfers.waits
    assert not any(transfers.waits)
    assert transfers.counts["c10d.allreduce_"] == 1
    assert report.total_norm.device.type == "cuda"


def test_a_sharded_step_that_is_not_deferred_waits_once(fake_shards):
    with Transfers() as transfers, pytest.raises(DataDependentOutputException):
        clip_step(fake_shards[1])
    assert transfers.waits == [True]  # then the host goes on with numbers, which fake tensors do not have
    assert transfers.counts["c10d.allreduce_"] == 1
