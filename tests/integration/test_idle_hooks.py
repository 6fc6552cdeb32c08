"""A callback without work in a hook has no such hook during a fit; hooks of subclasses, and all hooks after the fit, are there."""

from __future__ import annotations

import copy
import pickle

import pytest
from lightning.pytorch import Callback

from clip_callbacks import AccumulationRescaling, BatchSize, GradientClipping, GradientNormMonitor, NonFiniteGuard
from clip_callbacks.trainer.idle_hooks import BATCH_HOOKS
from tests.helpers.training import Regression, data

COPIES = [lambda callback: pickle.loads(pickle.dumps(callback)), copy.deepcopy, copy.copy]


def hidden(callback):
    return {name for name in BATCH_HOOKS if getattr(callback, name) is None}


class During(Callback):
    """Calls a function at the end of each batch."""

    def __init__(self, function):
        self.function = function

    def on_train_batch_end(self, *_):
        self.function()


class CountingGuard(NonFiniteGuard):
    """Overrides hooks of batches, as a user's subclass may."""

    def __init__(self):
        super().__init__()
        self.called = []

    def on_train_batch_start(self, *arguments):
        self.called.append("start")
        super().on_train_batch_start(*arguments)

    def on_before_zero_grad(self, *arguments):
        self.called.append("zero")
        super().on_before_zero_grad(*arguments)

    def on_train_batch_end(self, *arguments):
        self.called.append("end")
        super().on_train_batch_end(*arguments)


class Mixin(Callback):
    called = 0

    def on_before_zero_grad(self, *_):
        self.called += 1


class MixedMonitor(GradientNormMonitor, Mixin):
    """Has a hook of another class, which comes later in the order of classes."""


def test_idle_hooks_are_hidden_in_a_fit_and_back_after_it(trainer):
    seen, driver, others = [], {"on_before_zero_grad", "on_after_backward"}, set(BATCH_HOOKS)
    callbacks = [GradientClipping(), NonFiniteGuard(), GradientNormMonitor(), AccumulationRescaling()]
    trainer(*callbacks, During(lambda: seen.append(list(map(hidden, callbacks))))).fit(Regression(), data(2))
    assert seen == [[driver, others, others, others - {"on_before_zero_grad"}]] * 2
    assert not any(map(hidden, callbacks))


def test_callbacks_change_places_in_the_next_fit(trainer):
    seen, others = [], set(BATCH_HOOKS)
    clipping, guard, weighted = GradientClipping(), NonFiniteGuard(), AccumulationRescaling(BatchSize())
    during = During(lambda: seen.append(list(map(hidden, (clipping, guard, weighted)))))
    trainer(clipping, guard, weighted, during).fit(Regression(), data(1))
    trainer(weighted, guard, clipping, during).fit(Regression(), data(1))
    first = {"on_before_zero_grad"}  # each pass of a weighted window ends with something to do
    assert seen == [[first, others, others - {"on_before_zero_grad", "on_train_batch_start"}], [others, others, set()]]
    assert clipping.last_report is not None


@pytest.mark.parametrize("place", [0, 1])
def test_hooks_of_subclasses_are_called(trainer, place):
    guard, mixed, callbacks = CountingGuard(), MixedMonitor(), [GradientClipping()]
    callbacks[place:place] = [guard, mixed]
    trainer(*callbacks).fit(Regression(), data(3))
    assert guard.called == ["start", "zero", "end"] * 3
    assert mixed.called == 3


def test_hooks_set_on_the_instance_are_called_and_stay(trainer):
    called, guard = [], NonFiniteGuard()
    guard.on_train_batch_end = lambda *_: called.append(1)
    trainer(GradientClipping(), guard).fit(Regression(), data(3))
    assert called == [1] * 3
    assert "on_train_batch_end" in vars(guard)


def test_hooks_are_back_after_an_exception(trainer):
    callbacks = [GradientClipping(), NonFiniteGuard(), GradientNormMonitor()]
    with pytest.raises(ZeroDivisionError):
        trainer(*callbacks, During(lambda: 1 / 0)).fit(Regression(), data(2))
    assert not any(map(hidden, callbacks))


def test_hooks_are_back_if_the_end_of_a_fit_fails(trainer, monkeypatch):
    callbacks = [GradientClipping(), NonFiniteGuard(), GradientNormMonitor()]
    monkeypatch.setattr(callbacks[0], "_save_results", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer(*callbacks).fit(Regression(), data(2))
    assert not any(map(hidden, callbacks))


@pytest.mark.parametrize("of", COPIES)
def test_copies_in_mid_fit_have_all_hooks(trainer, of):
    callbacks, copies = [GradientClipping(), NonFiniteGuard(), GradientNormMonitor()], []
    trainer(*callbacks, During(lambda: copies.extend(map(of, callbacks)))).fit(Regression(), data(1))
    assert [type(each) for each in copies] == [type(each) for each in callbacks]
    assert not any(map(hidden, copies))
    trainer(*copies).fit(Regression(), data(2))
    assert copies[0].last_report is not None
