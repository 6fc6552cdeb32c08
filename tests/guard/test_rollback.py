"""NonFiniteGuard(rollback=Rollback()): bad steps that do not end send the run back to its last good weights, bit for bit.

Copies are made before steps 0 and 3; steps 5, 6 and 7 are bad. The run must be one that batches 3 to 7 have never been part of.
"""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from clip_callbacks import (
    AccumulationRescaling,
    GradientClipping,
    NonFiniteGradientError,
    NonFiniteGuard,
    QuantileLimit,
    RobustZScoreLimit,
)
from tests.helpers.exact_skip import differences
from tests.helpers.matrix import matrix
from tests.helpers.members import O
from tests.helpers.rollback import BAD, BATCHES, LOST, SCHEDULES, Copies, Subject, fitted, rollback, without
from tests.helpers.training import SAFELY, data, limit_states, scaled

pytestmark = pytest.mark.filterwarnings(
    "ignore:Non-finite gradients:RuntimeWarning",
    "ignore:Spike:RuntimeWarning",
    "ignore:Every micro-batch:RuntimeWarning",
    "ignore:.*lr_scheduler.step.*:UserWarning",
)


OPTIMIZERS = {
    "SGD": (O.SGD, {}),
    "SGD momentum": (O.SGD, {"momentum": 0.9}),
    "SGD momentum fused": (O.SGD, {"momentum": 0.9, "fused": True}),
    "AdamW": (O.AdamW, {"foreach": True}),
    "AdamW fused": (O.AdamW, {"fused": True}),
    "Adagrad": (O.Adagrad, {}),
    "LBFGS": (O.LBFGS, {"max_iter": 4, "history_size": 3}),
    "LBFGS wolfe": (O.LBFGS, {"max_iter": 4, "history_size": 3, "line_search_fn": "strong_wolfe"}),
}


@matrix(
    slow=lambda schedule, name: name.startswith("LBFGS") and schedule not in {None, "Step"},
    schedule=[None, *SCHEDULES],
    name=list(OPTIMIZERS),
)
def test_the_run_is_one_that_the_batches_since_the_copy_were_never_part_of(trainer, name, schedule):
    if schedule == "OneCycle" and name in {"Adagrad", "SGD", "LBFGS", "LBFGS wolfe"}:
        pytest.skip("has no momentum to cycle")
    optimizer, options = OPTIMIZERS[name]
    options = options | {"optimizer": optimizer, "schedule": SCHEDULES.get(schedule)}
    guard = rollback()
    loader = data(BATCHES, batch_size=6)
    ours = fitted(trainer(guard, GradientClipping(QuantileLimit(0.5, window=5, warmup=2))), Subject(**options), loader)
    family = [NonFiniteGuard(), GradientClipping(QuantileLimit(0.5, window=5, warmup=2))]
    clean = fitted(trainer(*family), Subject({}, **options), without(loader, LOST))
    assert guard.rollbacks == 1
    assert guard.skipped_steps == 3
    assert differences(ours, clean) == []


class Transplant(Callback):
    """Saves the whole run before one batch, or starts from what another instance saved."""

    def __init__(self, at=None, start=None):
        self.at, self.start = at, start

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.at:
            schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
            optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
            self.start = deepcopy((pl_module.state_dict(), optimizers, schedules))

    def on_train_start(self, trainer, pl_module):
        if self.at is None:
            weights, optimizers, schedules = deepcopy(self.start)
            pl_module.load_state_dict(weights)
            for optimizer, state in zip(trainer.optimizers, optimizers, strict=True):
                optimizer.load_state_dict(state)
            for config, state in zip(trainer.lr_scheduler_configs, schedules, strict=True):
                config.scheduler.load_state_dict(state)


def test_the_run_is_one_that_starts_with_what_a_checkpoint_before_the_good_step_would_hold(trainer):
    options = {"optimizer": O.AdamW, "schedule": SCHEDULES["OneCycle"]}
    loader = data(BATCHES, batch_size=6)
    ours = fitted(trainer(rollback()), Subject(**options), loader)
    point = Transplant(at=3)
    fitted(trainer(point), Subject({}, **options), loader)
    later = fitted(trainer(Transplant(start=point.start)), Subject({}, **options), without(loader, range(8)))
    assert differences(ours, later) == []


