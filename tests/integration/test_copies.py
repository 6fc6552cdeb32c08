"""Callbacks are pickled and copied at any time: with what they have counted, without what belongs to one Trainer's fit."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from lightning.pytorch import Callback

import clip_callbacks
from clip_callbacks import (
    Bundles,
    FaultInjection,
    GradientClipping,
    GradientNoiseScale,
    GradientNormMonitor,
    NonFiniteGuard,
    QuantileLimit,
    RobustZScoreLimit,
    Rollback,
)
from clip_callbacks.core.tensor_table import TensorTable
from tests.helpers.training import Poisoned, assert_same_bits, data, leaves

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning", "ignore:Spike:RuntimeWarning")

EACH = [kind for kind in vars(clip_callbacks).values() if isinstance(kind, type) and issubclass(kind, Callback)]
OPTIONS = {
    GradientClipping: [{}, {"max_norm": QuantileLimit(window=10), "scope": "unit", "shadow": [QuantileLimit(0.5)]}],
    NonFiniteGuard: [
        *({}, {"trace_forward": True}, {"skip_above": QuantileLimit(0.9, warmup=5)}, {"rollback": Rollback(every_n_steps=1)}),
        *({"loss_above": RobustZScoreLimit(warmup=2, scale="linear")}, {"policy": "warn"}),
        *({"level": "microbatch"}, {"bundles": lambda: Bundles("bad", weights="full")}),
    ],
    GradientNormMonitor: [{}, {"log_update_ratio": True, "log_statistics": True, "log_contributions": True, "top_k": 2}],
    FaultInjection: [{"kind": "nan", "step": 1}, {"kind": "loss", "step": [2, 3]}],
}
MADE = [(kind, options) for kind in EACH for options in OPTIONS.get(kind, [{}])]
NAMED = [pytest.param(*made, False, id=f"{made[0].__name__}-{'-'.join(made[1])}") for made in MADE]
NAMED += [pytest.param(kind, OPTIONS.get(kind, [{}])[0], True, id=f"{kind.__name__}-fails") for kind in EACH]
COPIES = [lambda callback: pickle.loads(pickle.dumps(callback)), copy.deepcopy, copy.copy]


def check(callback):
    """Each copy knows what the callback knows, and nothing of the Trainer."""
    for made in (of(callback) for of in COPIES):
        assert made.state_key.partition("@")[0] == callback.state_key.partition("@")[0]
        assert_same_bits(leaves(made.state_dict()), leaves(callback.state_dict()))
        for name in ("skipped_steps", "dropped_micro_batches", "zeroed_steps", "overflowed_steps", "rollbacks", "injected"):
            assert getattr(made, name, None) == getattr(callback, name, None), name
        report, original = (getattr(each, "last_report", None) for each in (made, callback))
        assert (report is None) == (original is None)
        if report is not None:
            torch.testing.assert_close(report.total_norm, original.total_norm, rtol=0.0, atol=0.0, equal_nan=True)
            assert list(report.names) == list(original.names)
    assert len(pickle.dumps(callback)) < 200_000, "neither the module nor a batch is in it"


class Checks(Callback):
    """Copies a callback at all times of a fit; in the end raises, if it is told to."""

    def __init__(self, callback, fails):
        self.callback, self.fails, self.checked = callback, fails, 0

    def on_before_backward(self, trainer, *_):
        if trainer.global_step == 1:
            check(self.callback)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        check(self.callback)
        self.checked += 1
        if self.fails and batch_idx == 4:
            raise KeyError("stop")


class Wide(Poisoned):
    """A network of two million parameters."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("table", torch.zeros(2_000_000))


@pytest.mark.parametrize(("kind", "options", "fails"), NAMED)
def test_before_in_and_after_a_fit_and_after_an_error(trainer, tmp_path, monkeypatch, kind, options, fails):
    monkeypatch.setenv("CLIP_CALLBACKS_INJECT", "1")
    monkeypatch.chdir(tmp_path)
    # Bundles resolve their folder when they are made, which must be in the test's own folder.
    callback = kind(**{name: value() if callable(value) else value for name, value in options.items()})
    check(callback)
    checks = Checks(callback, fails)
    accumulates = kind is GradientNoiseScale or "level" in options
    run = trainer(callback, checks, accumulate_grad_batches=2 if accumulates else 1)
    if fails:
        with pytest.raises(KeyError):
            run.fit(Wide({2: math.nan}), data(6))
    else:
        run.fit(Wide({2: math.nan}), data(6))
    check(callback)
    assert checks.checked == (5 if fails else 6)


@pytest.mark.parametrize("of", COPIES)
def test_a_copy_goes_its_own_way(trainer, monkeypatch, of):
    monkeypatch.setenv("CLIP_CALLBACKS_INJECT", "1")
    callbacks = [FaultInjection("nan", step=1), NonFiniteGuard(), GradientClipping(QuantileLimit(window=10)), GradientNormMonitor()]
    trainer(*callbacks).fit(Poisoned({}), data(3))
    copies = [of(callback) for callback in callbacks]
    trainer(*copies).fit(Poisoned({4: math.nan}), data(6))
    assert [copies[0].injected[0]["step"], copies[1].skipped_steps] == [1, 2]
    assert len(callbacks[0].injected) == callbacks[1].skipped_steps == 1
    assert callbacks[2].state_dict()["limits"][0]["rule_1"]["state"]["count"].item() == 2
    assert len(callbacks[3].state_dict()["norms"][0]) == 2


def test_a_copied_report_knows_no_other_partition_by_its_place_in_memory():
    table = TensorTable.of(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).named_parameters())
    layers, rows = table.partition("layer"), table.partition("parameter")
    before = layers.meet(rows)[1]
    for of in COPIES:
        copied = of(layers)
        assert not copied._meets
        assert torch.equal(copied.meet(rows)[1], before)


def test_a_state_tells_its_counts_before_the_fit_that_takes_it_up(trainer):
    for kind in (GradientClipping, NonFiniteGuard):
        trainer(callback := kind()).fit(Poisoned({1: math.nan, 3: math.nan}), data(5))
        (other := kind()).load_state_dict(callback.state_dict())
        assert other.skipped_steps == callback.skipped_steps == 2
