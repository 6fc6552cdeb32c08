"""States of limits follow their blocks: over steps that do not count, changes of an optimizer, and resumed runs."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping
from torch import nn

from clip_callbacks import (
    ClipRule,
    EmaLimit,
    GradientClipping,
    Limit,
    LinearLimit,
    NonFiniteGuard,
    QuantileLimit,
    TightestLimit,
    WarmupLimit,
    ZScoreLimit,
    clip_step,
)
from clip_callbacks.core.blocks import SCOPES
from tests.helpers.laws import NAMED, gradients, run, with_gradients
from tests.helpers.training import SAFELY, Poisoned, Regression, data


def state_of(clipping, rule="rule_1"):
    return clipping.state_dict()["limits"][0][rule]


def saved(trainer, tmp_path, *rules):
    fit = trainer(GradientClipping(rules=list(rules)))
    fit.fit(Regression(), data(4))
    fit.save_checkpoint(tmp_path / "a.ckpt")


def resume(trainer, tmp_path, *rules):
    clipping = GradientClipping(rules=list(rules))
    trainer(clipping, max_epochs=2).fit(Regression(), data(4), ckpt_path=tmp_path / "a.ckpt", **SAFELY)
    return clipping


def test_numbers_of_a_limit_may_change(trainer, tmp_path):
    before, now = (WarmupLimit(limit, steps=3, warmup_limit=1.0) for limit in (ZScoreLimit(2.0), ZScoreLimit(3.0, decay=0.9)))
    saved(trainer, tmp_path, ClipRule(before, "unit"), ClipRule(1.0))
    clipping = resume(trainer, tmp_path, ClipRule(now, "unit"), ClipRule(2.0))
    assert state_of(clipping)["state"]["steps"].item() == 8
    assert state_of(clipping)["state"]["limit.count"].max().item() == 8


class Grouped(Regression):
    """A network with one parameter group for each layer, in a given order."""

    def __init__(self, *order):
        super().__init__(net=nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)))
        self.order = order

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": list(self.net[place].parameters())} for place in self.order], lr=0.01)


def test_groups_are_known_by_their_parameters(trainer, tmp_path):
    first = GradientClipping(ZScoreLimit(), scope="group")
    fit = trainer(first)
    fit.fit(Grouped(0, 1), data(4))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    second = GradientClipping(ZScoreLimit(), scope="group")
    fit = trainer(second, max_epochs=1)
    fit.fit(Grouped(1, 0), data(4), ckpt_path=tmp_path / "a.ckpt", **SAFELY)
    means = [state_of(clipping)["state"]["mean"].tolist() for clipping in (first, second)]
    assert means[1] == means[0][::-1]
    assert means[0][0] != means[0][1]


def test_rules_are_known_by_their_names_and_parameters(trainer, tmp_path):
    def rules(*pairs):
        return [ClipRule(ZScoreLimit(), include=params, name=name) for name, params in pairs]

    fit = trainer(first := GradientClipping(rules=rules(("low", r"net\.0"), ("high", r"net\.1"))))
    fit.fit(Grouped(0, 1), data(4))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    second = GradientClipping(rules=rules(("high", r"net\.1"), ("low", r"net\.0")))
    trainer(second).fit(Grouped(0, 1), data(4), ckpt_path=tmp_path / "a.ckpt", **SAFELY)
    for name in ("low", "high"):
        assert torch.equal(state_of(second, name)["state"]["mean"], state_of(first, name)["state"]["mean"])


def test_rules_that_exchange_their_parameters_carry_over_the_states_of_the_parameters(trainer, tmp_path):
    def rules(low, high):
        return [ClipRule(ZScoreLimit(), include=low, name="low"), ClipRule(ZScoreLimit(), include=high, name="high")]

    fit = trainer(first := GradientClipping(rules=rules(r"net\.0", r"net\.1")))
    fit.fit(Grouped(0, 1), data(4))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    second = GradientClipping(rules=rules(r"net\.1", r"net\.0"))
    trainer(second).fit(Grouped(0, 1), data(4), ckpt_path=tmp_path / "a.ckpt", **SAFELY)
    assert torch.equal(state_of(second, "low")["state"]["mean"], state_of(first, "high")["state"]["mean"])


class Constant(Regression):
    """A network of two layers whose gradients stay the same: each entry of the i-th parameter has the gradient 10 ** i."""

    def __init__(self, *held):
        super().__init__(net=nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))
        self.held = held or (range(4),)
        self.automatic_optimization = len(self.held) == 1

    def training_step(self, batch, batch_idx):
        loss = sum(10.0**place * parameter.sum() for place, parameter in enumerate(self.parameters()))
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def configure_optimizers(self):
        parameters = list(self.parameters())
        return [torch.optim.SGD([parameters[place] for place in places], lr=0.0) for places in self.held]


def of(include=None, name=None, limit=None):
    return ClipRule(limit or ZScoreLimit(), include=include, name=name)


MOVES = {
    "in another order": ([of(), of("weight")], [of("weight"), of()], []),
    "three in another order": ([of(), of("weight"), of("bias")], [of("bias"), of(), of("weight")], []),
    "around one without a state": ([of(), of(limit=1e9), of("weight")], [of("weight"), of(limit=1e9), of()], []),
    "the first one fewer": ([of(), of("weight"), of("bias")], [of("weight"), of("bias")], []),
    "the last one fewer": ([of(), of("weight"), of("bias")], [of(), of("weight")], []),
    "one more in front": ([of(), of("weight")], [of("bias"), of(), of("weight")], ["rule_1"]),
    "one more at the end": ([of(), of("weight")], [of(), of("weight"), of("bias")], ["rule_3"]),
    "named from now on": ([of(), of("weight")], [of("weight", "low"), of(name="high")], []),
    "no longer named": ([of(name="high"), of("weight", "low")], [of("weight"), of()], []),
    "named, in another order": ([of(name="high"), of("weight", "low")], [of("weight", "low"), of(name="high")], []),
    "one named, in another order": ([of(), of("weight", "low")], [of("weight", "low"), of()], []),
}


@pytest.mark.parametrize("scope", ["global", "group", "layer", "parameter", "unit"])
@pytest.mark.parametrize("move", MOVES)
def test_rules_may_change_places(trainer, tmp_path, move, scope):
    """Blocks tell which rule is which, and a state that has been known stays known; gradients of another rule have other norms."""
    before, after, new = MOVES[move]
    before, after = ([replace(rule, scope=scope) for rule in rules] for rules in (before, after))
    fit = trainer(GradientClipping(rules=before))
    fit.fit(Constant(), data(4))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    resumed, fresh = GradientClipping(rules=after), GradientClipping(rules=after)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(resumed, max_epochs=2).fit(Constant(), data(4), ckpt_path=tmp_path / "a.ckpt", **SAFELY)
    assert any("Reset" in str(each.message) for each in caught) == bool(new)
    trainer(fresh).fit(Constant(), data(4))
    for rule, state in resumed.state_dict()["limits"][0].items():
        if not state["state"]:
            continue
        known, only = state["state"], fresh.state_dict()["limits"][0][rule]["state"]
        torch.testing.assert_close(known["mean"], only["mean"])
        assert set(known["count"].flatten().tolist()) == {4 if rule in new else 8}


def test_a_rule_of_fewer_blocks_goes_on_from_the_one_that_has_most_of_them(trainer, tmp_path):
    rules = [ClipRule(ZScoreLimit(), "parameter", include=include) for include in ("weight", r"net\.0", "weight|bias")]
    saved(trainer, tmp_path, *rules[::2])
    with pytest.warns(UserWarning, match="Discarded: the state of ZScoreLimit, which was the limit of rule_1"):
        assert state_of(resume(trainer, tmp_path, rules[1]))["state"]["count"].tolist() == [8, 8]


def test_a_shadow_becomes_the_rule_of_its_blocks(trainer, tmp_path):
    fit = trainer(GradientClipping(rules=[of(limit=EmaLimit())], shadow=[ZScoreLimit()]))
    fit.fit(Constant(), data(4))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    resumed = GradientClipping(rules=[of("weight"), of()])
    with pytest.warns(UserWarning, match="Reset: the limit of rule_1 .* Discarded: the state of EmaLimit"):
        trainer(resumed, max_epochs=2).fit(Constant(), data(4), ckpt_path=tmp_path / "a.ckpt", **SAFELY)
    assert [state_of(resumed, rule)["state"]["count"].item() for rule in ("rule_1", "rule_2")] == [4, 8]


class Growing(Constant):
    """Its optimizer takes on the first layer after two batches."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            self.trainer.optimizers[0].add_param_group({"params": list(self.net[0].parameters())})


