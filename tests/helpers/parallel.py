"""One small network under every way of dividing it among ranks."""

from __future__ import annotations

import math
import tempfile

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from clip_callbacks.engine.base import GradientCallback
from tests.helpers.training import TRUSTING, make_trainer, numbers

BATCH = 8
"""Rows of the large batch that all ranks have together."""

STEPS = 7
"""Of a training, unless a test asks for others: through every warm-up, and some steps are clipped and some are not."""

STRATEGIES = {
    # name: ranks, data-parallel ranks, how the network is divided
    "single": (1, 1, ""),
    "ddp": (2, 2, ""),
    "ddp_find_unused_parameters_true": (2, 2, ""),
    "fsdp2": (2, 2, "fsdp"),
    "fsdp2_offload": (2, 2, "fsdp offload"),
    "fsdp1": (2, 2, "fsdp1"),
    "tp": (2, 1, "tp"),
    "fsdp2_1": (1, 1, "fsdp"),
    "fsdp2_4": (4, 4, "fsdp"),
    "fsdp2_tp": (4, 2, "fsdp tp"),
    "fsdp2_tp_groups": (4, 2, "fsdp tp groups"),
    "hsdp1": (4, 4, "fsdp1 hybrid"),
}


COLLECTIVES = {"ddp": 0, "ddp_find_unused_parameters_true": 0} | dict.fromkeys(
    ("fsdp2", "fsdp2_4", "fsdp2_offload", "fsdp1", "hsdp1", "tp", "fsdp2_tp", "fsdp2_tp_groups"), 1
)
"""Of a healthy step, however many callbacks and meshes: what docs/distributed.md says."""


class Net(nn.Module):
    """Shapes that two ranks cannot halve, and some smaller than the mesh."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.norm, self.up, self.down, self.head = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 1)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)

    def forward(self, inputs):
        return self.head(torch.tanh(self.down(torch.tanh(self.up(self.norm(inputs))))))


class Divided(LightningModule):
    """The network, divided as a strategy asks for.

    Args:
        division: Words: "fsdp", "tp", "offload", "groups" for a parameter group per mesh.
        poison: What the losses of batches are multiplied by, by (rank, number of the batch); "no gradient" makes them NaN, and
            their gradients exactly 0; "lifted" makes them large, and their gradients exactly 0.
    """

    def __init__(self, division="", *, poison=None, optimizer=torch.optim.SGD, **options):
        super().__init__()
        self.division, self.poison, self.net = division.split(), poison or {}, None
        self.make_optimizer, self.options = optimizer, {"lr": 0.1} | options
        self.number = 0

    def configure_model(self):
        if self.net is not None:
            return
        self.net = Net()
        if "tp" in self.division:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        if "fsdp" in self.division:
            mesh = self.device_mesh["data_parallel"]
            options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if "offload" in self.division else {}
            fully_shard(self.net.up, mesh=mesh, **options)
            fully_shard(self.net, mesh=mesh, **options)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.net(inputs), targets)
        factor = self.poison.get((self.global_rank, self.number), 1.0)
        self.number += 1
        if factor == "no gradient":
            return loss * 0.0 + math.nan
        if factor == "lifted":
            return loss * 0.0 + 1e4
        return loss * factor

    def configure_optimizers(self):
        groups = [{"params": list(self.parameters())}]
        if "groups" in self.division:
            meshes = {}
            for parameter in self.parameters():
                meshes.setdefault(parameter.device_mesh.ndim, []).append(parameter)
            assert len(meshes) == 2
            groups = [{"params": parameters} for parameters in meshes.values()]
        return self.make_optimizer(groups, **self.options)


class CpuFsdp(FSDPStrategy):
    """Lightning's strategy for the first FullyShardedDataParallel, which would put the model on a GPU."""

    def _setup_model(self, model):
        options = {"sharding_strategy": self.sharding_strategy, "device_id": torch.device("cpu"), **self.kwargs}
        return FullyShardedDataParallel(model, **options)


