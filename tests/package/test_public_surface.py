"""What somebody sees who types a callback's name and a dot: what is his, and nothing of the engine."""

from __future__ import annotations

import pickle

import pytest
from lightning.pytorch import Callback

from clip_callbacks import AccumulationRescaling, GradientClipping, GradientNoiseScale, GradientNormMonitor, NonFiniteGuard
from tests.helpers.training import Regression, data

COMMON = {"last_report", "skipped_steps"}
THEIRS = {
    AccumulationRescaling: {"weight", "divide"},
    GradientClipping: {"rules", "shadow", "norm_type", "clip_value", "prog_bar", "summary"},
    NonFiniteGuard: {
        *("policy", "max_consecutive", "level", "skip_above", "loss_above", "both", "hold_schedulers", "trace_forward", "deferred"),
        *("bundles", "rollback", "summary"),
        *("spikes", "skipped_steps_of", "zeroed_steps", "overflowed_steps", "reported_steps"),
        *("rollbacks", "dropped_micro_batches"),
    },
    GradientNormMonitor: {
        *("scope", "norm_type", "every_n_steps", "include", "exclude", "top_k", "log_update_ratio"),
        *("log_weight_norm", "log_statistics", "log_contributions", "log_histograms", "summary", "advice"),
    },
    GradientNoiseScale: set(),
}

FITTING = {GradientNoiseScale: {"accumulate_grad_batches": 2}}
"""What a Trainer needs for a callback."""


def names(callback):
    return {name for name in dir(callback) if not name.startswith("_")} - set(dir(Callback))


@pytest.mark.parametrize("kind", THEIRS, ids=lambda kind: kind.__name__)
def test_nothing_of_the_engine_shows(trainer, kind):
    callback = kind()
    assert names(callback) == COMMON | THEIRS[kind]
    trainer(callback, **FITTING.get(kind, {})).fit(Regression(), data(2))
    lightnings_own = {"log", "log_dict"}  # the module's, hung on every callback
    assert names(callback) - lightnings_own == COMMON | THEIRS[kind]


@pytest.mark.parametrize("kind", THEIRS, ids=lambda kind: kind.__name__)
def test_a_callback_may_be_pickled_in_the_middle_of_a_fit(trainer, kind):
    callback, copies = kind(), []

    class Pickle(Callback):
        def on_train_batch_end(self, *_):
            copies.append(pickle.loads(pickle.dumps(callback)))

    options = FITTING.get(kind, {})
    window = options.get("accumulate_grad_batches", 1)
    trainer(callback, Pickle(), **options).fit(Regression(), data(3 * window))
    steps = [copied.state_dict()["history"][0]["steps"] for copied in copies[window - 1 :: window]]
    assert steps == [1, 2, 3]
    assert copies[-1].skipped_steps == callback.skipped_steps == 0