@pytest.mark.parametrize(
    ("module", "counts"),
    [(Growing(range(2, 4)), {"net.0": 6, "net.1": 8}), (Constant(range(2), range(2, 4)), {"net.0": 8, "net.1": 8})],
    ids=["an optimizer that takes them on later", "another optimizer"],
)
def test_rules_in_another_order_have_the_states_of_all_their_blocks(trainer, tmp_path, module, counts):
    rules = [ClipRule(ZScoreLimit(), "parameter", include=include) for include in (None, "weight")]
    fit = trainer(GradientClipping(rules=rules))
    fit.fit(Constant(), data(4))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["optimizer_states"] = []  # which Lightning would give to optimizers that hold other parameters
    torch.save(checkpoint, tmp_path / "a.ckpt")
    resumed = GradientClipping(rules=rules[::-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(resumed, max_epochs=2).fit(module, data(4), ckpt_path=tmp_path / "a.ckpt", **SAFELY)
    for states in resumed.state_dict()["limits"].values():
        for held in states.values():
            assert held["state"]["count"].tolist() == [counts[name[:5]] for name in held["names"]]


def test_the_state_of_another_limit_in_a_plain_loop():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    _, state = clip_step([weight], rules=[ClipRule(ZScoreLimit())])
    with pytest.raises(ValueError, match="`state` must be that of these rules, got tensors of shapes"):
        clip_step([weight], state, rules=[ClipRule(QuantileLimit())])


def test_a_name_that_is_a_number_hides_no_other_rule(trainer):
    clipping = GradientClipping(rules=[ClipRule(ZScoreLimit(), name="2"), ClipRule(ZScoreLimit())])
    fit = trainer(clipping)
    fit.fit(Regression(), data(4))
    assert {"grad/2/total_norm", "grad/rule_2/total_norm"} <= set(fit.callback_metrics)
    assert list(clipping.state_dict()["limits"][0]) == ["2", "rule_2"]


class TwoParts(Regression):
    def __init__(self):
        super().__init__(net=nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)))


