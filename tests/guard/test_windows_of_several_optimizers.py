"""Optimizers of manual optimization with windows of their own: a bad one of one optimizer leaves no trace, the others' stay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from clip_callbacks import GradientClipping, NonFiniteGuard
from clip_callbacks.guard import restore
from tests.helpers.matrix import matrix
from tests.helpers.training import assert_same_bits

BATCHES = 12

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")


class Several(LightningModule):
    """Networks with batch statistics, each with an optimizer that steps once in so many batches.

    Args:
        rates: Batches in a window of each optimizer.
        poison: Of one optimizer, the batches that are bad for it.
        left_out: Of one optimizer, the batches that it does not see at all.
    """

    def __init__(
        self, rates: tuple[int, ...], poison: tuple[int, set[int]] = (0, set()), left_out: tuple[int, set[int]] = (0, set())
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)) for _ in rates)
        self.rates, self.poison, self.left_out = rates, poison, left_out

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for index, (net, optimizer, rate) in enumerate(zip(self.nets, optimizers, self.rates, strict=True)):
            if index == self.left_out[0] and batch_idx in self.left_out[1]:
                continue
            inputs, targets = batch
            if index == self.poison[0] and batch_idx in self.poison[1]:
                inputs = inputs * math.nan
            if batch_idx % rate == 0:
                optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(net(inputs), targets) / rate)
            if batch_idx % rate == rate - 1:
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(net.parameters(), lr=0.05) for net in self.nets]


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(BATCHES)]


def trained(trainer, module, *callbacks):
    trainer(*callbacks).fit(module, DataLoader(batches(), batch_size=None))
    return list(module.state_dict().values())


RATES = {"slow, fast": (2, 1), "fast, slow": (1, 2), "alike": (2, 2), "three": (3, 1, 2)}


@matrix(rates=list(RATES), whose=["first", "last"], place=["first of window", "last of window", "two windows in a row"])
def test_a_bad_window_leaves_no_trace_and_the_others_stay(trainer, rates, whose, place):
    each = RATES[rates]
    index = 0 if whose == "first" else len(each) - 1
    rate = each[index]
    window = 6 // rate * rate
    bad = {window} if place != "last of window" else {window + rate - 1}
    gone = set(range(window, window + rate))
    if place == "two windows in a row":
        bad, gone = bad | {window - 1}, gone | set(range(window - rate, window))
    guard = NonFiniteGuard()
    ours = trained(trainer, Several(each, poison=(index, bad)), guard, GradientClipping(1.0))
    clean = trained(trainer, Several(each, left_out=(index, gone)), NonFiniteGuard(), GradientClipping(1.0))
    assert guard.skipped_steps == len(gone) // rate
    assert_same_bits(ours, clean)


class Adversaries(LightningModule):
    """A generator whose bad pass goes through the discriminator, which keeps batch statistics too."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.bad = bad

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        real = batch[0]
        first.zero_grad()
        self.manual_backward(self.discriminator(real).square().mean())
        first.step()
        if batch_idx not in self.bad:  # the clean run takes the discriminator's step only
            second.zero_grad()
            noise = real * math.nan if batch_idx in getattr(self, "poison", ()) else real
            self.manual_backward(self.discriminator(self.generator(noise)).mean())
            second.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.discriminator, self.generator)]


@pytest.mark.parametrize("bad", [{5}, {5, 6}, {0}], ids=str)
def test_a_bad_pass_through_what_another_optimizer_holds_is_undone_there_too(trainer, bad):
    module = Adversaries(set())
    module.poison = bad
    guard = NonFiniteGuard()
    ours = trained(trainer, module, guard)
    clean = trained(trainer, Adversaries(bad), NonFiniteGuard())
    assert guard.skipped_steps == len(bad)
    assert_same_bits(ours, clean)


def test_without_the_guard_the_statistics_would_stay_bad(trainer, monkeypatch):
    """The tests above can fail."""
    others = tuple(make for make in restore.RESOURCES if make is not restore.written_buffers)
    monkeypatch.setattr(restore, "RESOURCES", others)
    module = Several((2, 1), poison=(0, {6}))
    state = trained(trainer, module, NonFiniteGuard())
    assert not all(tensor.isfinite().all() for tensor in state)


class Directly(Several):
    """Calls ``backward`` where Lightning does not see it."""

    def manual_backward(self, loss: Any, *_: Any, **__: Any) -> None:
        loss.backward()


def test_windows_that_nobody_tells_of_end_at_the_last_step_or_batch(trainer):
    ours = trained(trainer, Directly((1, 1), poison=(0, {6})), NonFiniteGuard())
    clean = trained(trainer, Directly((1, 1), left_out=(0, {6})), NonFiniteGuard())
    assert_same_bits(ours, clean)


class ForwardFirst(Several):
    """All forward passes come before the first backward pass; a bad one leaves finite statistics, though wrong ones."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        losses = {}
        for index, net in enumerate(self.nets):
            if not (index == self.left_out[0] and batch_idx in self.left_out[1]):
                is_bad = index == self.poison[0] and batch_idx in self.poison[1]
                loss = nn.functional.mse_loss(net(batch[0] * (1e3 if is_bad else 1.0)), batch[1])
                losses[index] = loss * math.nan if is_bad else loss
        optimizers = self.optimizers()
        for index, loss in losses.items():
            optimizers[index].zero_grad()
            self.manual_backward(loss)
        for index in losses:
            optimizers[index].step()


@pytest.mark.parametrize("whose", [0, 1])
def test_a_forward_pass_long_before_its_backward_pass_is_undone(trainer, whose):
    ours = trained(trainer, ForwardFirst((1, 1), poison=(whose, {6})), NonFiniteGuard())
    clean = trained(trainer, ForwardFirst((1, 1), left_out=(whose, {6})), NonFiniteGuard())
    assert_same_bits(ours, clean)


class Spoilt(Several):
    """Code of its own spoils statistics between two batches."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            self.nets[0][1].running_mean.fill_(math.nan)


def test_statistics_that_were_bad_before_are_named(trainer):
    module = Spoilt((1, 1), poison=(0, {5}))
    with pytest.warns(RuntimeWarning, match="buffers were non-finite before this step") as said:
        trainer(NonFiniteGuard()).fit(module, DataLoader(batches(), batch_size=None))
    assert any("nets.0.1.running_mean" in str(each.message) for each in said)
