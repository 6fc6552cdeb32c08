"""Gradients that others change in ``on_before_optimizer_step``: the module, after all callbacks, and callbacks that come later."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from clip_callbacks import GradientClipping, GradientNormMonitor, NonFiniteGuard
from tests.helpers.training import Regression, assert_same_bits, data, weights


class Surgery(Regression):
    """Changes its gradients in its own hook."""

    def __init__(self, how: str, **options: Any) -> None:
        torch.manual_seed(0)
        super().__init__(**options)
        self.how, self.met = how, []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.met.append([parameter.grad is not None for parameter in self.parameters()])
        for place, parameter in enumerate(self.parameters()):
            if self.how == "factor":
                parameter.grad *= 10.0
            elif self.how == "each layer":
                parameter.grad.mul_(place + 1)
            elif self.how == "another tensor":
                parameter.grad = parameter.grad.sign()
            elif self.how == "nan" and self.trainer.global_step == 3:
                parameter.grad.fill_(math.nan)


WAYS = ["factor", "each layer", "another tensor"]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("how", WAYS)
def test_the_bits_are_those_of_gradient_clip_val(trainer, how, optimizer, accumulate):
    ours, theirs = Surgery(how, optimizer=optimizer), Surgery(how, optimizer=optimizer)
    clipping = GradientClipping(0.5)
    trainer(clipping, accumulate_grad_batches=accumulate).fit(ours, data())
    trainer(gradient_clip_val=0.5, accumulate_grad_batches=accumulate).fit(theirs, data())
    assert_same_bits(weights(ours), weights(theirs))
    assert float(clipping.last_report.clipped_norm) <= 0.5


@pytest.mark.parametrize("is_manual", [False, True])
def test_a_nan_that_the_module_makes_is_skipped(trainer, is_manual):
    module, guard = Surgery("nan"), NonFiniteGuard()
    if is_manual:
        module.automatic_optimization = False

        def training_step(batch: Any, batch_idx: int) -> None:
            module.optimizers().zero_grad()
            module.manual_backward(module.loss(batch, batch_idx))
            module.optimizers().step()

        module.training_step = training_step
    with pytest.warns(RuntimeWarning, match="the step is skipped"):
        trainer(guard).fit(module, data())
    assert guard.skipped_steps == 1
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert all(map(all, module.met)), "it meets gradients at each step, bad ones too"


class Changes(Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(2.0)


class Replaces(Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.grad = torch.ones_like(parameter)


class Looks(Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.norms = [parameter.grad.norm() for parameter in pl_module.parameters() if parameter.grad is not None]


def said(trainer: Any, module: Any, *callbacks: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(*callbacks).fit(module, data(6))
    return [str(each.message) for each in caught if "on_before_optimizer_step" in str(each.message)]


@pytest.mark.parametrize("stranger", [Changes, Replaces])
def test_a_later_callback_that_changes_gradients_is_named_once(trainer, stranger):
    (line,) = said(trainer, Regression(), NonFiniteGuard(), stranger(), GradientNormMonitor())
    assert f"({stranger.__name__})" in line
    assert said(trainer, Regression(), stranger(), NonFiniteGuard()) == []


def test_who_only_looks_is_not_named(trainer):
    assert said(trainer, Regression(), GradientClipping(0.5), Looks()) == []
    assert said(trainer, Regression(optimizer=torch.optim.AdamW, fused=True), GradientClipping(0.5), Looks()) == []


def test_after_the_hook_of_a_module_nobody_is_later(trainer):
    module, clipping = Surgery("factor"), GradientClipping(0.5)
    assert said(trainer, module, clipping, Changes()) == []
    assert float(clipping.last_report.clipped_norm) <= 0.5


class Copied(Callback):
    def __init__(self) -> None:
        self.copies: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not self.copies:
            loops, pl_module._trainer = pl_module._trainer, None
            self.copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]
            pl_module._trainer = loops


def test_copies_of_a_module_in_mid_fit_have_its_own_hook_alone(trainer):
    module, copied = Surgery("factor"), Copied()
    trainer(GradientClipping(0.5), copied).fit(module, data(4))
    assert "on_before_optimizer_step" not in vars(module)
    for each in copied.copies:
        trainer(gradient_clip_val=0.5).fit(each, data(4))  # it has its hook, and nothing of the fit that it is a copy of


@pytest.mark.parametrize("fails", [False, True])
def test_a_hook_that_hangs_on_the_instance_is_given_back(trainer, fails):
    module, seen = Regression(), []
    module.on_before_optimizer_step = seen.append
    if fails:
        module.on_train_batch_end = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer(GradientClipping(0.5)).fit(module, data(4))
    else:
        trainer(GradientClipping(0.5)).fit(module, data(4))
    assert len(seen) == (1 if fails else 4)
    assert module.on_before_optimizer_step == seen.append


def test_a_fit_that_is_restored_in_its_middle_runs_the_pass_once_for_each_step(trainer, tmp_path):
    class Restores(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                clipping.load_state_dict(copy.deepcopy(clipping.state_dict()))

    clipping, module = GradientClipping(0.5), Surgery("factor")
    fit = trainer(clipping, Restores())
    fit.fit(module, DataLoader(data(8).dataset, batch_size=4))
    assert len(module.met) == 8
    assert clipping.state_dict()["history"][0]["steps"] == 8
