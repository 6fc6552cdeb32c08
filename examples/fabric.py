"""Fabric with clip_step: bf16-mixed, accumulation, one device or several; the norms in a CSV file.

    python examples/fabric.py
    python examples/fabric.py --devices 2     # DDP, on two CPU processes
    clip-callbacks report logs/fabric

All ranks come to the same norms and verdicts, with nothing to configure. With --poison the last rank's loss is NaN at step 5: no
rank takes that step.
"""

import argparse
import json
import math

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clip_callbacks import ClipRule, ParameterTable, QuantileLimit, Tightest, clip_step

MICRO_BATCHES = 2


def spirals(points=2048):
    """Make points on two spirals, with the number of the spiral as label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(points) % 2
    angle = 1 + 9 * torch.rand(points, generator=generator)
    place = torch.stack([angle.cos(), angle.sin()], 1) * (angle / 10 * (1 - 2 * labels))[:, None]
    return TensorDataset(place + 0.02 * torch.randn(points, 2, generator=generator), labels)


def train(fabric, steps, poison):
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    loader = fabric.setup_dataloaders(DataLoader(spirals(), batch_size=64 // fabric.world_size, shuffle=True))
    table, rules = ParameterTable.of(model.named_parameters()), [ClipRule(Tightest(1.0, QuantileLimit(0.9)))]
    state, skipped, batches = None, 0, iter(())
    for step in range(steps):
        for micro_batch in range(MICRO_BATCHES):
            if (batch := next(batches, None)) is None:
                batches = iter(loader)
                batch = next(batches)
            with fabric.no_backward_sync(model, enabled=micro_batch + 1 < MICRO_BATCHES):
                loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
                is_bad = poison and step == 5 and fabric.global_rank == fabric.world_size - 1
                fabric.backward(loss * math.nan if is_bad else loss)
        report, state = clip_step(table, state, rules=rules, scale=1 / MICRO_BATCHES)
        optimizer.step()
        optimizer.zero_grad()
        skipped += int(report.skipped)
        metrics = {name: float(value) for name, value in report.metrics().items() if value.isfinite()}
        metrics |= {"train_loss": loss.item(), "grad/skipped_steps": skipped}
        fabric.log_dict(metrics, step)
    return metrics


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--precision", default="bf16-mixed")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--poison", action="store_true", help="make the last rank's loss NaN at step 5")
parser.add_argument("--folder", default="logs/fabric")

if __name__ == "__main__":
    arguments = parser.parse_args()
    logger = CSVLogger(arguments.folder, name="", flush_logs_every_n_steps=10)
    fabric = Fabric(accelerator="cpu", devices=arguments.devices, precision=arguments.precision, loggers=logger)
    fabric.launch()
    fabric.seed_everything(0)
    metrics = train(fabric, arguments.steps, arguments.poison)
    logger.finalize("success")
    if fabric.is_global_zero:
        print(json.dumps(metrics))
