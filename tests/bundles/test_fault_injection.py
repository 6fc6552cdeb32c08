"""FaultInjection: rehearsals of a run's reaction to bad gradients."""

from __future__ import annotations

import copy
import logging
import math
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from clip_callbacks import AccumulationRescaling, FaultInjection, GradientNormMonitor, NonFiniteGuard
from tests.helpers.training import SAFELY, Regression, TwoNetworks, assert_same_bits, data, scaled, weights

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning", "ignore:Spike:RuntimeWarning")


@pytest.fixture(autouse=True)
def _allowed(monkeypatch):
    monkeypatch.setenv("CLIP_CALLBACKS_INJECT", "1")


class Gradients(Callback):
    """The gradients at each step, before the guard changes them if this callback comes first."""

    def __init__(self):
        self.at = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.at.append({name: parameter.grad.clone() for name, parameter in pl_module.named_parameters()})


def bad_entries(gradients):
    return {name: gradient.isfinite().logical_not().nonzero().tolist() for name, gradient in gradients.items()}


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_one_entry_of_one_parameter_at_one_step(trainer, kind):
    seen, faults = Gradients(), FaultInjection(kind, step=3, include=r"2\.weight")
    trainer(seen, faults, NonFiniteGuard()).fit(Regression(), data(6))
    found = [{name: entries for name, entries in bad_entries(each).items() if entries} for each in seen.at]
    assert found == [{}, {}, {}, {"net.2.weight": [[0, 0]]}, {}, {}]
    value = seen.at[3]["net.2.weight"][0, 0]
    assert value.isnan() if kind == "nan" else value == math.inf
    place = {"step": 3, "epoch": 0, "batch": 3, "rank": 0}
    assert faults.injected == [{"kind": kind, **place, "parameters": ["net.2.weight"]}]


def test_a_spike_multiplies(trainer):
    runs = []
    for callbacks in ([], [FaultInjection("spike", step=[1, 4], include="bias", exclude="2")]):
        torch.manual_seed(0)
        seen = Gradients()
        trainer(seen, *callbacks).fit(Regression(lr=0.0), data(6))
        runs.append(seen.at)
    for step, (plain, poisoned) in enumerate(zip(*runs, strict=True)):
        for name in plain:
            factor = 1e4 if step in {1, 4} and name == "net.0.bias" else 1.0
            assert torch.equal(poisoned[name], factor * plain[name])


def test_a_bad_loss_is_bad_in_value_and_gradient_and_is_told_as_one(trainer):
    seen, faults = Gradients(), FaultInjection("loss", step=2)
    with pytest.warns(RuntimeWarning, match=r"step 2, epoch 0, batch 2(.|\n)*Stage: the loss is non-finite"):
        trainer(seen, NonFiniteGuard(), faults).fit(Regression(), data(4))
    assert [all(gradient.isnan().all() for gradient in each.values()) for each in seen.at] == [False, False, True, False]
    assert faults.injected[0]["parameters"] == []


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["nan", "inf", "loss", "spike"])
def test_the_guard_skips_exactly_those_steps_whatever_the_order(trainer, kind, first):
    faults, guard = FaultInjection(kind, step=[2, 5]), NonFiniteGuard(skip_above=1e3)
    ours, clean = Regression(), Regression()
    clean.load_state_dict(ours.state_dict())
    trainer(*([faults, guard] if first else [guard, faults])).fit(ours, data(8))
    kept = [batch for number, batch in enumerate(data(8)) if number not in {2, 5}]
    trainer().fit(clean, torch.utils.data.DataLoader(kept, batch_size=None))
    assert_same_bits(weights(ours), weights(clean))
    assert guard.skipped_steps == len(faults.injected) == 2


def test_the_guard_names_the_parameter(trainer):
    with pytest.warns(RuntimeWarning, match=r"in 1 of 4 parameters(.|\n)*net\.0\.bias \[8\]: 1 NaN"):
        trainer(FaultInjection("nan", step=1, include=r"0\.bias"), NonFiniteGuard()).fit(Regression(), data(3))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["nan", "loss"])
def test_the_first_micro_batch_of_a_window_is_poisoned(trainer, kind, first):
    faults, guard = FaultInjection(kind, step=1), NonFiniteGuard(level="microbatch")
    family = [faults, guard] if first else [guard, faults]
    trainer(*family, AccumulationRescaling(), accumulate_grad_batches=3).fit(Regression(), data(9))
    assert (guard.dropped_micro_batches, guard.skipped_steps) == (1, 0)
    assert [injection["batch"] for injection in faults.injected] == [3]


def test_under_a_grad_scaler(trainer):
    faults, guard = FaultInjection("loss", step=[2, 3]), NonFiniteGuard()
    fit = trainer(faults, guard, **scaled(init_scale=1024.0))
    fit.fit(Regression(), data(6))
    assert guard.skipped_steps == 2
    assert fit.precision_plugin.scaler.get_scale() == 1024.0, "no loss scale would cure it"


def test_in_manual_optimization_steps_are_those_of_each_optimizer(trainer):
    faults, guard = FaultInjection("nan", step=5, include="discriminator"), NonFiniteGuard()
    fit = trainer(faults, guard, GradientNormMonitor())
    fit.fit(TwoNetworks(), data(6))
    assert (guard.skipped_steps_of(0), guard.skipped_steps_of(1)) == (0, 1)
    assert [(injection["step"], injection["batch"]) for injection in faults.injected] == [(5, 2)]


