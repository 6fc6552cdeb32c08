"""A metric of a bad loss is lost for the epoch: the warning about the bad step names the callbacks that act upon it."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MeanMetric, MeanSquaredError

from clip_callbacks import GradientClipping, NonFiniteGuard
from clip_callbacks.html_report.diagnosis import diagnose
from tests.helpers.logs import read, texts
from tests.helpers.training import Poisoned, data

LOST = "train_loss, as the module logs it, is non-finite until the epoch ends: then "


class Logging(Poisoned):
    """Logs its loss in one way or another."""

    def __init__(self, factors, *, plateau=False, **how):
        super().__init__(factors)
        self.how, self.plateau = {"on_step": False, "on_epoch": True} | how, plateau

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch, batch_idx)
        self.log_loss(loss, batch)
        return loss

    def log_loss(self, loss, batch):
        self.log("train_loss", loss, **self.how)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if not self.plateau:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"}}


def reports(fit, module):
    """The first line of each warning about a bad step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit.fit(module, data(4))
    return [str(w.message).splitlines()[0] for w in caught if "Non-finite gradients" in str(w.message)]


def test_early_stopping_that_ends_the_run_is_told_of_in_the_report_of_the_step(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    stopping = EarlyStopping("train_loss", patience=3)
    fit = trainer(stopping, GradientClipping(1.0), logger=csv, max_epochs=5)
    first, second = reports(fit, Logging({1: math.nan, 2: math.nan}))
    assert fit.current_epoch == 1, "stopped"
    assert first.endswith(f". {LOST}EarlyStopping stops the run (check_finite=True). Log the loss only where it is finite.")
    assert LOST not in second, "once in an epoch"
    (log,) = read(csv.log_dir).optimizer_logs
    assert f"From optimizer step 1 on: {LOST}EarlyStopping stops the run" in texts(diagnose(log, {}))


@pytest.mark.parametrize(
    ("module", "callback", "deed"),
    [
        (Logging({1: math.inf}), ModelCheckpoint(monitor="train_loss"), "ModelCheckpoint ranks the epoch as the worst one"),
        (Logging({1: math.nan}, plateau=True), NonFiniteGuard(), "ReduceLROnPlateau counts an epoch without improvement"),
        (Logging({1: math.nan}, on_step=True), EarlyStopping("train_loss_epoch"), "EarlyStopping stops the run"),
        (Logging({1: math.nan}, reduce_fx="max"), EarlyStopping("train_loss"), "EarlyStopping stops the run"),
    ],
    ids=["checkpoint", "plateau", "forked", "maximum"],
)
def test_whoever_acts_on_it_is_named(trainer, module, callback, deed):
    is_checkpoint = isinstance(callback, ModelCheckpoint)
    (line,) = reports(trainer(callback, GradientClipping(1.0), enable_checkpointing=is_checkpoint), module)
    assert LOST + deed in line


class Careful(Logging):
    def log_loss(self, loss, batch):
        if loss.isfinite():
            super().log_loss(loss, batch)


class Metered(Logging):
    """Hands a metric of torchmetrics to ``log``."""

    def __init__(self, factors, metric):
        super().__init__(factors)
        self.metric = metric

    def log_loss(self, loss, batch):
        if isinstance(self.metric, MeanMetric):
            self.metric(loss)
        else:
            self.metric(loss * self.net(batch[0]), batch[1])
        self.log("train_loss", self.metric, on_step=False, on_epoch=True)


@pytest.mark.parametrize("metric", [None, MeanMetric(nan_strategy="ignore")], ids=["finite only", "torchmetrics"])
def test_who_logs_finite_losses_only_is_told_of_nothing_and_goes_on(trainer, metric):
    module = Careful({1: math.nan}) if metric is None else Metered({1: math.nan}, metric)
    fit = trainer(EarlyStopping("train_loss", patience=3), GradientClipping(1.0), max_epochs=2)
    (line,) = reports(fit, module)
    assert LOST not in line
    assert fit.current_epoch == 2


def test_a_metric_of_torchmetrics_that_holds_the_nan_is_found(trainer):
    fit = trainer(EarlyStopping("train_loss", patience=3), GradientClipping(1.0), max_epochs=2)
    (line,) = reports(fit, Metered({1: math.nan}, MeanSquaredError()))
    assert LOST in line
    assert fit.current_epoch == 1


@pytest.mark.parametrize(
    ("module", "callbacks"),
    [
        (Logging({1: math.nan}), []),
        (Logging({1: math.nan}), [EarlyStopping("train_loss", check_finite=False)]),
        (Logging({1: math.nan}, on_step=True, on_epoch=False), [EarlyStopping("train_loss")]),
    ],
    ids=["nobody looks", "unchecked", "of each step"],
)
def test_nothing_is_said_where_nothing_comes_of_it(trainer, module, callbacks):
    (line,) = reports(trainer(*callbacks, GradientClipping(1.0)), module)
    assert LOST not in line


def test_a_dropped_micro_batch_says_so_too(trainer):
    fit = trainer(EarlyStopping("train_loss"), NonFiniteGuard(level="microbatch"), accumulate_grad_batches=2)
    (line,) = reports(fit, Logging({1: math.nan}))
    assert "the micro-batch is dropped from its window. " + LOST in line
