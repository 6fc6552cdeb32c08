"""Runs that return to their last good weights."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from clip_callbacks import (
    GradientClipping,
    NonFiniteGuard,
    Rollback,
)
from tests.helpers.members import O
from tests.helpers.training import Poisoned, limit_states

BATCHES = 14
BAD = {5: math.nan, 6: math.inf, 7: math.nan}
LOST = {3, 4, 5, 6, 7}


def rollback(*, every_n_steps=3, max_rollbacks=3, lr_factor=1.0, max_consecutive=3, **options):
    going_back = Rollback(every_n_steps=every_n_steps, max_rollbacks=max_rollbacks, lr_factor=lr_factor)
    return NonFiniteGuard(max_consecutive=max_consecutive, rollback=going_back, **options)


def without(loader, numbers):
    return DataLoader([batch for number, batch in enumerate(loader) if number not in numbers], batch_size=None)


class Subject(Poisoned):
    """With batch statistics and a buffer that every forward pass replaces, and a schedule if one is given."""

    def __init__(self, factors=BAD, schedule=None, frequency=1, **options):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        super().__init__(dict(factors), net=net, **{"lr": 0.02} | options)
        self.register_buffer("mean", torch.zeros(4))
        self.schedule, self.frequency = schedule, frequency

    def loss(self, batch, batch_idx):
        self.mean = 0.9 * self.mean + 0.1 * batch[0].mean(0)
        return super().loss(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.schedule is None:
            return optimizer
        config = {"scheduler": self.schedule(optimizer), "interval": "step", "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": config}


def everything(fit):
    """The whole state of a run, as a flat dictionary."""
    parts = {"module": fit.lightning_module.state_dict()}
    for number, optimizer in enumerate(fit.optimizers):
        parts |= {f"state.{number}.{place}": state for place, state in enumerate(optimizer.state.values())}
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        parts |= {f"group.{number}.{place}": group for place, group in enumerate(groups)}
    for number, config in enumerate(fit.lr_scheduler_configs):
        state = config.scheduler.state_dict()
        states = [state, *state.pop("_schedulers", [])]
        parts |= {f"schedule.{number}.{place}": state for place, state in enumerate(states)}
    clippings = [callback for callback in fit.callbacks if isinstance(callback, GradientClipping)]
    for index, clipping in [(index, clipping) for clipping in clippings for index in range(len(fit.optimizers))]:
        parts |= {f"limit.{index}.{place}": state for place, state in enumerate(limit_states(clipping, index))}
    scaler = getattr(fit.precision_plugin, "scaler", None)
    parts["scaler"] = scaler.state_dict() if scaler else {}
    return {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items() if not callable(value)}


SCHEDULES = {
    "Lambda": lambda o: O.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "Step": lambda o: O.lr_scheduler.StepLR(o, 2, 0.5),
    "Cosine": lambda o: O.lr_scheduler.CosineAnnealingLR(o, 20, eta_min=1e-4),
    "OneCycle": lambda o: O.lr_scheduler.OneCycleLR(o, 0.05, total_steps=40),
    "Sequential": lambda o: O.lr_scheduler.SequentialLR(
        o, [O.lr_scheduler.LinearLR(o, 0.1, total_iters=5), O.lr_scheduler.CosineAnnealingLR(o, 20)], milestones=[5]
    ),
    "Chained": lambda o: O.lr_scheduler.ChainedScheduler([O.lr_scheduler.ExponentialLR(o, 0.9), O.lr_scheduler.StepLR(o, 2, 0.5)]),
}


def fitted(fit, module, loader):
    fit.fit(module, loader)
    return everything(fit)


class Copies(Callback):
    """Records after each batch the step before which the copy was made."""

    def __init__(self, guard):
        self.guard, self.steps = guard, []

    def on_train_batch_end(self, *_):
        self.steps.append(self.guard._part.rollback.step)


class Weights(Callback):
    """Records the weights before each batch."""

    def __init__(self, part=None):
        self.weights, self.part = [], part

    def on_train_batch_start(self, trainer, pl_module, *_):
        module = self.part() if self.part else pl_module
        self.weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