def test_sparse_gradients(trainer):
    class Bags(Regression):
        def loss(self, batch, batch_idx):
            return self.net(batch[0].abs().clamp(max=5).long()).mean()

    guard = NonFiniteGuard()
    module = Bags(torch.optim.SparseAdam, nn.EmbeddingBag(6, 1, sparse=True))
    trainer(FaultInjection("inf", step=1), FaultInjection("spike", step=2), guard).fit(module, data(4))
    assert guard.skipped_steps == 1


def test_each_strike_is_one_line_of_the_log(trainer, caplog):
    with caplog.at_level(logging.WARNING):
        trainer(FaultInjection("nan", step=1, include="weight"), NonFiniteGuard()).fit(Regression(), data(3))
        trainer(FaultInjection("loss", step=2), NonFiniteGuard()).fit(Regression(), data(3))
    lines = [record.getMessage() for record in caplog.records if "fault_injection" in record.name]
    assert sorted(lines[0].partition(" gradients of ")[2].rstrip(".").split(", ")) == ["net.0.weight", "net.2.weight"]
    assert lines[0].startswith("FaultInjection at step 1, epoch 0, batch 1, rank 0: nan into the gradients of net.")
    assert lines[1:] == ["FaultInjection at step 2, epoch 0, batch 2, rank 0: nan into the loss."]


def test_a_resumed_run_goes_on_with_what_was_injected(trainer, tmp_path):
    def made():
        return FaultInjection("spike", step=[3, 19, 20, 35])

    def steps(faults):
        return [injection["step"] for injection in faults.injected]

    whole, first, second = made(), made(), made()
    trainer(whole, max_epochs=2).fit(Regression(lr=0.0), data(20))
    assert steps(whole) == [3, 19, 20, 35]
    before = trainer(first, max_epochs=1)
    before.fit(Regression(lr=0.0), data(20))
    before.save_checkpoint(tmp_path / "middle.ckpt")
    fit = trainer(second, max_epochs=2)
    fit.fit(Regression(lr=0.0), data(20), ckpt_path=tmp_path / "middle.ckpt", **SAFELY)
    assert second.injected == whole.injected
    trainer(second, max_epochs=1).fit(Regression(lr=0.0), data(20))
    assert steps(second) == steps(first) == [3, 19], "another run"
    assert made().state_dict()["injected"] == []


def test_copies_go_on_by_themselves(trainer):
    faults = FaultInjection("spike", step=[2, 5])
    twin = copy.deepcopy(faults)
    for one in (faults, twin):
        trainer(one).fit(Regression(lr=0.0), data(20))
    assert faults.injected == twin.injected != []


@pytest.mark.parametrize("value", [None, "0", "yes"])
def test_without_leave_nothing_is_trained(trainer, monkeypatch, value):
    monkeypatch.delenv("CLIP_CALLBACKS_INJECT")
    if value:
        monkeypatch.setenv("CLIP_CALLBACKS_INJECT", value)
    module = Regression()
    before = weights(module)
    fit = trainer(FaultInjection("nan", step=0))
    with pytest.raises(RuntimeError, match="CLIP_CALLBACKS_INJECT must be 1 in the environment"):
        fit.fit(module, data(2))
    assert fit.global_step == 0
    assert_same_bits(weights(module), before)
    trainer(FaultInjection("nan", step=0)).validate(module, data(2), verbose=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "zero", "step": 1}, "`kind` must be one of nan, inf, spike, loss, got 'zero'"),
        ({"kind": "nan", "step": -1}, "`step` must be a whole number of at least 0, or a list of them, got -1"),
        ({"kind": "nan", "step": []}, "`step` must be a whole number"),
        ({"kind": "nan", "step": [1, True]}, "`step` must be a whole number"),
        ({"kind": "nan", "step": 1, "rank": -1}, "`rank` must be a whole number of at least 0, or None for all ranks, got -1"),
        ({"kind": "nan", "step": 1, "include": "("}, "` must be a regular expression, got '\\('"),
        ({"kind": "nan", "step": 1, "exclude": "("}, "`exclude` must be a regular expression, got '\\('"),
        ({"kind": "loss", "step": 1, "include": "x"}, "`include` must be None for the kind \"loss\", got 'x'"),
        ({"kind": "loss", "step": 1, "exclude": "x"}, "`exclude` must be None for the kind \"loss\", got 'x'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        FaultInjection(**options)


def test_refusals_at_fit_start(trainer):
    with pytest.raises(ValueError, match=r"` must match the name of a parameter, got 'net.0.wieght'.*net\.0\.weight"):
        trainer(FaultInjection("nan", step=1, include="net.0.wieght")).fit(Regression(), data(2))
    with pytest.raises(ValueError, match="`rank` must be below the number of ranks, 1, got 1"):
        trainer(FaultInjection("nan", step=1, rank=1)).fit(Regression(), data(2))


def test_it_can_be_sent_to_other_processes(trainer):
    injection = FaultInjection("spike", step=1)
    trainer(injection).fit(Regression(), data(3))
    again = pickle.loads(pickle.dumps(injection))
    assert not [value for value in injection.__getstate__().values() if isinstance(value, torch.Tensor)], (
        "shared memory may be gone"
    )
    assert again.state_dict() == injection.state_dict()
    assert again.state_key == injection.state_key


def test_steps_that_never_came_are_told(trainer, caplog, monkeypatch):
    monkeypatch.setenv("CLIP_CALLBACKS_INJECT", "1")
    with caplog.at_level("WARNING"):
        trainer(FaultInjection("spike", step=[1, 1000]), FaultInjection("spike", step=[1, 1000], rank=0)).fit(Regression(), data(4))
    told = [record.getMessage() for record in caplog.records if "did not poison" in record.getMessage()]
    assert told == ["FaultInjection did not poison step 1000: no backward pass began there. The run ends at step 4."] * 2
