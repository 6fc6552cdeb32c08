"""Every fused optimizer, and networks that train with one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clip_callbacks import (
    NonFiniteGuard,
)
from tests.helpers.training import Poisoned

FUSED = {
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "SGD-momentum": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    "SGD-dampening": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "SGD-nesterov": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
}
ALL = pytest.mark.parametrize("name", FUSED)


def network(name, *, fused=True, poison=None, net=None):
    optimizer, options = FUSED[name]
    torch.manual_seed(0)
    return Poisoned(poison or {}, optimizer=optimizer, fused=fused, net=net, **options)


def on_device(policy="skip", **options):
    return NonFiniteGuard(policy, deferred=True, **options)


def state_of(fit):
    """Every tensor of the optimizer's state, in order."""
    states = fit.optimizers[0].state_dict()["state"]
    return [
        torch.as_tensor(value) for _, state in sorted(states.items()) for _, value in sorted(state.items()) if value is not None
    ]


def two_parameters(optimizer=torch.optim.AdamW, **options):
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    return parameters, optimizer(parameters, lr=0.1, fused=True, **options)