class Swap(TwoParts):
    """A network whose optimizer exchanges one layer for the other in the middle of the run."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 6:
            self.optimizers().param_groups[0]["params"] = list(self.net[1].parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), lr=0.01)


def test_new_parameters_begin_anew_and_known_ones_keep_their_state(trainer):
    clipping = GradientClipping(ZScoreLimit(), scope="parameter")
    trainer(clipping).fit(Swap(), data(10))
    held = state_of(clipping)
    assert list(held["names"]) == ["net.1.weight", "net.1.bias"]
    assert held["state"]["count"].tolist() == [4, 4]


class Thaw(BaseFinetuning):
    """Finetuning that begins with the second layer and adds the first one in the second epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


class Thawed(TwoParts):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


@pytest.mark.parametrize("scope", ["parameter", "unit", "layer"])
def test_states_survive_finetuning(trainer, scope):
    clipping = GradientClipping(QuantileLimit(window=30), scope=scope, shadow=[ZScoreLimit()])
    trainer(Thaw(), clipping, max_epochs=3).fit(Thawed(), data(6))
    for held in (state_of(clipping), clipping.state_dict()["shadows"][0]["ZScoreLimit"]):
        counts = dict(zip(names_of(held), held["state"]["count"].tolist(), strict=True))
        assert {counts[name] for name in counts if "net.1" in name} == {18}
        assert {counts[name] for name in counts if "net.0" in name} == {12}


def names_of(held):
    from clip_callbacks.core.units import UnitNames

    return list(UnitNames(*held["names"])) if isinstance(held["names"], tuple) else held["names"]


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_finetuned_run_resumes(trainer, tmp_path, ours_first):
    """BaseFinetuning restores its parameter groups at fit start, before or after our callback; the layer stays frozen."""

    def family():
        clipping = GradientClipping(ZScoreLimit(warmup=3), scope="parameter")
        return clipping, [clipping, Thaw()] if ours_first else [Thaw(), clipping]

    fit = trainer(*family()[1], max_epochs=2)
    fit.fit(Thawed(), data(6))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    clipping, callbacks = family()
    trainer(*callbacks, max_epochs=3).fit(Thawed(), data(6), ckpt_path=tmp_path / "a.ckpt", **SAFELY)
    held = state_of(clipping)
    counts = dict(zip(held["names"], held["state"]["count"].tolist(), strict=True))
    assert counts == {"net.1.weight": 18, "net.1.bias": 18, "net.0.weight": 6, "net.0.bias": 6}


@pytest.mark.parametrize("make", NAMED)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_zeroed_step_leaves_no_trace_either(make, scope):
    limit, states = make(1.0), {}
    for poisoned in (True, False):
        state = None
        for seed in range(4):
            if seed == 2 and poisoned:
                module = with_gradients(99, size=1e-6)
                module[0].weight.grad[0, 0] = math.nan
                rules = [ClipRule(limit, scope)]
                _, state = clip_step(module.named_parameters(), state, rules=rules, nonfinite="zero")
            _, state = run(with_gradients(seed), limit, scope, 2.0, state)
        states[poisoned] = state
    for left, right in zip(states[True], states[False], strict=True):
        assert all(torch.equal(left[key], right[key]) for key in right)