class Tape(Callback):
    """Notes total_norm and clip_coef of every step, and what the strategy has wrapped."""

    def __init__(self):
        self.norms, self.coefficients, self.skipped, self.model = [], [], [], None

    def on_fit_start(self, trainer, pl_module):
        self.model = trainer.strategy.model

    def on_train_batch_end(self, trainer, *_):
        reports = [callback.last_report for callback in trainer.callbacks if isinstance(callback, GradientCallback)]
        for report in [report for report in reports if report][:1]:
            self.norms.append(report.total_norm.item())
            self.coefficients.append(report.clip_coef.item())
            self.skipped.append(bool(report.skipped))


def strategy(name, **options):
    ranks, data_parallel, division = STRATEGIES[name]
    if not division and ranks == 1:
        return {"strategy": "auto", "devices": 1}
    if not division:
        options |= {"find_unused_parameters": True} if "unused" in name else {}
        return {"strategy": DDPStrategy(process_group_backend="gloo", **options), "devices": ranks}
    if "fsdp1" in division:
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard")) if "hybrid" in division else None
        sharding = {"sharding_strategy": "HYBRID_SHARD", "device_mesh": mesh} if mesh else {}
        made = CpuFsdp(process_group_backend="gloo", auto_wrap_policy={nn.Linear}, use_orig_params=True, **sharding, **options)
        return {"strategy": made, "devices": ranks}
    made = ModelParallelStrategy(
        data_parallel_size=data_parallel, tensor_parallel_size=ranks // data_parallel, process_group_backend="gloo", **options
    )
    return {"strategy": made, "devices": ranks}


def rows(steps, *, bad=()):
    """Batches of the large batch, without the bad ones."""
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(steps * BATCH, 4, generator=generator)
    sizes = (3 * torch.rand(steps, generator=generator) ** 2).repeat_interleave(BATCH)[:, None]
    targets = sizes * torch.randn(steps * BATCH, 1, generator=generator)
    kept = [row for row in range(steps * BATCH) if row // BATCH not in bad]
    return TensorDataset(inputs[kept], targets[kept])


def train(name, *callbacks, steps=STEPS, bad=(), poison=None, module=None, ckpt_path=None, strategy_options=None, **options):
    """Fit under a strategy; the whole weights and what was noted, on every rank."""
    seed_everything(7, verbose=False)
    ranks, data_parallel, division = STRATEGIES[name]
    model_options = {key: options.pop(key) for key in ("optimizer", "lr", "momentum", "fused", "foreach") if key in options}
    module = module or Divided(division, poison=poison, **model_options)
    accumulate = options.get("accumulate_grad_batches", 1)
    dataset, rank = rows(steps * accumulate, bad=bad), dist.get_rank() if ranks > 1 else 0
    sampler = DistributedSampler(dataset, data_parallel, rank * data_parallel // ranks, shuffle=False)
    data = DataLoader(dataset, batch_size=BATCH // data_parallel, sampler=sampler)
    tape, made = Tape(), strategy(name, **strategy_options or {})
    with tempfile.TemporaryDirectory() as scratch:
        fit = make_trainer(scratch, *callbacks, tape, **made | options, use_distributed_sampler=False)
        fit.fit(module, data, ckpt_path=ckpt_path, **(TRUSTING if ckpt_path else {}))
    return {
        "weights": whole(module, tape.model),
        "norms": tape.norms,
        "coefficients": tape.coefficients,
        "skipped": tape.skipped,
        "members": [callback for callback in callbacks if isinstance(callback, GradientCallback)],
        "trainer": fit,
    }


def whole(module, model=None):
    """Every parameter, undivided."""
    if any(isinstance(child, FullyShardedDataParallel) for child in (model or module).modules()):
        with FullyShardedDataParallel.summon_full_params(model):
            return [parameter.detach().clone() for parameter in module.parameters()]
    parameters = [it.full_tensor() if isinstance(it, DTensor) else it for it in module.parameters()]
    return [parameter.detach().clone() for parameter in parameters]


def result(*args, **kwargs):
    """The part of a training's result that can be sent."""
    found = train(*args, **kwargs)
    return {key: found[key] for key in ("weights", "norms", "coefficients", "skipped")} | {
        "states": [numbers(member.state_dict()) for member in found["members"]],
        "metrics": {key: value for key, value in found["trainer"].callback_metrics.items() if key.startswith("grad")},
    }
