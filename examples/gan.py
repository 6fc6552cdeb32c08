"""Train a GAN in manual optimization, with a limit for each network, a guard, accumulation, and metrics for each optimizer.

    python examples/gan.py
    clip-callbacks report logs/gan

The generator learns eight spots on a circle. Each optimizer steps once every two micro-batches; `divide=True` turns their sum into
a mean. With --poison the discriminator's loss is NaN at batch 8: its step is skipped, and the generator's is not.
"""

import argparse
import json
import math

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from clip_callbacks import AccumulationRescaling, ClipRule, GradientClipping, NonFiniteGuard

NOISE, MICRO_BATCHES = 8, 2


def perceptron(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def spots(count):
    angle = torch.randint(8, (count,)) * math.pi / 4
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2)


class GAN(LightningModule):
    def __init__(self, poison):
        super().__init__()
        self.automatic_optimization, self.poison = False, poison
        self.generator, self.discriminator = perceptron(NOISE, 2), perceptron(2, 1)

    def judged(self, points, *, is_real):  # cross entropy
        return nn.functional.softplus(self.discriminator(points) * (-1 if is_real else 1)).mean()

    def training_step(self, batch, batch_idx):
        made = self.generator(torch.randn(len(batch), NOISE))
        losses = {
            "discriminator": lambda: self.judged(batch, is_real=True) + self.judged(made.detach(), is_real=False),
            "generator": lambda: self.judged(made, is_real=True),
        }
        for (name, loss_of), optimizer in zip(losses.items(), self.optimizers(), strict=True):
            self.toggle_optimizer(optimizer)
            loss = loss_of()
            self.log(f"{name}_loss", loss)
            self.manual_backward(loss * math.nan if self.poison and name == "discriminator" and batch_idx == 8 else loss)
            if (batch_idx + 1) % MICRO_BATCHES == 0:
                optimizer.step()
                optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        discriminator = torch.optim.Adam(self.discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))
        return discriminator, torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.9))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--batches", type=int, default=1000)
parser.add_argument("--poison", action="store_true", help="make the discriminator's loss NaN at batch 8")
parser.add_argument("--folder", default="logs/gan")

if __name__ == "__main__":
    arguments = parser.parse_args()
    seed_everything(0)
    limits = [ClipRule(norm, include=f"^{name}", name=name) for name, norm in (("generator", 0.5), ("discriminator", 1.0))]
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, log_every_n_steps=MICRO_BATCHES, logger=CSVLogger(arguments.folder, name=""),
        callbacks=[AccumulationRescaling(divide=True), GradientClipping(rules=limits), NonFiniteGuard()],
        **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )  # fmt: skip
    trainer.fit(GAN(arguments.poison), DataLoader(spots(64 * arguments.batches), batch_size=64))
    print(json.dumps({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()}))