def test_lbfgs_takes_one_step_however_often_it_asks(trainer):
    clipping = GradientClipping(rules=[ClipRule(LinearLimit(2.0, 1.0, 100)), ClipRule(ZScoreLimit())])
    trainer(clipping).fit(Regression(optimizer=torch.optim.LBFGS, lr=0.1), data(6))
    assert state_of(clipping)["state"]["steps"].item() == 6
    assert state_of(clipping, "rule_2")["state"]["count"].item() == 6


def test_max_norm_is_no_metric_before_there_is_a_limit(trainer):
    fit = trainer(GradientClipping(ZScoreLimit(warmup=5)))
    fit.fit(Regression(), data(4))
    assert all(math.isfinite(value) for value in fit.callback_metrics.values())
    assert "grad/max_norm" not in fit.callback_metrics
    fit = trainer(GradientClipping(ZScoreLimit(warmup=5)), EarlyStopping("grad/max_norm", patience=3, strict=False), max_epochs=3)
    fit.fit(Regression(), data(4))
    assert fit.current_epoch == 3
    assert math.isfinite(fit.callback_metrics["grad/max_norm"])


@pytest.mark.filterwarnings("ignore:Spike:RuntimeWarning")
def test_a_skipped_spike_is_reported_alike_by_host_and_device(trainer):
    reports = []
    for deferred in (True, False):
        module = Poisoned({3: 1e6}, fused=True)
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        guard, clipping = NonFiniteGuard(skip_above=1000.0, deferred=deferred), GradientClipping(1.0, shadow=[0.5])
        found = []

        class Settled(Callback):
            def on_train_batch_end(self, *_, guard=guard, found=found):
                _ = guard.skipped_steps  # learns of a deferred step
                found.append(guard.last_report)

        trainer(guard, clipping, Settled()).fit(module, data(6))
        reports.append(found[3])
    left, right = reports
    assert left.skipped
    assert right.skipped
    for name in ("total_norm", "clipped_norm", "clip_coef", "max_norm", "coefficients", "limits"):
        torch.testing.assert_close(getattr(left, name), getattr(right, name))
    assert left.shadows == right.shadows == ()


class Broken(Limit):
    """A user's limit that divides zero by zero."""

    def step(self, blocks, state):
        return torch.full_like(blocks.norms, math.nan), state


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("deferred", [False, True])
def test_a_limit_that_is_nan_is_none(scope, deferred):
    if deferred and scope != "global":
        pytest.skip("local norms are decided on the host")
    module = with_gradients(0)
    before = gradients(module)
    clip_step(module.named_parameters(), rules=[ClipRule(Broken(), scope)], nonfinite="ignore", deferred=deferred)
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(module).items())


def test_sparse_gradients_of_one_dimension_are_one_unit():
    weight = nn.Parameter(torch.zeros(5))
    weight.grad = torch.tensor([0.0, 3.0, 0.0, 4.0, 0.0]).to_sparse()
    report, _ = clip_step({"w": weight}, rules=[ClipRule(1.0, "unit")])
    assert report.norms.tolist() == [5.0]
    torch.testing.assert_close(weight.grad.to_dense(), torch.tensor([0.0, 0.6, 0.0, 0.8, 0.0]))


def test_names_of_rules_and_kinds_of_arguments():
    with pytest.raises(ValueError, match="`name` must differ between rules, got rule_2, rule_2"):
        GradientClipping(rules=[ClipRule(name="rule_2"), ClipRule()])
    for name in ("total_norm", "..", 3, "a/b"):
        with pytest.raises(ValueError, match="`name` must consist of"):
            ClipRule(name=name)
    with pytest.raises(TypeError, match="`shadow` must be a list of limits and numbers, got 0.5"):
        GradientClipping(shadow=0.5)
    with pytest.raises(TypeError, match="`rules` must be a list of ClipRule, got ClipRule"):
        GradientClipping(rules=ClipRule(1.0))
    with pytest.raises(
        TypeError, match=r"`members` must be limits and numbers, got \[\[1.0, 2.0\]\]. Write TightestLimit\(limits="
    ):
        TightestLimit([1.0, 2.0])
    with pytest.raises(TypeError, match="`limits` must be a list of limits and numbers, got 1.0"):
        TightestLimit(limits=1.0)
    assert EmaLimit(max_norm="inf").max_norm == math.inf
    assert LinearLimit("10", "1e-1", 3) == LinearLimit(10.0, 0.1, 3)
