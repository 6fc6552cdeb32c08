"""What is counted goes on as ``trainer.global_step`` does, from fit to fit; another module or Trainer is another run."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from clip_callbacks import AccumulationRescaling, FaultInjection, GradientClipping, GradientNormMonitor, NonFiniteGuard
from tests.helpers.laws import ADAPTIVE
from tests.helpers.training import SAFELY, Poisoned, Regression, assert_same_bits, data, leaves, weights

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")


def family():
    return [GradientNormMonitor(), NonFiniteGuard(), GradientClipping(ADAPTIVE, scope="layer"), AccumulationRescaling()]


def poisoned():
    torch.manual_seed(0)
    return Poisoned({2: math.nan, 7: math.nan}, optimizer=torch.optim.SGD)


def steps_of(callbacks):
    return callbacks[0].state_dict()["history"][0]["steps"]


def test_fit_validate_fit_is_one_run(trainer):
    straight, whole = family(), poisoned()
    trainer(*straight, max_epochs=2).fit(whole, data(5), data(2))

    callbacks, module = family(), poisoned()
    run = trainer(*callbacks, max_epochs=1)
    run.fit(module, data(5), data(2))
    run.validate(module, data(2), verbose=False)
    assert callbacks[1].skipped_steps == 1, "validation is none of our business"
    run.fit_loop.max_epochs = 2
    run.fit(module, data(5), data(2))
    assert steps_of(callbacks) == run.global_step == 10
    assert [callback.skipped_steps for callback in callbacks] == [2] * 4
    assert_same_bits(weights(module), weights(whole))
    for ours, theirs in zip(callbacks, straight, strict=True):
        assert_same_bits(leaves(ours.state_dict()), leaves(theirs.state_dict()))


@pytest.mark.parametrize("other", ["module", "trainer"])
def test_another_module_or_another_trainer_begins_anew(trainer, other):
    callbacks, module = family(), poisoned()
    run = trainer(*callbacks)
    run.fit(module, data(5))
    if other == "module":
        module = poisoned()
        run.fit_loop.max_epochs = 2
    else:
        run = trainer(*callbacks)
    run.fit(module, data(5))
    assert steps_of(callbacks) == 5
    assert callbacks[1].skipped_steps == 1


def test_a_run_that_was_stopped_by_an_error_goes_on(trainer):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                raise KeyError("stop")

    callbacks, module = family(), poisoned()
    run = trainer(*callbacks, Fails(), max_epochs=2)
    with pytest.raises(KeyError):
        run.fit(module, data(5))
    assert callbacks[1].skipped_steps == 1
    run.fit(module, data(5))
    assert steps_of(callbacks) == run.global_step
    assert callbacks[1].skipped_steps == 2


def test_a_checkpoint_that_knows_nothing_of_us_begins_anew(trainer, tmp_path):
    foreign = trainer(max_epochs=1)
    foreign.fit(poisoned(), data(5))
    foreign.save_checkpoint(tmp_path / "foreign.ckpt")
    callbacks, module = family(), poisoned()
    run = trainer(*callbacks, max_epochs=1)
    run.fit(module, data(5))
    run.fit_loop.max_epochs = 2
    run.fit(module, data(5), ckpt_path=tmp_path / "foreign.ckpt", **SAFELY)
    assert steps_of(callbacks) == 5


class Tunable(Regression):
    lr = 0.01
    batch_size = 2

    def train_dataloader(self):
        return DataLoader(data(16).dataset, batch_size=self.batch_size)

    val_dataloader = train_dataloader  # the search asks for one

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_a_search_before_a_fit_leaves_nothing_of_an_earlier_run(trainer, search):
    callbacks = family()
    trainer(*callbacks).fit(poisoned(), data(5))
    run, module = trainer(*callbacks, max_steps=4), Tunable()
    options = {"lr_find": {"num_training": 4}, "scale_batch_size": {"max_trials": 1, "steps_per_trial": 1, "init_val": 2}}
    getattr(Tuner(run), search)(module, **options[search])
    run.fit(module)
    assert steps_of(callbacks) == run.global_step == 4
    assert callbacks[1].skipped_steps == 0
    trainer(*callbacks).fit(poisoned(), data(3))
    assert steps_of(callbacks) == 3, "what the search has restored is not for another run"


def test_a_search_for_the_batch_size_in_a_later_epoch_is_survived(trainer):
    class Later(BatchSizeFinder):
        def on_fit_start(self, *_):
            return

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                seen.append(steps_of(callbacks))
                self.scale_batch_size(trainer, pl_module)
                loop = trainer.fit_loop  # as lr_find does; without it Lightning trains no more
                loop.restarting = loop.epoch_loop.restarting = False

        def on_train_batch_start(self, trainer, *_):
            if len(seen) == 1:
                seen.append(steps_of(callbacks))

    seen, callbacks = [], family()
    run = trainer(Later(max_trials=1, steps_per_trial=1), *callbacks, max_epochs=2, limit_train_batches=3)
    run.fit(Tunable())
    assert seen == [3, 3], "nothing of the search counts"
    assert steps_of(callbacks) == run.global_step


def test_what_was_injected_goes_on_too(trainer, monkeypatch):
    monkeypatch.setenv("CLIP_CALLBACKS_INJECT", "1")
    faults, module = FaultInjection("nan", step=[1, 6]), Regression()
    run = trainer(faults, NonFiniteGuard(), max_epochs=1)
    run.fit(module, data(5))
    run.fit_loop.max_epochs = 2
    run.fit(module, data(5))
    assert [strike["step"] for strike in faults.injected] == [1, 6]
    trainer(faults, NonFiniteGuard()).fit(Regression(), data(2))
    assert [strike["step"] for strike in faults.injected] == [1]
