"""Searches for the learning rate: clipped and guarded as the training, and without a trace in it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import nn

from clip_callbacks import (
    AccumulationRescaling,
    BatchSize,
    GradientClipping,
    GradientNormMonitor,
    NonFiniteGuard,
    ZScoreLimit,
)
from tests.helpers.searching import InEpochOne, Later
from tests.helpers.training import Poisoned, assert_same_bits, data, numbers, weights


class Net(Poisoned):
    """A network whose learning rate may be searched for; it notes what its optimizer steps with."""

    def __init__(self, factors: Any = (), **options: Any) -> None:
        torch.manual_seed(0)
        super().__init__(dict(factors), **options)
        self.lr = 0.01

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters(), lr=self.lr)


class Hooked(Net):
    """The same with a hook of its own before a step, after which the pass is run."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            parameter.grad *= 2.0


SEARCH = {"min_lr": 1e-3, "max_lr": 10.0, "num_training": 20, "early_stop_threshold": None, "update_attr": False}


def curve(run, module, batches=20):
    return Tuner(run).lr_find(module, data(batches), **SEARCH).results["loss"]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["a step for each batch", "accumulated"])
@pytest.mark.parametrize("kind", [Net, Hooked])
def test_the_curve_is_that_of_gradient_clip_val(trainer, kind, options):
    callbacks = [GradientNormMonitor(), AccumulationRescaling(), GradientClipping(0.1)]
    ours = curve(trainer(*callbacks, **options), kind(), 40)
    theirs = curve(trainer(gradient_clip_val=0.1, **options), kind(), 40)
    assert ours == theirs
    assert all(callback.last_report is None for callback in callbacks)


@pytest.mark.parametrize("place", [0, 1], ids=["the finder first", "the finder last"])
def test_a_finder_among_the_callbacks_searches_clipped(trainer, place):
    search = {"min_lr": 1e-3, "max_lr": 10.0, "num_training_steps": 20, "early_stop_threshold": None, "update_attr": False}
    losses, after = [], []
    for clipped in ({"gradient_clip_val": 0.1}, {}):
        finder, module = LearningRateFinder(**search), Net()
        callbacks = [finder] if clipped else [GradientClipping(0.1)]
        if not clipped:
            callbacks.insert(place, finder)
        trainer(*callbacks, **clipped).fit(module, data(20))
        losses.append(finder.optimal_lr.results["loss"])
        after.append(weights(module))
    assert losses[0] == losses[1]
    assert_same_bits(*after)


def test_it_goes_on_through_bad_batches_without_them(trainer, said):
    """Whatever the guard is told to do about a streak in training: high learning rates are tried on purpose."""
    rates = []

    class Notes(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            assert all(tensor.isfinite().all() for tensor in self.parameters())

    bad = dict.fromkeys(range(5, 18), math.nan)
    guard = NonFiniteGuard("raise", bundles=trainer().default_root_dir + "/bundles")
    clipping = GradientClipping(0.1)
    losses = curve(trainer(guard, clipping), Notes(bad))
    assert [math.isnan(loss) for loss in losses] == [False] * 5 + [True] * 15  # a running mean, of Lightning's own
    assert len(set(rates)) == len(rates), "the schedule of the search does not stand still"
    assert guard.skipped_steps == 0
    assert len(said) == 1
    assert "The search for the learning rate has skipped 13 bad steps." in said[0]
    assert "it suggests no learning rate" in said[0]


@pytest.mark.parametrize("shows", ["logger", "enable_progress_bar", "enable_model_summary"])
def test_skipped_steps_of_a_search_are_told_of_wherever_a_trainer_shows_anything(trainer, monkeypatch, shows):
    said: list[str] = []
    monkeypatch.setattr("clip_callbacks.engine.learning_rate_search.log_message", lambda _, text: said.append(text))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    curve(trainer(GradientClipping(0.1), **quiet), Net({5: math.nan}))
    assert said == []
    curve(trainer(GradientClipping(0.1), **quiet | {shows: True}), Net({5: math.nan}))
    assert len(said) == 1
    assert "has skipped 1 bad step." in said[0]


@pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")
@pytest.mark.parametrize("finder", [Later, InEpochOne])
@pytest.mark.parametrize("kind", [Net, Hooked])
def test_a_search_in_the_middle_leaves_no_trace_in_the_run(trainer, said, kind, finder):
    states, after = [], []
    for finders in ([], [finder(num_training_steps=5, update_attr=False)]):
        clipping, guard, monitor = GradientClipping(ZScoreLimit()), NonFiniteGuard(), GradientNormMonitor()
        module = kind({2: math.nan})
        trainer(guard, *finders, clipping, AccumulationRescaling(BatchSize()), monitor, max_epochs=2).fit(module, data(8))
        states.append([copy.deepcopy(callback.state_dict()) for callback in (clipping, guard, monitor)])
        after.append(weights(module))
        assert guard.skipped_steps == 1
    assert_same_bits(*after)
    torch.testing.assert_close(numbers(states[0]), numbers(states[1]), rtol=0, atol=0)
    assert len([line for line in said if "Gradients of the run" in line]) == 2


def test_it_is_clipped_in_pytorch_lightning(tmp_path):
    class Old(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lr, self.net = 0.1, nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = quiet | {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": tmp_path}
    losses = []
    for clipped in ({"gradient_clip_val": 0.1}, {"callbacks": [GradientClipping(0.1)]}):
        run = pytorch_lightning.Trainer(**options, **clipped)
        losses.append(pytorch_lightning.tuner.Tuner(run).lr_find(Old(), data(20), **SEARCH).results["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("finder", [LearningRateFinder, Later])
def test_nothing_is_left_behind_if_it_raises(trainer, finder):
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            searching = any(type(callback).__name__ == "_LRCallback" for callback in self.trainer.callbacks)
            if searching and batch_idx == 3:
                raise KeyError("stop")
            return super().training_step(batch, batch_idx)

    module, clipping = Broken(), GradientClipping(0.1)
    run = trainer(finder(num_training_steps=5), clipping, max_epochs=2)
    with pytest.raises(KeyError, match="stop"):
        run.fit(module, data(8))
    assert not {"on_train_start", "on_before_optimizer_step", "clip_gradients"} & vars(module).keys()
    again = Net()
    trainer(clipping).fit(again, data(4))
    assert clipping.state_dict()["history"][0]["steps"] == 4


def test_other_callbacks_stay_out_of_it(trainer):
    class Counts(Callback):
        batches = 0

        def on_train_batch_end(self, *_: Any) -> None:
            self.batches += 1

    counts, monitor = Counts(), GradientNormMonitor()
    curve(trainer(counts, GradientClipping(0.1), monitor), Net())
    assert counts.batches == 0
    assert monitor.advice() is None