@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_whatever_a_bad_step_meets_until_then(trainer, policy):
    loader = data(BATCHES, batch_size=6)
    ours = fitted(trainer(guard := rollback(policy=policy)), Subject(), loader)
    clean = fitted(trainer(), Subject({}), without(loader, LOST))
    assert differences(ours, clean) == []
    assert (guard.skipped_steps, guard.zeroed_steps) == ((3, 0) if policy == "skip" else (1, 2))


@pytest.mark.parametrize("hold_schedulers", [True, False])
def test_schedules_go_back_even_if_single_skips_leave_them(trainer, hold_schedulers):
    loader, schedule = data(BATCHES, batch_size=6), SCHEDULES["Step"]
    guard = rollback(hold_schedulers=hold_schedulers)
    ours = fitted(trainer(guard), Subject(schedule=schedule), loader)
    clean = fitted(trainer(), Subject({}, schedule=schedule), without(loader, LOST))
    assert differences(ours, clean) == []


@pytest.mark.parametrize("frequency", [2, 3, 4])
def test_schedules_that_step_now_and_then_count_on_from_the_copy(trainer, frequency):
    loader, options = data(BATCHES, batch_size=6), {"schedule": SCHEDULES["Step"], "frequency": frequency}
    ours = fitted(trainer(rollback()), Subject(**options), loader)
    clean = fitted(trainer(), Subject({}, **options), without(loader, LOST))
    assert differences(ours, clean) == []


@pytest.mark.parametrize("level", ["window", "microbatch"])
@pytest.mark.parametrize("bad", [{10, 12, 14}, {10, 11, 12, 13, 14, 15}])
def test_under_accumulation(trainer, level, bad):
    """Windows of two batches: 5, 6 and 7 are bad, in one micro-batch or in both."""
    loader = data(2 * BATCHES, batch_size=6)
    members = [rollback(level=level), AccumulationRescaling()]
    options = {"optimizer": O.AdamW, "schedule": SCHEDULES["Step"]}
    ours = fitted(trainer(*members, accumulate_grad_batches=2), Subject(dict.fromkeys(bad, math.nan), **options), loader)
    is_lost = level == "window" or len(bad) == 6
    assert members[0].rollbacks == is_lost
    if is_lost:
        clean = without(loader, range(6, 16))
        theirs = fitted(trainer(NonFiniteGuard(level=level), members[1], accumulate_grad_batches=2), Subject({}, **options), clean)
        assert differences(ours, theirs) == []


def test_windows_whose_micro_batches_all_weigh_nothing_count(trainer):
    guard = rollback(max_consecutive=2)
    weighed = AccumulationRescaling(weight=lambda batch: float(batch[2]))
    batches = [(*batch, float(number not in {5, 6})) for number, batch in enumerate(data(BATCHES, batch_size=6))]
    with pytest.warns(RuntimeWarning, match=r"weight 0 at step 6.*: bad step 2 in a row. The run returns .* before step 3"):
        ours = fitted(trainer(guard, weighed), Subject({}), DataLoader(batches, batch_size=None))
    clean = fitted(trainer(weighed), Subject({}), without(batches, {3, 4, 5, 6}))
    assert differences(ours, clean) == []


def test_spikes_count(trainer):
    loader = data(BATCHES, batch_size=6, size=1.0)
    guard = rollback(skip_above=RobustZScoreLimit(5.0, window=20, warmup=2))
    with pytest.warns(RuntimeWarning, match=r"Spike at step 7(.|\n)*returns to its state before step 3"):
        ours = fitted(trainer(guard), Subject(dict.fromkeys(BAD, 1e6)), loader)
    twin = NonFiniteGuard(skip_above=RobustZScoreLimit(5.0, window=20, warmup=2))
    clean = fitted(trainer(twin), Subject({}), without(loader, LOST))
    assert differences(ours, clean) == []
    (state,), (twin_state,) = limit_states(guard), limit_states(twin)
    assert differences(state, twin_state) == []


