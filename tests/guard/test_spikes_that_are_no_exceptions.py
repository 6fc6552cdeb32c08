"""Losses of which a threshold would leave out a whole kind, and numbers at the edges of what a threshold can be."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn

from clip_callbacks import GradientClipping, NonFiniteGuard, RobustZScoreLimit
from tests.helpers.training import EitherWay, data, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Spike:RuntimeWarning")

LIMIT = RobustZScoreLimit(4.0, floor=0.01, scale="linear")


class Set(EitherWay):
    """The loss of each batch is set; the gradient is a small one."""

    def __init__(self, losses, **options):
        super().__init__(lr=1e-4, **options)
        self.losses = losses

    def loss(self, batch, batch_idx):
        loss = super().loss(batch, batch_idx) * 1e-6
        return loss - loss.detach() + self.losses[batch_idx]


def two_kinds(steps, share):
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(0))
    return [2.0 + 0.05 * float(noise[step]) + 40.0 * (step % share == share - 1) for step in range(steps)]


@pytest.mark.parametrize("policy", ["skip", "warn"])
def test_a_kind_of_batch_that_is_left_out_is_said_once(tmp_path, policy):
    steps = 300
    guard = NonFiniteGuard(policy, loss_above=LIMIT)
    with pytest.warns(RuntimeWarning) as caught:
        make_trainer(tmp_path, guard).fit(Set(two_kinds(steps, share=4)), data(steps))
    (text,) = (text for warning in caught if "kind of batch" in (text := str(warning.message)))
    assert "of the last steps were spikes" in text
    assert "Raise loss_above, or set `both=True`" in text
    assert guard.spikes > steps / 5


def test_the_share_that_is_said_is_right_from_the_beginning(tmp_path):
    steps = 130
    guard = NonFiniteGuard("warn", loss_above=LIMIT)
    with pytest.warns(RuntimeWarning) as caught:
        make_trainer(tmp_path, guard).fit(Set(two_kinds(steps, share=4)), data(steps))
    (text,) = (text for warning in caught if "kind of batch" in (text := str(warning.message)))
    share = int(re.match(r"About (\d+)%", text)[1])
    assert 18 <= share <= 25, "one step in four, without the warm-up of 25 steps"


@pytest.mark.filterwarnings("error:About:RuntimeWarning")
def test_rare_spikes_are_exceptions(tmp_path):
    steps = 300
    guard = NonFiniteGuard(loss_above=LIMIT)
    make_trainer(tmp_path, guard).fit(Set(two_kinds(steps, share=25)), data(steps))
    assert guard.spikes == steps // 25 - 1  # one is in the warm-up


def test_losses_that_are_mostly_zero_have_no_limit(tmp_path):
    """As a margin loss has, once most batches are right: the others are all that is left to learn from."""
    steps = 200
    losses = [0.5 + 0.01 * step if step % 3 == 0 else 0.0 for step in range(steps)]
    guard = NonFiniteGuard(loss_above=LIMIT)
    make_trainer(tmp_path, guard).fit(Set(losses), data(steps))
    assert guard.spikes == 0


@pytest.mark.parametrize("options", [{"loss_above": 1e39}, {"loss_above": -1e39}, {"skip_above": 1e39}])
def test_numbers_beyond_float32(tmp_path, options):
    guard = NonFiniteGuard("warn", **options)
    make_trainer(tmp_path, guard).fit(Set([1.0] * 4), data(4))
    assert guard.spikes == (4 if options == {"loss_above": -1e39} else 0)


class Plain(Set):
    """Its backward passes do not go through Lightning."""

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        nn.functional.mse_loss(self.net(batch[0]), batch[1]).backward()
        self.optimizers().step()


@pytest.mark.filterwarnings("ignore:The loss of an optimizer step")
def test_an_unknown_loss_is_left_out_of_the_journal(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    module = Plain([])
    module.automatic_optimization = False
    guard = NonFiniteGuard(skip_above=1e-9, loss_above=1.0)
    make_trainer(tmp_path, guard, logger=CSVLogger(tmp_path)).fit(module, data(3))
    (journal,) = tmp_path.rglob("nonfinite_steps.jsonl")
    for line in journal.read_text().splitlines():
        assert "loss" not in json.loads(line, parse_constant=pytest.fail)


@pytest.mark.filterwarnings("error:The loss of an optimizer step")
def test_the_last_epoch_of_averaging_has_no_loss(tmp_path):
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    callbacks = [NonFiniteGuard(loss_above=1e9), GradientClipping(1.0), StochasticWeightAveraging(0.1, swa_epoch_start=1)]
    fit = make_trainer(tmp_path, *callbacks, max_epochs=3)
    fit.fit(EitherWay(net=net), data(4))
    assert math.isfinite(fit.callback_metrics["grad/loss"])
