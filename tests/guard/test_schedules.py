"""Learning-rate schedules do not advance at a skipped step."""

from __future__ import annotations

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from clip_callbacks import GradientClipping, NonFiniteGuard
from tests.helpers.exact_skip import Recorded
from tests.helpers.matrix import matrix
from tests.helpers.members import SCHEDULES, O
from tests.helpers.training import data

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning", "ignore:.*lr_scheduler.step.*:UserWarning")


@matrix(name=list(SCHEDULES), frequency=[1, 2, 3], poison={"first": {0}, "later": {3}, "three": {2, 3, 7}})
def test_schedules_stand_still(trainer, name, frequency, poison):
    batches = list(data(12, size=0.1))
    poisoned = Recorded(SCHEDULES[name], frequency=frequency, poison=poison)
    trainer(GradientClipping(1.0)).fit(poisoned, DataLoader(batches, batch_size=None))
    clean = Recorded(SCHEDULES[name], frequency=frequency)
    kept = [batch for number, batch in enumerate(batches) if number not in poison]
    trainer(GradientClipping(1.0)).fit(clean, DataLoader(kept, batch_size=None))
    assert poisoned.rates == clean.rates


def test_schedules_are_held_for_skipped_windows(trainer):
    batches = list(data(12, size=0.1))
    poisoned = Recorded(SCHEDULES["OneCycle"], frequency=3, poison={4})
    trainer(GradientClipping(1.0), accumulate_grad_batches=3).fit(poisoned, DataLoader(batches, batch_size=None))
    clean = Recorded(SCHEDULES["OneCycle"], frequency=3)
    trainer(GradientClipping(1.0), accumulate_grad_batches=3).fit(clean, DataLoader(batches[:3] + batches[6:], batch_size=None))
    assert poisoned.rates[-1] == clean.rates[-1]


def test_schedules_of_epochs_and_plateaus_are_left_to_lightning(trainer):
    for interval, schedule in (("epoch", SCHEDULES["Step"]), ("epoch", O.lr_scheduler.ReduceLROnPlateau)):
        rates = []
        for poison in (set(), {1}):
            module = Recorded(schedule, interval, poison=poison)
            trainer(GradientClipping(1.0), max_epochs=4).fit(module, data(4, size=0.1))
            rates.append(module.rates[-1])
        assert rates[0] == rates[1]


def test_schedules_advance_if_they_are_not_held(trainer):
    guard = NonFiniteGuard(hold_schedulers=False)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    module = Recorded(SCHEDULES["Step"], poison={2}, net=net)
    trainer(guard).fit(module, data(6, size=0.1))
    assert net[1].num_batches_tracked == 5
    assert len({rate for rate, _ in module.rates}) == 3


class Later(Callback):
    """Adds a schedule in the middle of an epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 6:
            schedule = StepLR(trainer.optimizers[0], 1, 0.5)
            trainer.strategy.lr_scheduler_configs.append(LRSchedulerConfig(schedule, interval="step", frequency=4))


class WithoutSchedule(Recorded):
    """Has none to begin with."""

    def configure_optimizers(self):
        return super().configure_optimizers()["optimizer"]


def test_a_schedule_that_is_added_later_is_held_for_one_batch(trainer):
    """The batches before count, although there was nothing to hold."""
    changes = []
    for poison in (set(), {6}):
        module = WithoutSchedule(SCHEDULES["Step"], poison=poison)
        trainer(Later(), GradientClipping(1.0)).fit(module, DataLoader(list(data(14, size=0.1)), batch_size=None))
        rates = [rate for rate, _ in module.rates]
        changes.append([place for place in range(1, len(rates)) if rates[place] != rates[place - 1]])
    assert changes[0]
    # one batch later, of which the skipped one is not among the rates
    assert changes[1] == changes[0]