def test_the_loss_scale_goes_back_too(trainer):
    loader = data(BATCHES, batch_size=6, size=1.0)
    for options in ({}, {"fused": True}):
        module = {"optimizer": O.AdamW, **options}
        precision = {"init_scale": 1024.0, "growth_interval": 2}
        guard = rollback()
        ours = fitted(trainer(guard, **scaled(**precision)), Subject(dict.fromkeys(BAD, math.nan), **module), loader)
        clean = fitted(trainer(NonFiniteGuard(), **scaled(**precision)), Subject({}, **module), without(loader, LOST))
        assert guard.rollbacks == 1
        assert differences(ours, clean) == []


class Adversaries(Subject):
    """Two networks in manual optimization; user code that goes on after a rollback in mid-batch, with graphs made before it."""

    def __init__(self, factors=BAD, *, turn=0):
        super().__init__(factors)
        self.automatic_optimization, self.turn = False, turn
        self.second = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def training_step(self, batch, batch_idx):
        optimizers, factor = self.optimizers(), self.factors.get(batch_idx, 1.0)
        losses = [self.net(batch[0]).mean() + self.second(batch[0]).square().mean(), self.second(batch[0] + 1).square().mean()]
        for turn, (optimizer, loss) in enumerate(zip(optimizers, losses, strict=True)):
            optimizer.zero_grad()
            self.toggle_optimizer(optimizer)
            self.manual_backward(
                loss * (factor if turn == self.turn else 1.0), retain_graph=True, inputs=optimizer_parameters(optimizer)
            )
            self.untoggle_optimizer(optimizer)
            optimizer.step()
        for schedule in self.lr_schedulers():
            schedule.step()

    def configure_optimizers(self):
        optimizers = [O.AdamW(self.net.parameters(), lr=0.02), O.SGD(self.second.parameters(), lr=0.02, momentum=0.9)]
        return optimizers, [O.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in optimizers]


