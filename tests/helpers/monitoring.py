"""Norms of a run, taken beside the monitor."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback

from clip_callbacks import (
    GradientNormMonitor,
)
from tests.helpers import parallel


class Witness(Callback):
    """Keeps the gradients of each step before clipping, since it stands before the family, and those that were stepped with."""

    def __init__(self):
        self.before, self.after = [], []

    def on_train_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.after.append(self.gradients(pl_module)))

    @staticmethod
    def gradients(module):
        named = module.named_parameters()
        return {name: None if tensor.grad is None else tensor.grad.detach().double().clone() for name, tensor in named}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append(self.gradients(pl_module))


def blocks_of(names, scope):
    labels = {
        name: {"layer": name.rpartition(".")[0], "parameter": name, "global": "global", "group": "pg1"}[scope] for name in names
    }
    return {label: [name for name in names if labels[name] == label] for label in labels.values()}


def norm(tensors, p):
    entries = torch.cat([tensor.double().flatten() for tensor in tensors])
    return float(torch.linalg.vector_norm(entries, p))


def moved(name, scope, norm_type):
    found = parallel.train(name, GradientNormMonitor(scope, norm_type=norm_type, log_update_ratio=True), steps=5)
    return {key: float(value) for key, value in found["trainer"].callback_metrics.items()}
