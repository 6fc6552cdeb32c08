"""Checkpoint and resume continue bit-identically."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from clip_callbacks import (
    AccumulationRescaling,
    ClipRule,
    GradientClipping,
    GradientNoiseScale,
    GradientNormMonitor,
    NonFiniteGuard,
)
from tests.helpers.laws import ADAPTIVE
from tests.helpers.records import record_of
from tests.helpers.training import SAFELY, EitherWay, GradientTape, Poisoned, assert_same_bits, data, leaves, weights

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")


def family():
    return [
        AccumulationRescaling(),
        NonFiniteGuard(max_consecutive=4),
        GradientClipping(rules=[ClipRule(ADAPTIVE), ClipRule(0.4, "layer")]),
        GradientNormMonitor("layer"),
        GradientNormMonitor("parameter"),  # two of one class
        GradientNoiseScale(),
    ]


def module():
    torch.manual_seed(0)
    return Poisoned({3: math.nan, 17: math.inf, 27: math.nan}, optimizer=torch.optim.AdamW, lr=0.01)


@pytest.mark.parametrize("leader", [0, 2, 4, 5])
def test_interrupted_and_whole_runs_end_in_the_same_bits(trainer, tmp_path, leader):
    def members():
        made = family()
        return made[leader:] + made[:leader]

    whole, whole_family = module(), members()
    straight = trainer(*whole_family, max_epochs=3, accumulate_grad_batches=2)
    straight.fit(whole, data(11))

    first = module()
    before = trainer(*members(), max_epochs=1, accumulate_grad_batches=2)
    before.fit(first, data(11))
    before.save_checkpoint(tmp_path / "middle.ckpt")

    second, second_family = module(), members()
    after = trainer(*second_family, max_epochs=3, accumulate_grad_batches=2)
    after.fit(second, data(11), ckpt_path=tmp_path / "middle.ckpt", **SAFELY)
    assert_same_bits(weights(second), weights(whole))
    for ours, theirs in zip(second_family, whole_family, strict=True):
        assert ours.state_key == theirs.state_key
        assert_same_bits(leaves(ours.state_dict()), leaves(theirs.state_dict()))
        assert ours.skipped_steps == theirs.skipped_steps == 3
    keys = {key for key in after.callback_metrics if key.startswith("grad")}
    assert keys >= {"grad/total_norm", "grad/total_norm_p50"}
    assert all(torch.equal(after.callback_metrics[key], straight.callback_metrics[key]) for key in keys)


def test_a_streak_goes_on_over_a_resume(trainer, tmp_path):
    from clip_callbacks import NonFiniteGradientError

    poison = dict.fromkeys(range(4, 20), math.nan)
    first = trainer(GradientClipping(1.0), max_epochs=1)
    first.fit(Poisoned(poison), data(8))
    first.save_checkpoint(tmp_path / "bad.ckpt")
    callback = GradientClipping(1.0)
    with pytest.raises(NonFiniteGradientError, match="bad step 10 in a row"):
        trainer(callback, max_epochs=3).fit(Poisoned(poison), data(8), ckpt_path=tmp_path / "bad.ckpt", **SAFELY)
    assert callback.skipped_steps == 10


def test_a_changed_threshold_may_resume(trainer, tmp_path):
    first = trainer(GradientClipping(1.0))
    first.fit(Poisoned({}), data(4))
    first.save_checkpoint(tmp_path / "a.ckpt")
    callback = GradientClipping(2.0)
    trainer(callback, max_epochs=2).fit(Poisoned({}), data(4), ckpt_path=tmp_path / "a.ckpt", **SAFELY)
    assert callback.last_report.max_norm == 2.0


def test_callbacks_can_be_copied_and_pickled(trainer):
    import copy
    import pickle

    callbacks = family()
    trainer(*callbacks, accumulate_grad_batches=2).fit(Poisoned({}), data(4))
    for callback in callbacks:
        assert copy.deepcopy(callback).state_key == callback.state_key
        pickle.loads(pickle.dumps(callback))


def test_fit_twice_with_the_same_callbacks(trainer):
    callback = GradientClipping(1.0)
    for _ in range(2):
        trainer(callback).fit(Poisoned({2: math.nan}), data(4))
        assert callback.skipped_steps == 1, "of this run"


@pytest.mark.parametrize("saved", [[0, 1], [1, 0]])
def test_a_streak_goes_on_in_another_order_of_callbacks(trainer, tmp_path, saved):
    from clip_callbacks import NonFiniteGradientError

    def members(order):
        made = [GradientNormMonitor(), NonFiniteGuard()]
        return [made[i] for i in order]

    poison = dict.fromkeys(range(20), math.nan)
    first = trainer(*members(saved))
    first.fit(Poisoned(poison), data(8))
    first.save_checkpoint(tmp_path / "bad.ckpt")
    with pytest.raises(NonFiniteGradientError, match="bad step 10 in a row"):
        trainer(*members(saved[::-1]), max_epochs=3).fit(Poisoned(poison), data(8), ckpt_path=tmp_path / "bad.ckpt", **SAFELY)


def test_callbacks_may_move_on_to_another_model(trainer):
    from tests.helpers.training import TwoNetworks

    callback = GradientClipping(ADAPTIVE, scope="layer")
    trainer(callback).fit(TwoNetworks(), data(4))
    trainer(callback).fit(Poisoned({}), data(4))


def test_rules_that_remember_nothing_may_change_between_runs(trainer, tmp_path):
    first = trainer(GradientClipping(1.0))
    first.fit(Poisoned({}), data(4))
    first.save_checkpoint(tmp_path / "a.ckpt")
    callback = GradientClipping(rules=[ClipRule(1.0), ClipRule(0.5, "layer")])
    trainer(callback, max_epochs=2).fit(Poisoned({}), data(4), ckpt_path=tmp_path / "a.ckpt", **SAFELY)
    assert len(record_of(callback.last_report).outcomes) == 2


class Growing(GradientTape):
    """Gradients of each epoch are ten times those of the one before; the last of them is clipped at 5."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 10.0**self.current_epoch

    def validation_step(self, batch, batch_idx):
        """Only for the hooks around it."""