def optimizer_parameters(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize("turn", [0, 1])
def test_two_optimizers_by_hand_go_back_together(trainer, turn):
    loader = data(BATCHES, batch_size=6)
    guard = rollback(every_n_steps=6)
    ours = fitted(trainer(guard), Adversaries(turn=turn), loader)
    assert guard.rollbacks == 1
    # the first three batches take six steps: the copy is made before the fourth; of those that follow nothing is left
    clean = fitted(trainer(NonFiniteGuard()), Adversaries({}), without(loader, LOST))
    assert differences(ours, clean) == []


def test_no_copy_is_made_of_weights_that_another_optimizer_s_step_has_ruined(trainer):
    class Apart(Adversaries):
        def training_step(self, batch, batch_idx):
            for optimizer, net in zip(self.optimizers(), (self.net, self.second), strict=True):
                optimizer.zero_grad()
                self.manual_backward(net(batch[0]).square().mean())
                if batch_idx == 3 and net is self.second:  # a finite gradient, a learning rate beyond all bounds
                    optimizer.param_groups[0]["lr"] = 1e38
                optimizer.step()

    guard = rollback(every_n_steps=2)
    copies = Copies(guard)
    fit = trainer(guard, copies)
    fit.fit(Apart({}), data(10, batch_size=6))
    assert guard.rollbacks == 1
    assert copies.steps[:6] == [0, 2, 4, 6, 6, 6]
    assert all(tensor.isfinite().all() for tensor in fit.lightning_module.parameters())


def test_copies_come_at_the_first_good_step_and_then_every_so_many(trainer):
    guard = rollback(every_n_steps=3)
    copies = Copies(guard)
    trainer(guard, copies).fit(Subject({0: math.nan, 4: math.nan, 11: math.nan, 12: math.nan, 13: math.nan}), data(18))
    assert copies.steps == [None, *4 * [1], *3 * [5], *9 * [8], 17]


def test_there_is_one_copy_in_the_same_memory(trainer):
    class Rooms(Callback):
        seen: list[dict] = []  # noqa: RUF012

        def on_train_batch_end(self, *_):
            self.seen.append({path: copy.data_ptr() for path, copy in guard._part.rollback.run.memory._copies.items()})

    guard, module = rollback(every_n_steps=1), Subject({}, optimizer=O.AdamW)
    sizes = []

    class Size(Callback):
        def on_train_end(self, *_):
            sizes.append(guard._part.rollback.run.memory.nbytes)

    fit = trainer(guard, Rooms(), Size())
    fit.fit(module, data(4))
    assert Rooms.seen[1] == Rooms.seen[3]
    assert Rooms.seen[0].items() <= Rooms.seen[1].items(), "moments that come later get room; what was there keeps its own"
    parameters = sum(parameter.nbytes for parameter in module.parameters())
    steps = sum(state["step"].nbytes for state in fit.optimizers[0].state.values())
    assert sizes == [3 * parameters + steps]
    assert guard._part is None, "and is let go of in the end"


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_the_factor_times_what_they_would_be(trainer, name):
    """Two rollbacks to the same copy."""

    class Rates(Callback):
        def __init__(self):
            self.rates = []

        def on_train_batch_start(self, trainer, *_):
            group = trainer.optimizers[0].param_groups[0]
            self.rates.append(group["lr"])

    options = {"optimizer": O.AdamW, "schedule": SCHEDULES[name]}
    bad = dict.fromkeys((5, 6, 7, 9, 10, 11), math.nan)
    ours, clean = Rates(), Rates()
    guard = rollback(lr_factor=0.25, every_n_steps=6)
    loader = data(26)
    trainer(guard, ours).fit(Subject(bad, **options), loader)
    trainer(clean).fit(Subject({}, **options), without(loader, range(12)))
    assert guard.rollbacks == 2
    assert ours.rates[:6] == clean.rates[:6]
    torch.testing.assert_close(torch.tensor(ours.rates[8:9]), 0.25 * torch.tensor(clean.rates[:1]))
    torch.testing.assert_close(torch.tensor(ours.rates[12:]), 0.0625 * torch.tensor(clean.rates))


def test_a_learning_rate_that_groups_share_as_a_tensor_is_scaled_once_and_in_place(trainer):
    class Captured(Subject):
        def configure_optimizers(self):
            self.rate = torch.tensor(0.02)
            groups = [{"params": list(self.net[0].parameters())}, {"params": list(self.net[3].parameters())}]
            return O.AdamW(groups, lr=self.rate, fused=True)

    module = Captured()
    fit = trainer(rollback(lr_factor=0.5))
    fit.fit(module, data(9))
    assert [group["lr"] is module.rate for group in fit.optimizers[0].param_groups] == [True, True]
    assert module.rate == 0.01


def test_weights_that_a_step_has_ruined_are_good_again(trainer):
    class Huge(Subject):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 4:  # a finite gradient, a learning rate beyond all bounds
                self.trainer.optimizers[0].param_groups[0]["lr"] = 1e38

    with pytest.raises(NonFiniteGradientError, match="bad step 3 in a row"):
        trainer(NonFiniteGuard(max_consecutive=3)).fit(Huge({}), data(BATCHES, batch_size=6))
    guard, loader = rollback(), data(BATCHES, batch_size=6)
    ours = fitted(trainer(guard), Huge({}), loader)
    assert guard.rollbacks == 1
    assert differences(ours, fitted(trainer(), Subject({}), without(loader, LOST))) == []


def test_after_so_many_rollbacks_the_error_comes(trainer):
    guard = rollback(max_rollbacks=2, max_consecutive=2)
    with pytest.raises(
        NonFiniteGradientError, match=r"bad step 2 in a row \(max_consecutive=2, max_rollbacks=2, rollbacks so far: 2\)"
    ):
        trainer(guard).fit(Subject(dict.fromkeys(range(4, 20), math.nan)), data(20))
    assert guard.rollbacks == 2
    assert guard.skipped_steps == 6


def test_without_a_good_step_there_is_nothing_to_go_back_to(trainer):
    with pytest.raises(NonFiniteGradientError, match=r"bad step 3 in a row \(max_consecutive=3, and no good step to return to\)"):
        trainer(rollback()).fit(Subject(dict.fromkeys(range(20), math.nan)), data(8))


def test_one_warning_and_one_line_of_the_journal_tell_of_it(trainer, tmp_path, said):
    csv = CSVLogger(tmp_path)
    with pytest.warns(RuntimeWarning) as caught:
        trainer(rollback(lr_factor=0.5), logger=csv).fit(Subject(), data(BATCHES, batch_size=6))
    messages = [str(warning.message) for warning in caught if "Non-finite" in str(warning.message)]
    assert len(messages) == 3
    assert ["3 roll back" in message for message in messages] == [True, True, False]
    assert "at step 7, epoch 0, batch 7, rank 0: bad step 3 in a row. The run returns to its state before step 3, " in messages[-1]
    assert "with 0.5 times the learning rates of that time (rollback 1 of 3).\n" in messages[-1]
    assert "net.0.weight" in messages[-1]
    lines = [json.loads(line) for line in (Path(csv.log_dir) / "nonfinite_steps.jsonl").read_text().splitlines()]
    assert [line["policy"] for line in lines] == ["skip", "skip", "skip", "rollback"]
    place = {"step": 7, "epoch": 0, "batch": 7, "rank": 0, "policy": "rollback", "stage": "back to step 3", "logged_step": 7}
    assert lines[-1] == place | {"rollback": 1, "back_to": 3, "lr_factor": 0.5}
    assert said[1:] == ["NonFiniteGuard: optimizer steps: 14, rollbacks: 1."]


def test_checkpoints_hold_the_count_and_not_the_copy(trainer, tmp_path):
    guard = rollback(max_consecutive=2, max_rollbacks=1)
    before = trainer(guard, max_epochs=1)
    before.fit(Subject({4: math.nan, 5: math.nan}), data(8))
    before.save_checkpoint(tmp_path / "middle.ckpt")
    resumed = rollback(max_consecutive=2, max_rollbacks=1)
    copies = Copies(resumed)
    with pytest.raises(NonFiniteGradientError, match="rollbacks so far: 1"):
        trainer(resumed, copies, max_epochs=2).fit(
            Subject({12: math.nan, 13: math.nan}), data(8), ckpt_path=tmp_path / "middle.ckpt", **SAFELY
        )
    assert copies.steps[0] == 8
    trainer(resumed).fit(Subject({}), data(2))
    assert resumed.rollbacks == 0, "another run"


def test_a_rollback_crosses_the_end_of_an_epoch(trainer):
    loader, schedule = data(6, batch_size=6), SCHEDULES["Step"]
    ours = fitted(trainer(rollback(), max_epochs=2), Subject(schedule=schedule), loader)
    clean = fitted(trainer(), Subject({}, schedule=schedule), without([*loader, *loader], LOST))
    assert differences(ours, clean) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number of at least 1, got 0"),
        ({"every_n_steps": 2.0}, "`every_n_steps` must be a whole number"),
        ({"max_rollbacks": 0}, "`max_rollbacks` must be a whole number of at least 1, got 0"),
        ({"max_rollbacks": True}, "`max_rollbacks` must be a whole number"),
        ({"lr_factor": 0.0}, "`lr_factor` must be above 0 and at most 1, got 0.0"),
        ({"lr_factor": 1.5}, "`lr_factor` must be above 0 and at most 1, got 1.5"),
        ({"lr_factor": math.nan}, "`lr_factor` must be above 0"),
        ({"policy": "raise"}, r"`rollback` must be None for the policy 'raise', got Rollback\(every_n_steps=3, "),
        ({"policy": "ignore"}, "`rollback` must be None for the policy 'ignore'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        rollback(**options)


@pytest.mark.parametrize("other", ["rollback", True, {"every_n_steps": 3}])
def test_only_a_rollback_is_taken(other):
    with pytest.raises(TypeError, match=r"`rollback` must be Rollback\(...\) or None, got "):
        NonFiniteGuard(rollback=other)


def test_steps_are_not_decided_on_the_device(trainer):
    with pytest.raises(ValueError, match=r"`deferred` cannot be True here: rollback=Rollback\(...\), which must know"):
        trainer(rollback(deferred=True)).fit(Subject(optimizer=O.AdamW, fused=True), data(2))
