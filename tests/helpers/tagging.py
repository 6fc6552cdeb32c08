"""Sentences with few and many labels, and a tagger whose loss is their mean."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

CLASSES, LENGTH = 5, 12


def sentences(lengths, seed=0):
    """Micro-batches with so many labels each, of two sequences; the rest is ignored."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for count in lengths:
        labels = torch.full((2 * LENGTH,), -100)
        labels[torch.randperm(2 * LENGTH, generator=generator)[:count]] = torch.randint(CLASSES, (count,), generator=generator)
        inputs = torch.randn(2, LENGTH, 3, generator=generator, dtype=torch.float64)
        batches.append({"inputs": inputs, "labels": labels.view(2, LENGTH)})
    return batches


class Tagger(LightningModule):
    """A classifier of tokens in double precision; keeps the gradient of every step. Nothing in it knows of weights."""

    def __init__(self, make_optimizer=torch.optim.SGD, lr=0.0, **options):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.net = nn.Linear(3, CLASSES).double()
        with torch.no_grad():
            self.net.weight.copy_(torch.randn(CLASSES, 3, generator=generator))
            self.net.bias.zero_()
        self.make_optimizer, self.options = make_optimizer, {"lr": lr} | options
        self.gradients = []

    def loss(self, batch):
        return cross_entropy(self.net(batch["inputs"]).flatten(0, 1), batch["labels"].flatten())

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def remember_gradients(self, *_):
        self.gradients.append(self.net.weight.grad.clone() if self.net.weight.grad is not None else None)

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters(), **self.options)
        optimizer.register_step_post_hook(self.remember_gradients)  # what it has stepped with
        return optimizer


def loader(batches):
    return DataLoader(batches, batch_size=None)


def large_batch(batches):
    """The gradient of all of them as one batch."""
    module = Tagger()
    module.loss({key: torch.cat([batch[key] for batch in batches]) for key in ("inputs", "labels")}).backward()
    return module.net.weight.grad


def fit(trainer, batches, n, *callbacks, module=None, **options):
    module = module or Tagger()
    trainer(*callbacks, accumulate_grad_batches=n, **options).fit(module, loader(batches))
    return module.gradients


def windows(batches, n):
    return [batches[start : start + n] for start in range(0, len(batches), n)]


class OwnMean(Tagger):
    """A mean by hand, over no label NaN, in backward too."""

    def loss(self, batch):
        labels = batch["labels"].flatten()
        kept = labels != -100
        each = cross_entropy(self.net(batch["inputs"]).flatten(0, 1), labels.clamp(min=0), reduction="none")
        return (each * kept).sum() / kept.sum()
