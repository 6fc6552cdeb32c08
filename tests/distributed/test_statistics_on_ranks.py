"""Statistics of gradients and norms of weights where ranks hold parts of them: those of one process, by one collective each."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback

from clip_callbacks import GradientNormMonitor
from tests.helpers import parallel
from tests.helpers.agreement import DIVIDED, is_variant
from tests.helpers.matrix import matrix

STATISTICS = ("grad_mean/", "grad_std/", "grad_zeros/")
SHARDED = [name for name in DIVIDED if not name.startswith("ddp")]


class DeadUnits(Callback):
    """Makes some gradients exactly 0: hidden units that are saturated pass nothing on."""

    def on_fit_start(self, trainer, pl_module):
        with torch.no_grad():
            for name, parameter in pl_module.named_parameters():
                if ".up." in name and name.endswith("bias"):  # between the two a wrapper may have its name
                    parameter.fill_(100.0)


def logged(name, scope, norm_type):
    """The metrics of the last step."""
    monitor = GradientNormMonitor(scope, norm_type=norm_type, log_statistics=True, log_weight_norm=True)
    found = parallel.train(name, DeadUnits(), monitor, steps=3)
    return {key: float(value) for key, value in found["trainer"].callback_metrics.items()}


@matrix(
    slow=lambda name, _: is_variant(name),
    name=DIVIDED,
    scope_and_order={"layer": ("layer", 2.0), "parameter": ("parameter", math.inf)},
)
def test_statistics_are_those_of_one_process(run, name, scope_and_order):
    first, *others = run(name, *scope_and_order, function=logged)
    assert all(first == other for other in others)
    single = logged("single", *scope_and_order)
    assert first.keys() == single.keys()
    for prefix in (*STATISTICS, "weight_norm/"):
        keys = [key for key in single if key.startswith(prefix)]
        assert len(keys) == (4 if scope_and_order[0] == "layer" else 8)
        torch.testing.assert_close(torch.tensor([first[key] for key in keys]), torch.tensor([single[key] for key in keys]))
    assert any(single[key] > 0 for key in single if key.startswith("grad_zeros/"))


class Counting(Callback):
    """Counts the collectives of the batch's end, where a logging step reads; it stands on both sides of the monitor."""

    def __init__(self):
        from torch.distributed.tensor.debug import CommDebugMode

        self.counts, self.mode = [], CommDebugMode()

    def on_train_batch_end(self, *_):
        self.mode.__enter__()

    class End(Callback):
        """The other side."""

        def __init__(self, begin):
            self.begin = begin

        def on_train_batch_end(self, *_):
            self.begin.mode.__exit__(None, None, None)
            self.begin.counts.append(self.begin.mode.get_total_counts())


def collectives(name, options):
    counting = Counting()
    parallel.train(name, counting, GradientNormMonitor(**options), Counting.End(counting), steps=4, log_every_n_steps=2)
    return counting.counts


ALL = {"log_statistics": True, "log_weight_norm": True, "log_update_ratio": True}


@matrix(
    lambda name, options: name == "fsdp2" or options == "all",
    slow=lambda name, _: is_variant(name),
    name=SHARDED,
    options={
        "none": ({}, 0),
        "statistics": ({"log_statistics": True}, 1),
        "weights": ({"log_weight_norm": True}, 1),
        "all": (ALL | {"scope": "parameter"}, 2),
    },
)
def test_a_logging_step_takes_one_collective_for_statistics_and_one_for_weights(run, name, options):
    chosen, expected = options
    for counts in run(name, chosen, function=collectives):
        assert counts == [0, expected, 0, expected]


def test_ddp_needs_none(run):
    assert run("ddp", ALL, function=collectives) == [[0, 0, 0, 0]] * 2


def of_far_apart_shards(name):
    """Statistics of a parameter whose shards have means far larger than their spread."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from clip_callbacks.core.gradients import gradients_of
    from clip_callbacks.core.tensor_table import TensorTable
    from clip_callbacks.stats.gradient_statistics import GradientMoments

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    whole = {
        "net.far": 1e4 + 1e-2 * torch.randn(7, 3),
        "net.copied": 1e4 + 1e-2 * torch.randn(5),
        "net.row": torch.full((1, 2), 1e4),
    }
    named = {}
    for key, gradient in whole.items():
        placements = [Replicate() if key == "net.copied" else Shard(0)]
        named[key] = torch.nn.Parameter(distribute_tensor(torch.zeros_like(gradient), mesh, placements))
        named[key].grad = distribute_tensor(gradient, mesh, placements)
    table = TensorTable.of_named(named.items())
    found = GradientMoments(gradients_of(table, bucketed=False), table.partition("layer")).statistics()
    entries = torch.cat([gradient.flatten() for gradient in whole.values()]).double().tolist()
    return [each.tolist() for each in found], entries


def test_means_far_larger_than_the_spread_keep_their_digits_across_ranks(run):
    first, *others = run("fsdp2", function=of_far_apart_shards)
    assert all(first == other for other in others)
    found, entries = first
    mean = math.fsum(entries) / len(entries)
    deviation = math.sqrt(math.fsum((entry - mean) ** 2 for entry in entries) / len(entries))
    # without assert_close's allowance of 1e-5 for small numbers
    assert [each[0] for each in found] == pytest.approx([mean, deviation, 0.0], rel=1.3e-6, abs=0.0)
