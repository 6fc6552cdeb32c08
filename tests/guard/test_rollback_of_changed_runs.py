"""Rollbacks of runs whose optimizers, schedules and averages have changed since the copy."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn

from clip_callbacks import (
    GradientClipping,
    NonFiniteGradientError,
    QuantileLimit,
)
from tests.helpers.exact_skip import differences
from tests.helpers.members import O
from tests.helpers.rollback import BAD, BATCHES, LOST, SCHEDULES, Copies, Subject, Weights, fitted, rollback, without
from tests.helpers.training import SAFELY, Poisoned, data

pytestmark = pytest.mark.filterwarnings(
    "ignore:Non-finite gradients:RuntimeWarning",
    "ignore:Spike:RuntimeWarning",
    "ignore:Every micro-batch:RuntimeWarning",
    "ignore:.*lr_scheduler.step.*:UserWarning",
)


class Unfreezes(Poisoned):
    """The optimizer takes up the last layer in mid-run."""

    def __init__(self, bad, *, at, is_new=False):
        super().__init__(dict.fromkeys(bad, math.nan))
        self.at, self.is_new = at, is_new

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == self.at:
            if self.is_new:
                self.net.append(nn.Linear(1, 1))
            self.trainer.optimizers[0].add_param_group({"params": list(self.net[-1].parameters()), "lr": 0.01})

    def configure_optimizers(self):
        return O.AdamW(self.net[0].parameters(), lr=0.01)


@pytest.mark.parametrize("bad", [(4, 5), (3, 4), (2, 3)], ids=["later", "at once", "from before"])
def test_the_copy_still_serves_when_an_optimizer_takes_up_what_was_frozen(trainer, bad):
    guard, path = rollback(every_n_steps=100, max_consecutive=2), Weights()
    fit = trainer(guard, path, GradientClipping(QuantileLimit(0.5, window=5, warmup=2), scope="parameter"))
    fit.fit(Unfreezes(bad, at=3), data(7))
    assert guard.rollbacks == 1
    assert torch.equal(path.weights[bad[-1] + 1], path.weights[0])
    assert [group["lr"] for group in fit.optimizers[0].param_groups] == [0.01, 0.01]
    assert {state["step"].item() for state in fit.optimizers[0].state.values()} == {6.0 - bad[-1]}


def test_the_copy_is_lost_when_an_optimizer_takes_up_what_is_new_to_the_module(trainer):
    guard = rollback(every_n_steps=100)
    copies = Copies(guard)
    trainer(guard, copies).fit(Unfreezes((), at=3, is_new=True), data(6))
    assert copies.steps == [0, 0, 0, None, 4, 4]
    with pytest.raises(NonFiniteGradientError, match=r"no good step to return to since the optimizers took up other parameters\)"):
        trainer(rollback(max_consecutive=2)).fit(Unfreezes((4, 5), at=4, is_new=True), data(6))


def test_what_an_optimizer_gives_up_goes_back_without_its_state(trainer):
    class Freezes(Poisoned):
        def on_train_batch_start(self, batch, batch_idx):
            optimizer = self.trainer.optimizers[0]
            if batch_idx == 4:
                for parameter in optimizer.param_groups.pop()["params"]:
                    del optimizer.state[parameter]

        def configure_optimizers(self):
            return O.AdamW([{"params": list(layer.parameters())} for layer in (self.net[0], self.net[2])], lr=0.01)

    guard, path = rollback(every_n_steps=3, max_consecutive=2), Weights()
    fit = trainer(guard, path)
    fit.fit(Freezes(dict.fromkeys((5, 6), math.nan)), data(9))
    assert guard.rollbacks == 1
    assert torch.equal(path.weights[7], path.weights[3])
    assert len(fit.optimizers[0].state_dict()["state"]) == 2


def test_after_a_resume_the_message_says_that_there_is_no_copy_yet(trainer, tmp_path):
    before = trainer(rollback())
    before.fit(Subject({}), data(4))
    before.save_checkpoint(tmp_path / "start.ckpt")
    with pytest.raises(NonFiniteGradientError, match=r"no good step to return to since the resume\)"):
        trainer(rollback(), max_epochs=2).fit(
            Subject(dict.fromkeys((4, 5, 6), math.nan)), data(4), ckpt_path=tmp_path / "start.ckpt", **SAFELY
        )


@pytest.mark.parametrize("schedule", [None, "Step"])
def test_a_rollback_crosses_the_start_of_stochastic_weight_averaging(trainer, schedule):
    """Epochs of six batches; SWA begins with the third."""
    guard, path = rollback(every_n_steps=100), Weights()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=3, annealing_epochs=1)
    average = Weights(lambda: swa._average_model)
    fit = trainer(guard, path, swa, average, max_epochs=3)
    module = Subject(dict.fromkeys((14, 15, 16), math.nan), SCHEDULES.get(schedule))
    del module.net[1]  # with batch statistics SWA needs one more epoch
    fit.fit(module, data(6, batch_size=6))
    assert guard.rollbacks == 1
    assert torch.equal(path.weights[17], path.weights[0])
    assert torch.equal(average.weights[12], path.weights[12])
    assert torch.equal(average.weights[17], path.weights[0]), "what it averaged before is gone: it begins with the old weights"
    assert swa.n_averaged == 1
    (config,) = fit.lr_scheduler_configs
    assert type(config.scheduler) is O.swa_utils.SWALR
    assert fit.optimizers[0].param_groups[0]["swa_lr"] == 0.01


@pytest.mark.parametrize(("batch", "steps"), [(4, 1), (7, 0)], ids=["before the bad batches", "in the last of them"])
def test_a_schedule_that_was_swapped_stays_and_goes_back_to_where_it_was_found(trainer, batch, steps):
    """A change is found when the next batch begins, or at the rollback; here nothing holds the schedule in between."""
    swap_at = batch

    class Swaps(Subject):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == swap_at:
                (optimizer,) = self.trainer.optimizers
                self.trainer.lr_scheduler_configs[0].scheduler = O.lr_scheduler.ExponentialLR(optimizer, 0.5)

    fit = trainer(guard := rollback(every_n_steps=100, hold_schedulers=False))
    fit.fit(Swaps(schedule=SCHEDULES["Step"]), data(8, batch_size=6))
    assert guard.rollbacks == 1
    (config,) = fit.lr_scheduler_configs
    assert type(config.scheduler) is O.lr_scheduler.ExponentialLR
    assert config.scheduler.last_epoch == steps
    assert fit.optimizers[0].param_groups[0]["lr"] == 0.02 / 8


def test_schedules_that_step_now_and_then_count_on_from_where_parameters_were_taken_up(trainer):
    class Scheduled(Unfreezes):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": O.lr_scheduler.StepLR(optimizer, 1), "interval": "step", "frequency": 2}]

    fit = trainer(guard := rollback(every_n_steps=100))
    fit.fit(Scheduled(BAD, at=3), data(9))
    assert guard.rollbacks == 1
    assert fit.lr_scheduler_configs[0].scheduler.last_epoch == 2, "batches 0 to 2 and 8 are four"


class Averages(Callback):
    """An average of the weights that a callback of one's own keeps, good steps only."""

    def __init__(self):
        self.model = None

    def on_fit_start(self, trainer, pl_module):
        self.model = O.swa_utils.AveragedModel(pl_module.net)

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.last_is_good:
            self.model.update_parameters(pl_module.net)


