"""Windows, optimizers and random numbers of a replay, which are those of the run."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from clip_callbacks.bundles.bundle import FACTS
from tests.helpers.replaying import WIDTH, Gan, Net, config, fitted, replayed, samples

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]


class Dice(LightningModule):
    """Fails depending on random numbers of Python and of a generator of its own; dropout changes its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 1))
        self.dice = torch.Generator().manual_seed(0)

    def training_step(self, batch, batch_idx):
        draws = torch.rand((), generator=self.dice) + random.random()
        loss = self.net(batch[0]).square().mean() + draws
        return loss / (draws > 1.5).logical_not()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_random_numbers_are_those_of_the_run_bit_for_bit(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, Dice(), samples(40), 2, options={"accumulate_grad_batches": 20})
    torch.manual_seed(99)
    random.seed(99)
    code, found = replayed(capsys, bundle, *config(tmp_path, Dice))
    assert code == 0
    assert len(found["micro_batches"]) == 20
    assert all(micro["same_loss"] for micro in found["micro_batches"])
    assert len({micro["loss"] for micro in found["micro_batches"]}) > 10, "or equal losses would say nothing"


def test_of_a_window_the_bad_micro_batch_is_shown(trainer, tmp_path, capsys):
    inputs = samples(32)
    inputs[18, 2] = 0
    bundle = fitted(trainer, tmp_path, Net("log"), inputs, 2, options={"accumulate_grad_batches": 4})
    code, found = replayed(capsys, bundle, *config(tmp_path, Net, kind="log"), "--bisect")
    assert code == 0
    assert [micro["batch"] for micro in found["micro_batches"]] == [8, 9, 10, 11]
    assert [micro["loss"] == "inf" or micro["loss"] == "nan" for micro in found["micro_batches"]] == [False, True, False, False]
    assert all(micro["same_loss"] for micro in found["micro_batches"])
    assert found["bisection"]["samples"] == [0]


def test_a_dropped_micro_batch_is_replayed_alone(trainer, tmp_path, capsys):
    inputs = samples(32)
    inputs[18, 2] = 0
    bundle = fitted(trainer, tmp_path, Net("log"), inputs, 2, options={"accumulate_grad_batches": 4}, level="microbatch")
    code, found = replayed(capsys, bundle, *config(tmp_path, Net, kind="log"))
    assert code == 0
    assert [micro["batch"] for micro in found["micro_batches"]] == [9]
    assert found["micro_batches"][0]["same_loss"]


def test_in_manual_optimization_the_earlier_optimizer_steps_and_the_bad_one_is_stopped(trainer, tmp_path, capsys):
    torch.manual_seed(0)
    bundle = fitted(trainer, tmp_path, Gan(), samples(12))
    assert json.loads((bundle / FACTS).read_text())["optimizer"] == 1
    code, found = replayed(capsys, bundle, *config(tmp_path, Gan))
    assert code == 0
    assert found["micro_batches"][0]["batch"] == 2
    assert set(found["gradients"]) == {"generator.0.weight", "generator.0.bias"}
    numbers = [call["call"] for call in found["calls"] if call["name"] == "discriminator"]
    assert numbers == [1, 2, 3]


class ByHand(Net):
    """Steps at every third batch, beginning with the first one."""

    def __init__(self) -> None:
        super().__init__("log")
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.net(batch[0]).square().mean())
        if batch_idx % 3 == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_all_micro_batches_of_a_window_by_hand_are_run(trainer, tmp_path, capsys):
    inputs = samples(16)
    inputs[13, 3] = 0
    bundle = fitted(trainer, tmp_path, ByHand(), inputs)
    code, found = replayed(capsys, bundle, *config(tmp_path, ByHand))
    assert code == 0
    assert [(micro["batch"], micro["loss"] == "inf") for micro in found["micro_batches"]] == [(1, False), (2, False), (3, True)]


class Seeing(Net):
    """Fails at one step, epoch and batch, as the Trainer counts them."""

    def training_step(self, batch, batch_idx):
        is_there = (self.trainer.global_step, self.current_epoch, batch_idx) == (6, 1, 2)
        assert self.training
        return super().training_step(batch, batch_idx) * (math.nan if is_there else 1)


def test_step_epoch_and_batch_are_those_of_the_run(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, Seeing("plain"), samples(16), options={"max_epochs": 2})
    code, found = replayed(capsys, bundle, *config(tmp_path, Seeing, kind="plain"))
    assert code == 0
    assert found["bundle"]["place"] == "step 6, epoch 1, batch 2, rank 0"


class Prepared(Net):
    """Changes every batch in its transfer hooks, which must not run a second time."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] - 0.25]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] - 0.25]


def test_hooks_that_prepare_a_batch_do_not_do_so_again(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0.5
    bundle = fitted(trainer, tmp_path, Prepared("log"), inputs)
    code, found = replayed(capsys, bundle, *config(tmp_path, Prepared, kind="log"), "--bisect")
    assert code == 0
    assert found["micro_batches"][0]["same_loss"]
    assert found["bisection"]["samples"] == [1]
