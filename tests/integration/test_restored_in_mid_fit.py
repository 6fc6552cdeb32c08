"""States that a checkpoint brings in the middle of a fit, as Lightning's own searches do."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback

from clip_callbacks import AccumulationRescaling, BatchSize, GradientClipping, GradientNormMonitor, NonFiniteGuard, ZScoreLimit
from tests.helpers.accumulation import Manual, Recorder
from tests.helpers.searching import InEpochOne, OfAnyRate
from tests.helpers.training import Poisoned, data, limit_states


class Restore(Callback):
    """Takes the states of callbacks before one batch, and gives them back before another."""

    def __init__(self, callbacks, saved_before, restored_before):
        self.callbacks, self.saved_before, self.restored_before = callbacks, saved_before, restored_before

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.saved_before:
            self.states = [deepcopy(callback.state_dict()) for callback in self.callbacks]
        if batch_idx == self.restored_before:
            for callback, state in zip(self.callbacks, self.states, strict=True):
                callback.load_state_dict(state)


def fitted(trainer, *restored, place=0):
    clipping, guard, monitor = GradientClipping(ZScoreLimit(1e6)), NonFiniteGuard(), GradientNormMonitor()
    callbacks = [guard, clipping, AccumulationRescaling(BatchSize()), monitor]
    if restored:
        callbacks.insert(place, Restore(callbacks[:], *restored))
    torch.manual_seed(0)
    trainer(*callbacks).fit(Poisoned({1: math.nan, 6: math.nan}), data(8))
    return clipping, guard, monitor


@pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")
@pytest.mark.parametrize("place", [0, 2, 4])
def test_callbacks_go_on_from_what_was_restored(trainer, place):
    """Of the batches between nothing is left: norms, counts of bad steps, what limits remember."""
    clipping, guard, monitor = fitted(trainer, 3, 5, place=place)
    _, _, whole = fitted(trainer)
    norms = whole.state_dict()["norms"][0]  # of the batches 0, 2, 3, 4, 5 and 7
    assert torch.equal(monitor.state_dict()["norms"][0], norms[[0, 1, 4, 5]])
    assert guard.skipped_steps == clipping.skipped_steps == 2
    assert limit_states(clipping)[0]["count"].item() == 4
    assert guard.state_dict()["history"][0]["steps"] == 6


@pytest.mark.parametrize(
    ("make", "rescaling"),
    [
        (Recorder, AccumulationRescaling()),
        (Recorder, AccumulationRescaling(BatchSize())),
        (lambda feed: Manual(feed, window=3), AccumulationRescaling(divide=True)),
    ],
    ids=["mean", "weighted", "manual"],
)
def test_the_window_under_way_stays_the_mean_that_it_is(trainer, make, rescaling):
    callbacks = [NonFiniteGuard(), rescaling]
    options = {"accumulate_grad_batches": 3} if make is Recorder else {}
    module = make(torch.arange(1.0, 9.0)[:, None])
    trainer(*callbacks, Restore(callbacks, 4, 4), **options).fit(module)
    assert [round(gradient, 4) for (gradient,) in module.gradients] == [2.0, 5.0, 7.5]


def test_a_search_for_the_learning_rate_in_a_later_epoch_is_survived(trainer):
    fit = trainer(
        GradientClipping(ZScoreLimit()), NonFiniteGuard(), GradientNormMonitor(), InEpochOne(num_training_steps=5), max_epochs=3
    )
    fit.fit(OfAnyRate(), data(8))
    assert fit.current_epoch == 3
    assert all(tensor.isfinite().all() for tensor in fit.lightning_module.parameters())