def test_averages_of_the_weights_go_back_too(trainer):
    class Good(Subject):
        @property
        def last_is_good(self):
            number = self.trainer.fit_loop.epoch_loop.total_batch_idx
            return number not in self.factors

    loader, ours, clean = data(BATCHES, batch_size=6), Averages(), Averages()
    trainer(guard := rollback(), ours).fit(Good(), loader)
    trainer(clean).fit(Good({}), without(loader, LOST))
    assert guard.rollbacks == 1
    assert ours.model.n_averaged == BATCHES - len(LOST)
    assert differences(ours.model.state_dict(), clean.model.state_dict()) == []


def test_an_average_that_has_taken_in_ruined_weights_is_good_again(trainer):
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")

    class Ruined(Subject):
        def optimizer_step(self, *args, **options):
            super().optimizer_step(*args, **options)
            if self.trainer.fit_loop.epoch_loop.total_batch_idx == 4:
                self.net[0].weight.data.fill_(math.nan)

        def on_train_batch_start(self, *_):
            if self.trainer.fit_loop.epoch_loop.total_batch_idx in {7, 8}:
                seen.append(torch.stack([value.isfinite().all() for value in average._average_model.parameters()]).all().item())

    seen, average = [], averaging.EMAWeightAveraging(decay=0.9)
    trainer(rollback(), average).fit(Ruined({}), data(BATCHES, batch_size=6))
    assert seen == [False, True]


class Counting(O.SGD):
    """Counts its steps in its groups, as schedule-free optimizers do, after the hooks of the class that it comes from."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return loss


class Plateau(Subject):
    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters(), **self.options)
        schedule = O.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "train_loss", "interval": "step"}}


@pytest.mark.parametrize(("subject", "optimizer"), [(Subject, Counting), (Plateau, O.AdamW)])
def test_the_step_that_is_taken_all_the_same_leaves_no_trace(trainer, subject, optimizer):
    O.SGD([torch.zeros(1)])  # from now on its step calls hooks, also from within a subclass's
    loader = data(BATCHES, batch_size=6)
    fit = trainer(rollback())
    ours = fitted(fit, subject(optimizer=optimizer), loader)
    clean = fitted(trainer(), subject({}, optimizer=optimizer), without(loader, LOST))
    assert differences(ours, clean) == []
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in fit.optimizers)
    assert [config.frequency for config in fit.lr_scheduler_configs] == [1] * (subject is Plateau)


def test_a_plateau_schedule_goes_on_after_a_line_search_that_turned_bad_on_its_way(trainer):
    class Later(Plateau):
        """Bad from the second closure call of a batch on."""

        calls, last = 0, -1

        def loss(self, batch, batch_idx):
            self.calls, self.last = (self.calls + 1 if batch_idx == self.last else 1), batch_idx
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            return loss * self.factors.get(batch_idx, 1.0) if self.calls > 1 else loss

    fit = trainer(guard := rollback(every_n_steps=100))
    fit.fit(Later(optimizer=O.LBFGS, max_iter=4), data(BATCHES, batch_size=6))
    assert guard.rollbacks == 1
    (config,) = fit.lr_scheduler_configs
    assert config.frequency == 1
    assert config.scheduler.last_epoch == BATCHES - 8, "the batches that follow"
