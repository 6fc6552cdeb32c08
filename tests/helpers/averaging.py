"""Averages of the weights as Lightning keeps them, and a network and batches to try them on."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.helpers.training import EitherWay, data

BATCHES = 9


def weight_averaging(package="lightning.pytorch"):
    return pytest.importorskip(f"{package}.callbacks.weight_averaging", reason="came with Lightning 2.6")


def own_choice():
    class OwnChoice(weight_averaging().WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return step_idx is not None and step_idx % 3 == 1

    return OwnChoice()


def ema(**options):
    return weight_averaging().EMAWeightAveraging(decay=0.8, **options)


AVERAGES = {
    "mean": lambda: weight_averaging().WeightAveraging(),
    "moving": ema,
    "every second step": partial(ema, update_every_n_steps=2),
    "from the third step on": partial(ema, update_starting_at_step=2),
    "at epochs too": partial(ema, update_every_n_steps=3, update_starting_at_epoch=0),
    "a subclass with a choice of its own": own_choice,
    "around the average's buffers": partial(ema, use_buffers=False),
}


class Subject(EitherWay):
    """The batch says whether its loss is NaN, or so large that a loss scale is too much."""

    def __init__(self, manual=False, net=None):
        super().__init__(net=net or nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)), momentum=0.9)
        self.automatic_optimization = not manual

    def loss(self, batch, batch_idx):
        return super().loss(batch, batch_idx) * batch[2]


def loader(factor=math.nan, bad=(), left_out=(), each=1, batches=BATCHES):
    """Batches, ``each`` of them for a window."""
    made = [(*batch, torch.tensor(factor if number in bad else 1.0)) for number, batch in enumerate(data(batches * each, size=1.0))]
    windows = [made[start : start + each] for start in range(0, len(made), each)]
    return DataLoader(
        [batch for number, window in enumerate(windows) if number not in left_out for batch in window], batch_size=None
    )
