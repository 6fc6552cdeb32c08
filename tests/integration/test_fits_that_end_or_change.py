"""Fits that fail at the start, end by an error, or whose optimizers are replaced: nothing is lost, and nothing is held on to."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from clip_callbacks import AccumulationRescaling, ClipRule, GradientClipping, GradientNormMonitor, NonFiniteGuard, Rollback
from clip_callbacks.engine.engine import StepEngine
from clip_callbacks.guard.rollback import RunRestorer
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.snapshot import Snapshot
from tests.helpers.records import record_of
from tests.helpers.training import Poisoned, Regression, assert_same_bits, data, scaled, weights


class Swapped(Regression):
    """Two networks by hand, whose optimizers are others from some batch on.

    Args:
        before: The batch.
        which: The optimizers that are replaced.
        passes: Backward passes for each step.
    """

    def __init__(self, before, which, passes=1):
        super().__init__()
        self.automatic_optimization = False
        self.nets = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
        self.later = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
        self.before, self.which, self.passes = before, which, passes
        self.scales = []

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == self.before:
            for place in self.which:
                self.nets[place] = self.later[place]
            optimizers = [
                torch.optim.SGD(net.parameters(), lr=0.01) if place in self.which else optimizer
                for place, (net, optimizer) in enumerate(zip(self.nets, self.trainer.optimizers, strict=True))
            ]
            self.trainer.strategy.optimizers = optimizers

    def training_step(self, batch, batch_idx):
        for net, optimizer in zip(self.nets, self.optimizers(), strict=True):
            optimizer.zero_grad()
            for _ in range(self.passes):
                self.manual_backward(net(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in self.nets]


def test_an_optimizer_may_be_replaced_on_a_logging_step(trainer, tmp_path):
    clipping = GradientClipping(1.0)
    run = trainer(clipping, GradientNormMonitor(), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(Swapped(2, [1]), data(4))
    assert [history["steps"] for history in clipping.state_dict()["history"].values()] == [4, 4]


def test_windows_of_all_replaced_optimizers_are_means(trainer):
    scales = []

    class Scales(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            scales.append(record_of(clipping.last_report).accumulation_scale)

    clipping = GradientClipping(1.0)
    trainer(clipping, AccumulationRescaling(divide=True), Scales()).fit(Swapped(2, [0, 1], passes=4), data(5))
    # the first step of an optimizer that has just been taken up does not know of the passes before
    assert scales[:4] == [0.25] * 4
    assert scales[6:] == [0.25] * 4


def test_an_overflow_that_the_device_has_decided_on_is_judged_by_its_own_loss_scale(trainer):
    class Overflows(Regression):
        def on_after_backward(self):
            if self.trainer.global_step == 1:
                self.net[0].weight.grad.fill_(math.inf)

    for deferred in (True, False):
        guard = NonFiniteGuard(deferred=deferred)
        trainer(guard, **scaled(init_scale=2.0)).fit(Overflows(torch.optim.Adam, fused=True), data(4))
        assert (guard.overflowed_steps, guard.skipped_steps) == (1, 0), "the scale was 2, and is 1 afterwards"


def test_nothing_of_a_fit_is_held_in_circles(trainer):
    """What only the garbage collector finds may hold the memory of a GPU for long."""
    guard = NonFiniteGuard(rollback=Rollback(every_n_steps=1))
    callbacks = [GradientClipping(0.5), guard, AccumulationRescaling(), GradientNormMonitor()]
    gc.collect()
    gc.disable()
    try:
        trainer(*callbacks).fit(Regression(), data(4))
        kinds = {StepEngine, OptimizerContext, RunRestorer, Snapshot}
        held = [type(thing).__name__ for thing in gc.get_objects() if type(thing) in kinds]
    finally:
        gc.enable()
    assert held == []


def test_a_fit_that_fails_at_its_start_keeps_the_state_that_was_loaded(trainer, tmp_path):
    guard = NonFiniteGuard()
    first = trainer(guard)
    with pytest.warns(RuntimeWarning, match="Non-finite gradients"):
        first.fit(Poisoned({1: math.nan, 3: math.nan}), data(5))
    first.save_checkpoint(tmp_path / "a.ckpt")
    again = NonFiniteGuard()
    rules = GradientClipping(rules=[ClipRule(1.0, include="nowhere")])
    second = trainer(again, rules, max_epochs=2)
    with pytest.raises(ValueError, match="nowhere"):
        second.fit(Poisoned({}), data(5), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert again.state_dict()["counters"][0]["skipped"] == again.skipped_steps == 2


def test_callbacks_of_a_fit_that_nobody_ended_may_be_used_again_in_another_order(trainer):
    class Broken(Callback):
        def on_exception(self, *_):
            raise OSError("no space left")

        def on_train_batch_end(self, *_):
            raise KeyError("stop")

    guard, clipping = NonFiniteGuard(), GradientClipping(1.0)
    with pytest.raises((OSError, KeyError)):
        trainer(Broken(), guard, clipping).fit(Regression(), data(3))
    trainer(clipping, guard).fit(Regression(), data(3))
    assert clipping.state_dict()["history"][0]["steps"] == 3


def test_charts_are_laid_out_once_though_states_come_late(trainer, tmp_path):
    class Late(Callback):
        def on_train_start(self, trainer, pl_module):
            clipping.load_state_dict(fresh)

    laid_out = []
    logger = TensorBoardLogger(tmp_path)
    logger.experiment.add_custom_scalars = laid_out.append
    clipping = GradientClipping(1.0)
    fresh = clipping.state_dict()
    trainer(Late(), clipping, logger=logger).fit(Regression(), data(3))
    assert len(laid_out) == 1


def test_a_window_without_weight_is_reported_as_not_finite(trainer):
    clipping, reports = GradientClipping(1.0), []

    class Reports(Callback):
        def on_train_batch_end(self, *_):
            reports.append((bool(record_of(clipping.last_report).finite), bool(clipping.last_report.skipped)))

    with pytest.warns(RuntimeWarning, match="weight 0"):
        trainer(clipping, AccumulationRescaling(lambda batch: 0.0), Reports()).fit(Regression(), data(2))
    assert reports == [(False, True)] * 2


class Fresh(torch.utils.data.IterableDataset):
    """Batches that nobody else holds, and weak references to them."""

    def __init__(self):
        self.made = []

    def __iter__(self):
        for _ in range(8):
            batch = [torch.randn(4, 4), torch.randn(4, 1)]
            self.made.append(weakref.ref(batch[0]))
            yield batch
            del batch


@pytest.mark.parametrize("level", ["window", "microbatch"])
def test_no_batch_is_held_beyond_its_step(trainer, tmp_path, level):
    batches, alive = Fresh(), []

    class Alive(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            batch_idx = trainer.fit_loop.batch_idx
            if batch_idx % 2 == 0:  # the first of a window: all those before it have had their step
                alive.extend(made() is not None for made in batches.made[:batch_idx])

    guard = NonFiniteGuard(level=level, bundles=tmp_path / "bad")
    trainer(Alive(), guard, accumulate_grad_batches=2).fit(Regression(), torch.utils.data.DataLoader(batches, batch_size=None))
    assert alive == [False] * (2 + 4 + 6)


class Within(Callback):
    """Runs another Trainer in the middle of a fit."""

    def __init__(self, run):
        self.run, self.error = run, None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1:
            try:
                self.run()
            except ValueError as error:
                self.error = error


@pytest.mark.parametrize("others", [[], [NonFiniteGuard], [GradientNormMonitor]])
@pytest.mark.parametrize("stage", ["fit", "validate", "copy", "error"])
def test_another_trainer_within_a_fit_leaves_it_as_it_is(trainer, stage, others):
    """It calls setup, teardown and ``on_exception`` of callbacks that both Trainers hold, as if its fit were the only one."""
    clipping = GradientClipping(0.01)

    def run():
        if stage == "validate":
            trainer(clipping).validate(Regression(), data(2), verbose=False)
        elif stage == "copy":
            trainer(copy.deepcopy(clipping)).fit(Regression(), data(3))
        else:
            # the callbacks before it are set up when it refuses
            trainer(*([GradientNormMonitor()] if stage == "error" else []), clipping).fit(Regression(), data(3))

    results = []
    for within in (Within(lambda: None), Within(run)):
        clipping = GradientClipping(0.01)
        torch.manual_seed(0)
        module = Regression()
        fit = trainer(*(make() for make in others), clipping, within)
        fit.fit(module, data(6))
        assert clipping.last_report.clip_coef < 1
        results.append(weights(module))
    assert_same_bits(*results)
    if stage in {"fit", "error"}:
        message = "`callbacks` must hold a GradientClipping of this Trainer's own, got one that takes part in a fit of another"
        assert str(within.error).startswith(message)
        assert "copy.deepcopy" in str(within.error)
    else:
        assert within.error is None
    # and the fit that is over leaves the callback to the next
    trainer(clipping).fit(Regression(), data(2))
