"""A healthy step is a straight line: how many Python functions the callbacks call in it, and what they read in few calls."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

import clip_callbacks
from clip_callbacks import AccumulationRescaling, GradientClipping, GradientNormMonitor, NonFiniteGuard
from tests.helpers.accumulation import Manual
from tests.helpers.searching import InEpochOne, OfAnyRate
from tests.helpers.training import EitherWay, Regression, data

STEP = 20
"""The step whose calls are counted: past every warm-up, and no logging step."""
PACKAGE = str(Path(clip_callbacks.__file__).parent) + os.sep
"""Where this package's files are; a clone of the repository may have the same name, with an environment in it."""


class CallCounter(Callback):
    """Lists the Python functions that this package calls in one step, those of torch and Lightning that it calls included."""

    def __init__(self):
        self.calls, self.depth = [], 0

    def profile(self, frame, event, _):
        if event == "call" and (self.depth or frame.f_code.co_filename.startswith(PACKAGE)):
            self.calls.append("  " * self.depth + f"{frame.f_code.co_filename.rpartition('/')[2]} {frame.f_code.co_qualname}")
            self.depth += 1
        elif event == "return" and self.depth:
            self.depth -= 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == STEP:
            self.before = sys.getprofile()
            sys.setprofile(self.profile)
        elif batch_idx == STEP + 1:
            sys.setprofile(self.before)


def one(max_norm):
    return [GradientClipping(max_norm)]


def family(max_norm):
    return [AccumulationRescaling(), GradientClipping(max_norm), NonFiniteGuard(), GradientNormMonitor()]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code objects have no qualified names")
@pytest.mark.parametrize(
    ("made", "max_norm", "most"),
    [
        pytest.param(one, 1e6, 78, id="GradientClipping-nothing-to-clip"),
        pytest.param(one, 1e-6, 85, id="GradientClipping-clips"),
        pytest.param(family, 1e6, 94, id="all-nothing-to-clip"),
        pytest.param(family, 1e-6, 101, id="all-clip"),
    ],
)
def test_calls_of_a_healthy_step(trainer, tmp_path, made, max_norm, most):
    counter, callbacks = CallCounter(), made(max_norm)
    trainer(counter, *callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=1000).fit(Regression(), data(STEP + 3))
    assert callbacks[0].last_report is not None
    assert counter.calls
    assert len(counter.calls) <= most, "\n".join(counter.calls)


class ByHand(EitherWay):
    """Manual optimization whose gradients are there before each pass."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad(set_to_none=False)
        self.manual_backward(self.loss(batch, batch_idx))
        optimizer.step()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code objects have no qualified names")
@pytest.mark.parametrize("layers", [2, 40])
def test_calls_in_manual_optimization_do_not_depend_on_the_number_of_parameters(trainer, layers):
    counter, module = CallCounter(), ByHand()
    module.net = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(layers)], torch.nn.Linear(4, 1))
    trainer(counter, GradientClipping(1e6), log_every_n_steps=1000).fit(module, data(STEP + 3))
    assert counter.calls
    assert len(counter.calls) <= 104, "\n".join(counter.calls)


class Compared(Callback):
    """Compares numbers that are read in fewer calls than Lightning takes for them with Lightning's own, in each batch."""

    def __init__(self, callback):
        self.callback, self.steps, self.logged = callback, set(), set()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        engine = self.callback._engine
        assert engine._steps.completed == trainer.global_step
        self.steps.add(trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        is_logging_step = self.callback._engine._publisher.batches_before_log == 0
        assert is_logging_step == trainer._logger_connector.should_update_logs
        self.logged.add(is_logging_step)
        if pl_module.automatic_optimization and not trainer.fit_loop.epoch_loop._should_accumulate():
            hold = self.callback._engine._guard.schedules
            assert (hold._epoch, hold._seen) == (trainer.current_epoch, trainer.fit_loop.batch_idx + 1)


@pytest.mark.parametrize(
    ("module", "before", "options", "steps"),
    [
        pytest.param(Regression, [], {"accumulate_grad_batches": 2}, 12, id="accumulation"),
        pytest.param(lambda: Manual(torch.ones(12, 1)), [], {}, 12, id="manual"),
        pytest.param(OfAnyRate, [InEpochOne(num_training_steps=3)], {}, 24, id="search-in-mid-fit"),
    ],
)
def test_counters_are_those_of_lightning(trainer, tmp_path, module, before, options, steps):
    callback = GradientClipping()
    compared, fitted = Compared(callback), module()
    fit = trainer(*before, compared, callback, logger=CSVLogger(tmp_path), log_every_n_steps=3, max_epochs=2, **options)
    fit.fit(fitted, data(12)) if isinstance(fitted, Regression) else fit.fit(fitted)
    assert (compared.steps, compared.logged) == (set(range(steps)), {False, True})


def test_gradients_are_enabled_again_after_a_step(trainer):
    enabled = []

    class Looks(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            enabled.append(torch.is_grad_enabled())

    trainer(Looks(), GradientClipping(), Looks()).fit(Regression(), data(3))
    assert enabled == [True] * 6
