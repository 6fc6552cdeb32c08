"""A clipped and guarded training in one process or several: predict the next character of Python source, on CPUs over gloo.

In one process:            python examples/distributed.py
Launched by Lightning:     python examples/distributed.py --strategy fsdp2 --devices 2
Launched by torchrun:      torchrun --standalone --nproc-per-node 4 examples/distributed.py --strategy fsdp2_tp --devices 4
On two hosts, RANK 0 and 1: torchrun --nnodes 2 --node-rank RANK --nproc-per-node 1 --master-addr FIRST_HOST --master-port 29500 \\
                            examples/distributed.py --strategy fsdp2 --devices 1 --nodes 2
With --poison the last rank's loss is NaN at step 5: all ranks skip that step, and the report names the rank.
"""

import argparse
import inspect
import json
import math

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from clip_callbacks import GradientClipping, NonFiniteGuard

CONTEXT, CLASSES = 16, 128


class NextCharacter(LightningModule):
    def __init__(self, strategy, copies, poison):
        super().__init__()
        self.kind, self.copies, self.poison, self.net = strategy, copies, poison, None

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(0)
            head = nn.Sequential(nn.Linear(CONTEXT * 16, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, CLASSES))
            self.net = nn.Sequential(nn.Embedding(CLASSES, 16), nn.Flatten(), *head)
            if self.copies > 1:
                parallelize_module(self.net, self.device_mesh["tensor_parallel"], {"2": ColwiseParallel(), "4": RowwiseParallel()})
            if self.kind.startswith("fsdp2"):
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss * math.nan if self.poison and batch_idx == 5 and self.global_rank == self.trainer.world_size - 1 else loss

    def train_dataloader(self):
        windows = torch.tensor(list(inspect.getsource(argparse).encode("ascii", "replace"))).unfold(0, CONTEXT + 1, 1)
        data, parts = TensorDataset(windows[:, :-1], windows[:, -1]), self.trainer.world_size // self.copies
        sampler = DistributedSampler(data, parts, self.global_rank // self.copies, shuffle=True, seed=0)
        return DataLoader(data, batch_size=64 // parts, sampler=sampler, drop_last=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--strategy", choices=("single", "ddp", "fsdp2", "tp", "fsdp2_tp"), default="single")
parser.add_argument("--devices", type=int, default=1, help="processes on each host")
parser.add_argument("--nodes", type=int, default=1, help="hosts")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--poison", action="store_true", help="make the last rank's loss NaN at step 5")

if __name__ == "__main__":
    arguments = parser.parse_args()
    copies = 2 if arguments.strategy.endswith("tp") else 1  # ranks that read the same samples
    sizes = arguments.devices * arguments.nodes // copies, copies
    strategy = {"single": "auto", "ddp": "ddp"}.get(arguments.strategy) or ModelParallelStrategy(*sizes)
    clipping, guard = GradientClipping(2.0), NonFiniteGuard()
    trainer = Trainer(
        accelerator="cpu", devices=arguments.devices, num_nodes=arguments.nodes, strategy=strategy,
        max_steps=arguments.steps, max_epochs=-1, callbacks=[clipping, guard], use_distributed_sampler=False,
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )  # fmt: skip
    trainer.fit(NextCharacter(arguments.strategy, copies, arguments.poison))
    if trainer.is_global_zero:
        metrics = {key: round(float(value), 4) for key, value in trainer.callback_metrics.items() if key.startswith("grad/")}
        print(json.dumps({"skipped": guard.skipped_steps} | metrics), flush=True)
