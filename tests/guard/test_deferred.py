"""Steps that are decided on the device."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Subset

from clip_callbacks import (
    ClipRule,
    GradientClipping,
    GradientNormMonitor,
    NonFiniteGradientError,
    NonFiniteGuard,
    clip_step,
)
from clip_callbacks.core.fused import starts_momentum
from tests.helpers.fused import FUSED, network, on_device, state_of, two_parameters
from tests.helpers.matrix import matrix
from tests.helpers.records import record_of
from tests.helpers.training import TRUSTING, Poisoned, Regression, assert_same_bits, data, scaled, weights

# Decided on the device


@matrix(name=list(FUSED), poisoned=[(0,), (3,), (0, 1), (4, 5), (7,)], poison=[math.nan, math.inf])
def test_a_deferred_skip_never_happened(trainer, name, poisoned, poison):
    """Bit for bit the run that never saw the bad batches, batch statistics too."""

    def net():
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    guard = on_device()
    bad = network(name, poison=dict.fromkeys(poisoned, poison), net=net())
    torch.manual_seed(1)
    bad.net = net()
    fit = trainer(guard, GradientClipping(0.5))
    with pytest.warns(RuntimeWarning, match="the step is skipped"):
        fit.fit(bad, data(8))

    clean = network(name, net=net())
    torch.manual_seed(1)
    clean.net = net()
    everything = data(8).dataset
    good = [row for row in range(len(everything)) if row // 4 not in poisoned]
    other = trainer(on_device(), GradientClipping(0.5))
    other.fit(clean, DataLoader(Subset(everything, good), batch_size=4))

    assert_same_bits(weights(bad), weights(clean))
    assert_same_bits(list(bad.buffers()), list(clean.buffers()))
    assert_same_bits(state_of(fit), state_of(other))
    assert guard.skipped_steps == len(poisoned)


def test_the_first_step_of_momentum_is_decided_on_the_host():
    parameters, optimizer = two_parameters(torch.optim.SGD, momentum=0.9)
    assert starts_momentum(optimizer)
    optimizer.step()
    assert not starts_momentum(optimizer)
    for parameter in parameters:
        parameter.grad = None
    assert not starts_momentum(torch.optim.SGD(parameters, lr=0.1, fused=True))


def test_the_verdict_is_known_one_step_later_or_when_asked_for(trainer):
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(guard.state_dict()["counters"][0]["skipped"] if trainer.global_step == 6 else guard.skipped_steps_of(0))

    guard = on_device()
    with pytest.warns(RuntimeWarning) as caught:
        trainer(guard, GradientClipping(0.5), Watch(), log_every_n_steps=100).fit(
            network("AdamW", poison={1: math.nan, 5: math.nan}), data(8)
        )
    assert seen == [0, 0, 1, 1, 1, 2, 2, 2]
    messages = [str(w.message) for w in caught if "Non-finite" in str(w.message)]
    assert [message.split(":")[0] for message in messages] == [
        f"Non-finite gradients at step {step}, epoch 0, batch {step}, rank 0" for step in (1, 5)
    ]
    assert "Stage: the loss is non-finite" in messages[0]
    assert "net.0.weight [8, 4]: norm nan" in messages[0]


def test_logged_values_are_those_of_the_step(trainer, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logs = []
    for deferred in (True, False):
        logger = CSVLogger(tmp_path, version=str(deferred))
        family = [NonFiniteGuard(deferred=deferred), GradientClipping(0.5), GradientNormMonitor()]
        with pytest.warns(RuntimeWarning, match="skipped"):
            trainer(*family, logger=logger, log_every_n_steps=2, max_epochs=2).fit(network("AdamW", poison={4: math.nan}), data(9))
        logs.append((tmp_path / "lightning_logs" / str(deferred) / "metrics.csv").read_text())
    assert logs[0] == logs[1]


def test_a_streak_of_deferred_bad_steps_stops_the_run(trainer):
    guard = on_device(max_consecutive=3)
    fit = trainer(guard)
    with pytest.raises(NonFiniteGradientError, match=r"at step 4.*bad step 3 in a row"), pytest.warns(RuntimeWarning):
        fit.fit(network("SGD", poison=dict.fromkeys(range(2, 20), math.nan)), data(12))
    assert fit.global_step == 5, "learnt one step later; the parameters are as they were before the first"


def test_a_streak_at_the_end_is_not_lost(trainer):
    with pytest.raises(NonFiniteGradientError, match="bad step 2 in a row"), pytest.warns(RuntimeWarning):
        trainer(on_device(max_consecutive=2)).fit(network("SGD", poison={6: math.nan, 7: math.nan}), data(8))


def test_resume_counts_deferred_skips(trainer, tmp_path):
    fit = trainer(on_device(), GradientClipping(0.5))
    with pytest.warns(RuntimeWarning, match="skipped"):
        fit.fit(network("AdamW", poison={7: math.nan}), data(8))
    fit.save_checkpoint(tmp_path / "end.ckpt")
    guard = on_device()
    trainer(guard, GradientClipping(0.5), max_epochs=2).fit(network("AdamW"), data(8), ckpt_path=tmp_path / "end.ckpt", **TRUSTING)
    assert guard.skipped_steps == 1


@pytest.mark.parametrize(
    ("family", "optimizer", "reason"),
    [
        ([GradientClipping(1.0, scope="layer")], {"fused": True}, "more than one factor"),
        ([GradientClipping(1.0, clip_value=0.1)], {"fused": True}, "more than one factor"),
        ([], {"foreach": True}, "is not fused"),
        ([], {"fused": True, "schedule": True}, "hold_schedulers"),
    ],
)
def test_what_cannot_be_deferred_is_refused_if_asked_for_and_decided_at_once_if_not(trainer, family, optimizer, reason):
    class Scheduled(Regression):
        def configure_optimizers(self):
            made = super().configure_optimizers()
            return {"optimizer": made, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LinearLR(made), "interval": "step"}}

    schedule = optimizer.pop("schedule", False)
    make = Scheduled if schedule else Regression
    with pytest.raises(ValueError, match=f"`deferred` cannot be True here: .*{reason}"):
        trainer(on_device(), *family).fit(make(torch.optim.AdamW, **optimizer), data(3))
    trainer(NonFiniteGuard(), *family).fit(make(torch.optim.AdamW, **optimizer), data(3))
    optimizer["schedule"] = schedule


@pytest.mark.parametrize("policy", ["raise", "zero"])
def test_policies_that_look_first_are_not_deferred(trainer, policy):
    with pytest.raises(
        ValueError, match="`deferred` cannot be True here: the guard must know of bad gradients before the step is taken"
    ):
        trainer(on_device(policy)).fit(network("AdamW"), data(3))


def test_clip_step_refuses_what_it_cannot_defer():
    _, optimizer = two_parameters()
    with pytest.raises(ValueError, match="one factor for all gradients"):
        clip_step(optimizer, rules=[ClipRule(1.0, "parameter")], fused=optimizer, deferred=True)
    with pytest.raises(ValueError, match="only a fused optimizer can skip a step"):
        clip_step(optimizer, deferred=True)
    with pytest.raises(ValueError, match="only a fused optimizer can skip a step"):
        clip_step(optimizer, fused=optimizer, nonfinite="zero", deferred=True)


@pytest.mark.parametrize("size", [0.0, 1.0, 1e-3, math.nan])
def test_deferred_without_an_optimizer_multiplies_and_leaves_bad_gradients_alone(size):
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), size)
    expected = torch.full((3,), size) * (0.1 / (math.sqrt(3) * size + 1e-6) if size == 1.0 else 1.0)
    report, _ = clip_step([parameter], rules=[ClipRule(0.1)], nonfinite="ignore", deferred=True)
    torch.testing.assert_close(parameter.grad, expected, equal_nan=True)
    assert bool(record_of(report).finite) is math.isfinite(size)
    assert 0 <= report.clip_coef <= 1


class Veto(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if pl_module.batch_idx in (1, 4):
            raise KeyError("not now")


@pytest.mark.parametrize("deferred", [False, True])
def test_a_step_that_a_later_callback_prevented_leaves_nothing_behind(trainer, deferred):
    class Manual(Regression):
        def __init__(self, **options):
            super().__init__(torch.optim.AdamW, lr=0.1, **options)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.batch_idx = batch_idx
            self.zero_grad()
            self.manual_backward(self.loss(batch, batch_idx) * (1.0 if batch_idx in (0, 1, 4) else 1e-3))
            with contextlib.suppress(KeyError):
                self.optimizers().step()

    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        module = Manual(fused=fused)
        trainer(GradientClipping(0.1), NonFiniteGuard(deferred=deferred and fused), Veto()).fit(module, data(8))
        results.append(weights(module))
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path:UserWarning")  # Lightning looks for a checkpoint of its own
def test_a_pending_verdict_is_in_the_checkpoint_that_an_exception_leaves(trainer, tmp_path):
    class Bomb(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 5:
                raise KeyError("boom")

    guard = on_device()
    family = [OnExceptionCheckpoint(tmp_path, filename="last"), guard, GradientClipping(0.5), Bomb()]
    with pytest.raises(KeyError), pytest.warns(RuntimeWarning, match="at step 5"):
        trainer(*family, log_every_n_steps=100, enable_checkpointing=True).fit(network("AdamW", poison={5: math.nan}), data(8))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][guard.state_key]
    assert saved["counters"][0]["skipped"] == 1


def test_an_optimizer_replaced_in_mid_epoch_loses_no_verdict(trainer):
    class Replacing(Poisoned):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 4:
                old = self.trainer.optimizers[0]
                self.old = old
                self.trainer.optimizers = [torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)]

    guard = on_device()
    module = Replacing({3: math.nan, 6: math.nan}, optimizer=torch.optim.AdamW, fused=True)
    with pytest.warns(RuntimeWarning, match="the step is skipped"):
        trainer(guard, GradientClipping(0.01), log_every_n_steps=100).fit(module, data(8))
    assert guard.skipped_steps == 2
    assert not {"grad_scale", "found_inf"} & set(vars(module.old))
    assert not module.old._optimizer_step_pre_hooks


def test_counts_are_up_to_date_when_asked_for(trainer):
    seen = []

    class Ask(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append((guard.skipped_steps, guard.overflowed_steps))

    guard = on_device()
    with pytest.warns(RuntimeWarning, match="the step is skipped"):
        trainer(guard, Ask(), log_every_n_steps=100, **scaled(init_scale=2.0**20)).fit(
            network("AdamW", poison={9: math.nan}), data(12, size=1.0)
        )
    assert seen[:3] == [(0, 1), (0, 2), (0, 3)]
    assert [skipped for skipped, _ in seen] == [0] * 9 + [1] * 3
    assert seen[-1] == (1, guard.overflowed_steps)


def test_a_step_of_a_window_is_logged_once(trainer, tmp_path):
    """And not in the micro-batches before it, where its own report does not exist yet."""
    rows = []
    for deferred in (False, True):
        csv = CSVLogger(tmp_path, version=f"deferred_{deferred}")
        callbacks = [NonFiniteGuard(deferred=deferred), GradientClipping(5.0), GradientNormMonitor(log_statistics=True)]
        torch.manual_seed(0)
        module = Regression(torch.optim.AdamW, lr=1e-3, fused=True)
        trainer(*callbacks, logger=csv, accumulate_grad_batches=2, log_every_n_steps=2).fit(module, data(12))
        rows.append(pd.read_csv(Path(csv.log_dir) / "metrics.csv"))
    assert rows[1][rows[1]["grad/total_norm"].notna()]["step"].tolist() == [1, 3, 5]
    pd.testing.assert_frame_equal(rows[0], rows[1])