class Streamed(IterableDataset):
    """Data of which Lightning does not know the length: it counts batches on from one epoch to the next if it resumes."""

    def __iter__(self):
        return iter(torch.ones(4, 2))


LOADERS = {"sized": lambda: DataLoader(TensorDataset(torch.ones(4, 2))), "of unknown length": lambda: DataLoader(Streamed())}


class Saves(Callback):
    """Saves a checkpoint in a hook of the first epoch, once that has had some batches."""

    def __init__(self, path, hook, after_batches):
        self.path, self.after_batches = path, after_batches
        setattr(self, hook, self.save)

    def save(self, trainer, *_):
        if not self.path.exists() and trainer.fit_loop.epoch_loop.batch_progress.current.ready == self.after_batches:
            trainer.save_checkpoint(self.path)


PLACES = {
    "within an epoch": ("on_train_batch_end", 2),
    "in its last batch": ("on_train_batch_end", 4),
    "in the validation at its end": ("on_validation_end", 4),
    "at its end": ("on_train_epoch_end", 4),
}


@pytest.mark.parametrize("is_first", [False, True], ids=["after ours", "before ours"])
@pytest.mark.parametrize(
    ("place", "loader"),
    # of data of unknown length Lightning begins again from the first batch
    [(place, loader) for place in PLACES for loader in LOADERS if (place, loader) != ("within an epoch", "of unknown length")],
)
def test_metrics_of_an_epoch_are_of_its_steps_wherever_the_checkpoint_was_saved(trainer, tmp_path, place, loader, is_first):
    """A callback before ours saves what the epoch has recorded, and ours has not published."""
    path, (hook, batches) = tmp_path / "a.ckpt", PLACES[place]

    def members():
        return [
            GradientClipping(rules=[ClipRule(5.0), ClipRule(ADAPTIVE, name="low")], shadow=[1.0]),
            GradientNormMonitor("parameter"),
        ]

    def fit(*callbacks, **options):
        run = trainer(*callbacks, max_epochs=2, num_sanity_val_steps=0, limit_val_batches=1)
        run.fit(Growing(torch.ones(4, 2)), LOADERS[loader](), data(1), **options)
        return {key: value for key, value in run.callback_metrics.items() if key.startswith("grad")}

    whole, resumed, saves = members(), members(), Saves(path, hook, batches)
    wanted = fit(*[saves, *whole] if is_first else [*whole, saves])
    assert {"grad/total_norm_p50", "grad/low/clip_fraction_epoch", "grad_norm_p50/weight"} <= wanted.keys()
    assert fit(*resumed, ckpt_path=path, **SAFELY) == wanted
    for ours, theirs in zip([each.state_dict() for each in resumed], [each.state_dict() for each in whole], strict=True):
        for key in ours.keys() - {"guard"}:  # which counts batches as Lightning does
            assert_same_bits(leaves(ours[key]), leaves(theirs[key]))


@pytest.mark.parametrize("automatic", [False, True])
def test_an_epoch_that_begins_again_after_an_error_counts_its_own_steps(trainer, automatic):
    class Failing(EitherWay):
        automatic_optimization = automatic
        factor = 1000.0

        def loss(self, batch, batch_idx):
            if batch_idx == 2 and self.factor == 1000.0:
                raise OSError("the data is not there")
            return super().loss(batch, batch_idx) * self.factor

    module, callbacks = Failing(lr=0.0), [GradientClipping(1e4), GradientNormMonitor("parameter")]
    run = trainer(*callbacks)
    with pytest.raises(OSError, match="the data"):
        run.fit(module, data(4))
    module.factor = 0.0
    run.fit(module, data(4))
    assert run.callback_metrics["grad/total_norm_p99"] == run.callback_metrics["grad_norm_p99/net.0.weight"] == 0.0
    assert callbacks[0].state_dict()["history"][0]["counts"][-2] == 6, "those of the run are all"
