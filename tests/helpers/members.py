"""Members of the kinds that the package makes promises about: a new one is a line here, and joins every matrix of its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn
from torch import optim as O

from tests.helpers.writers import WAYS, Rewritten, Writer

Options: TypeAlias = Mapping[str, Any]

LOOP: Mapping[str, Options] = {"loop": {}}
FOREACH: Mapping[str, Options] = {"loop": {"foreach": False}, "foreach": {"foreach": True}}
FUSED: Mapping[str, Options] = {**FOREACH, "fused": {"fused": True}}


@dataclass(frozen=True)
class OptimizerMember:
    """An optimizer, and how the tests use it.

    Attributes:
        make: From parameters and options to the optimizer.
        options: Those that make it keep as much state as it can.
        implementations: By name, the options that choose one.
        cycles_momentum: Whether a one-cycle schedule can be put on it.
        takes: Which parameters it takes.
    """

    make: Callable[..., torch.optim.Optimizer]
    options: Options = field(default_factory=dict)
    implementations: Mapping[str, Options] = field(default_factory=lambda: FOREACH)
    cycles_momentum: bool = False
    takes: Callable[[torch.Tensor], bool] = lambda _: True


OPTIMIZERS = {
    "Adadelta": OptimizerMember(O.Adadelta, {"weight_decay": 0.1}),
    "Adafactor": OptimizerMember(O.Adafactor, {"weight_decay": 0.1}),
    "Adagrad": OptimizerMember(O.Adagrad, {"lr_decay": 0.1}, FUSED),
    "Adam": OptimizerMember(O.Adam, {"weight_decay": 0.1, "amsgrad": True}, FUSED, cycles_momentum=True),
    "AdamW": OptimizerMember(O.AdamW, {"weight_decay": 0.1}, FUSED, cycles_momentum=True),
    "Adamax": OptimizerMember(O.Adamax, cycles_momentum=True),
    "ASGD": OptimizerMember(O.ASGD, {"t0": 2.0}),
    "LBFGS": OptimizerMember(
        O.LBFGS, {"max_iter": 4, "history_size": 3}, {"loop": {}, "wolfe": {"line_search_fn": "strong_wolfe"}}
    ),
    "Muon": OptimizerMember(O.Muon, {"weight_decay": 0.1}, LOOP, takes=lambda parameter: parameter.ndim == 2),
    "NAdam": OptimizerMember(O.NAdam, {"weight_decay": 0.1}, cycles_momentum=True),
    "RAdam": OptimizerMember(O.RAdam, {"weight_decay": 0.1}, cycles_momentum=True),
    "RMSprop": OptimizerMember(O.RMSprop, {"momentum": 0.5, "centered": True}, cycles_momentum=True),
    "Rprop": OptimizerMember(O.Rprop),
    "SGD": OptimizerMember(O.SGD, {"weight_decay": 0.1}, FUSED, cycles_momentum=True),
    "SGD momentum": OptimizerMember(O.SGD, {"momentum": 0.9, "weight_decay": 0.1}, FUSED, cycles_momentum=True),
    "SGD nesterov": OptimizerMember(O.SGD, {"momentum": 0.9, "nesterov": True}, FUSED, cycles_momentum=True),
    "SparseAdam": OptimizerMember(O.SparseAdam, {}, LOOP, cycles_momentum=True),
}
IMPLEMENTATIONS = tuple(dict.fromkeys(name for member in OPTIMIZERS.values() for name in member.implementations))

FORWARD_WRITES: dict[str, Callable[[int], nn.Module]] = {
    "batch norm": nn.BatchNorm1d,
    "cumulative batch norm": lambda features: nn.BatchNorm1d(features, momentum=None),
    "instance norm": lambda features: nn.Sequential(
        nn.Unflatten(1, (features // 2, 2)), nn.InstanceNorm1d(features // 2, affine=True, track_running_stats=True), nn.Flatten()
    ),
    "spectral norm": lambda features: nn.utils.parametrizations.spectral_norm(nn.Linear(features, features)),
    "running centre": lambda features: Writer(WAYS["in place"], features=features),
    "running centre through .data": lambda features: Writer(WAYS["through .data"], features=features),
    "assigned centre": lambda features: Writer(WAYS["assigned"], features=features),
    "counter of passes": lambda features: Writer(WAYS["counter"], features=features),
    "weight that forward moves": lambda features: Rewritten(lambda weight, mean: weight.add_(mean, alpha=0.01), features=features),
}
"""Layers that a forward pass in training writes to, by their even number of features."""

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "OneCycle": lambda o: O.lr_scheduler.OneCycleLR(o, 0.5, total_steps=40),
    "Sequential": lambda o: O.lr_scheduler.SequentialLR(
        o, [O.lr_scheduler.LinearLR(o, 0.1, total_iters=3), O.lr_scheduler.CosineAnnealingLR(o, 20)], milestones=[3]
    ),
    "Step": lambda o: O.lr_scheduler.StepLR(o, 3, 0.5),
}
"""Schedules by steps, of a run of up to 40."""
