"""A run goes on from its checkpoint whatever the options are: what fits is kept by name, one warning names what does not."""

from __future__ import annotations

import math
import re
import warnings
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from clip_callbacks import (
    AccumulationRescaling,
    ClipRule,
    FaultInjection,
    GradientClipping,
    GradientNoiseScale,
    GradientNormMonitor,
    NonFiniteGuard,
    QuantileLimit,
    RobustZScoreLimit,
    Rollback,
    TightestLimit,
    ZScoreLimit,
)
from tests.helpers.laws import ADAPTIVE
from tests.helpers.training import SAFELY, Poisoned, Regression, assert_same_bits, data, leaves

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")

OURS = "The checkpoint was saved with other options of the gradient callbacks."
LIGHTNINGS = "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided"


class Parts(Poisoned):
    """Two layers, each optimizer with some of them."""

    def __init__(self, *optimizers, bad=None):
        super().__init__({} if bad is None else {bad: math.nan}, net=nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)))
        self.automatic_optimization = len(optimizers) <= 1
        self.held = optimizers or ([0, 1],)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def configure_optimizers(self):
        return [torch.optim.SGD([p for place in places for p in self.net[place].parameters()], lr=0.01) for places in self.held]


class LoadsLate(SingleDeviceStrategy):
    """As strategies do that shard the module: after ``on_fit_start``."""

    restore_checkpoint_after_setup = True


def resumed(trainer, tmp_path, before, after, *, optimizers=((), ()), bad=1, by_lightning=0, **options):
    """Save a run of four batches, and go on for four; what is said, and the callbacks."""
    first = trainer(*before)
    first.fit(Parts(*optimizers[0], bad=bad), data(4))
    first.save_checkpoint(tmp_path / "a.ckpt")
    if len(optimizers[0]) != len(optimizers[1]):  # Lightning would give their states to the wrong ones
        checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
        checkpoint["optimizer_states"] = []
        torch.save(checkpoint, tmp_path / "a.ckpt")
    second = trainer(*after, max_epochs=2, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second.fit(Parts(*optimizers[1], bad=bad), data(4), ckpt_path=tmp_path / "a.ckpt", **SAFELY)
    told = [str(warning.message) for warning in caught]
    ours = [message.removeprefix(OURS).strip() for message in told if message.startswith(OURS)]
    assert sum(message.startswith(LIGHTNINGS) for message in told) == by_lightning
    assert len(ours) <= 1
    return ours[0].removesuffix(" All other state is restored.") if ours else ""


def clipping(max_norm=1.0, **options):
    return [GradientClipping(max_norm, **options)]


def rules(*each, **options):
    return [GradientClipping(rules=list(each), **options)]


Z, Q = ZScoreLimit(), QuantileLimit(window=10)
ANEW, FORGOTTEN = "Reset: {}.", "Discarded: {}."
RULE_1 = "the limit of rule_1"
CHANGES = {
    "another number": (clipping(1.0), clipping(0.5), ""),
    "a fixed limit to one that learns": (clipping(1.0), clipping(Q), ANEW.format(f"{RULE_1} (QuantileLimit)")),
    "and back": (clipping(Q), clipping(1.0), FORGOTTEN.format(f"the state of QuantileLimit, which was {RULE_1}")),
    "and to none": (clipping(Q), clipping(None), FORGOTTEN.format(f"the state of QuantileLimit, which was {RULE_1}")),
    "one that learns to another": (
        clipping(Z),
        clipping(TightestLimit(Q, 1.0)),
        (f"Reset: {RULE_1} (TightestLimit(QuantileLimit, FixedLimit)). Discarded: the state of ZScoreLimit, which was {RULE_1}."),
    ),
    "another scope": (
        clipping(Z, scope="layer"),
        clipping(Z, scope="group"),
        f"{ANEW.format(f'{RULE_1} (ZScoreLimit)')} {FORGOTTEN.format(f'the state of ZScoreLimit, which was {RULE_1}')}",
    ),
    "a rule more": (rules(ClipRule(Z)), rules(ClipRule(1.0), ClipRule(Z)), ""),
    "a rule fewer": (
        rules(ClipRule(1.0), ClipRule(Z), ClipRule(Q)),
        rules(ClipRule(Z)),
        FORGOTTEN.format("the state of QuantileLimit, which was the limit of rule_3"),
    ),
    "a shadow for another": (
        clipping(shadow=[Z]),
        clipping(shadow=[Q]),
        (
            "Reset: shadow QuantileLimit-window_10 (QuantileLimit). "
            "Discarded: the state of ZScoreLimit, which was shadow ZScoreLimit."
        ),
    ),
    "the shadow in force": (clipping(shadow=[Z]), clipping(Z), ""),
    "a threshold that learns": ([NonFiniteGuard()], [NonFiniteGuard(skip_above=Z)], ANEW.format("skip_above (ZScoreLimit)")),
    "a threshold that does not": (
        [NonFiniteGuard(skip_above=RobustZScoreLimit())],
        [NonFiniteGuard(skip_above=50.0)],
        FORGOTTEN.format("the state of RobustZScoreLimit, which was skip_above"),
    ),
    "a threshold of the loss on another scale": (
        [NonFiniteGuard(loss_above=RobustZScoreLimit())],
        [NonFiniteGuard(loss_above=RobustZScoreLimit(scale="linear"))],
        "Reset: loss_above (RobustZScoreLimit(linear)). Discarded: the state of RobustZScoreLimit, which was loss_above.",
    ),
    "a threshold of the loss that stays": (
        [NonFiniteGuard(loss_above=RobustZScoreLimit(), skip_above=50.0)],
        [NonFiniteGuard("warn", loss_above=RobustZScoreLimit(5.0))],
        "",
    ),
    "no threshold": (
        [NonFiniteGuard(skip_above=RobustZScoreLimit())],
        [NonFiniteGuard()],
        FORGOTTEN.format("the state of RobustZScoreLimit, which was skip_above"),
    ),
    "another norm": (
        [*clipping(Z), GradientNormMonitor()],
        [*clipping(Z, norm_type="inf"), GradientNormMonitor(norm_type="inf")],
        FORGOTTEN.format("all that was learned from norms of order 2; they have order inf now"),
    ),
    "a monitor more": (
        [NonFiniteGuard()],
        [NonFiniteGuard(), GradientNormMonitor()],
        ANEW.format("GradientNormMonitor{'scope': 'layer'}"),
    ),
    "rescaling more": ([NonFiniteGuard()], [AccumulationRescaling(), NonFiniteGuard()], ""),
    "another policy": ([NonFiniteGuard()], [NonFiniteGuard("zero", max_consecutive=3, level="window", hold_schedulers=False)], ""),
    "a rollback": ([NonFiniteGuard()], [NonFiniteGuard(rollback=Rollback(every_n_steps=1))], ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_fits_is_kept_and_one_warning_names_what_does_not(trainer, tmp_path, change):
    before, after, told = (deepcopy(each) for each in CHANGES[change])
    assert resumed(trainer, tmp_path, before, after) == told
    histories = [callback.state_dict()["history"] for callback in after]
    assert [history[0]["steps"] for history in histories if history] == [8]
    assert {callback.skipped_steps for callback in after} == {1}


def test_norms_of_another_order_are_not_mixed(trainer, tmp_path):
    before, after = (
        [GradientClipping(Z, norm_type=norm_type), GradientNormMonitor(norm_type=norm_type)] for norm_type in (1.0, math.inf)
    )
    resumed(trainer, tmp_path, before, after)
    clipping, monitor = after
    assert len(monitor.state_dict()["norms"][0]) == 4
    assert clipping.state_dict()["limits"][0]["rule_1"]["state"]["count"].item() == 4
    assert clipping.state_dict()["history"][0]["run_norms"]["counts"].sum() == 4
    assert clipping.state_dict()["history"][0]["steps"] == 8


COMPANIES = {
    "a guard comes": (clipping, lambda: [NonFiniteGuard(), *clipping()], 0, ""),
    "the guard goes": (lambda: [NonFiniteGuard(), *clipping()], clipping, 1, ""),
    "the guard comes back": (lambda: [*clipping(), NonFiniteGuard()], lambda: [NonFiniteGuard()], 1, ""),
    "the first goes": (lambda: [GradientNormMonitor(), *clipping()], clipping, 1, ""),
    "most go": (
        lambda: [AccumulationRescaling(), NonFiniteGuard(), *clipping()],
        lambda: [GradientNormMonitor(), NonFiniteGuard()],
        1,
        "Reset: GradientNormMonitor{'scope': 'layer'}.",
    ),
    "clipping comes": (
        lambda: [NonFiniteGuard()],
        lambda: [*clipping(ADAPTIVE), NonFiniteGuard()],
        0,
        "Reset: GradientClipping.",
    ),
    "the monitor is of another scope": (
        lambda: [GradientNormMonitor(), NonFiniteGuard()],
        lambda: [GradientNormMonitor("parameter"), NonFiniteGuard()],
        1,
        "Reset: GradientNormMonitor{'scope': 'parameter'}.",
    ),
}


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("company", COMPANIES)
def test_a_callback_more_or_fewer(trainer, tmp_path, company, is_late):
    """Counts and histories are those of the run, whoever has kept them."""
    before, after, by_lightning, told = COMPANIES[company]
    members = after()
    options = {"strategy": LoadsLate("cpu")} if is_late else {}
    assert resumed(trainer, tmp_path, before(), members, by_lightning=by_lightning, **options) == told
    assert members[0].state_dict()["history"][0]["steps"] == 8
    for callback in members:
        if isinstance(callback, NonFiniteGuard) or company.startswith("the guard"):
            assert callback.skipped_steps == 1
    for callback in members:
        if isinstance(callback, GradientNormMonitor):
            assert len(callback.state_dict()["norms"][0]) == (7 if "scope" in company else 4)


def test_counts_do_not_come_back_from_before_another_guard_counted(trainer, tmp_path):
    """A guard came, counted, and went: what is known is what it has counted last."""
    states = []
    for number, members in enumerate([clipping(), [NonFiniteGuard(), *clipping()], clipping()]):
        run = trainer(*members, max_epochs=number + 1)
        options = {"ckpt_path": tmp_path / f"{number - 1}.ckpt", **SAFELY} if number else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.fit(Poisoned({1: math.nan, 5: math.nan, 9: math.nan}), data(4), **options)
        run.save_checkpoint(tmp_path / f"{number}.ckpt")
        states.append([callback.skipped_steps for callback in members])
    assert states == [[1], [2, 2], [3]]


@pytest.mark.parametrize(
    ("optimizers", "told", "counts"),
    [
        (([[0], [1]], [[1]]), "Discarded: optimizer 0 (2 parameters: net.0.weight, ...).", [[8, 8]]),
        (([[0]], [[1], [0]]), "Reset: optimizer 0 (2 parameters: net.1.weight, ...).", [[4, 4], [8, 8]]),
        (([[0], [1]], [[1], [0]]), "", [[8, 8], [8, 8]]),
        (([[0, 1]], [[0], [1]]), "Reset: optimizer 1 (2 parameters: net.1.weight, ...).", [[8, 8], [8, 8]]),
        (([[0], [1]], [[0, 1]]), "Discarded: optimizer 1 (2 parameters: net.1.weight, ...).", [[8, 8, 8, 8]]),
    ],
)
def test_an_optimizer_more_or_fewer(trainer, tmp_path, optimizers, told, counts):
    """Optimizers are known by what they hold; blocks go along with their parameters."""

    def members():
        return [NonFiniteGuard(), GradientClipping(Z, scope="parameter"), GradientNormMonitor()]

    after = members()
    assert resumed(trainer, tmp_path, members(), after, optimizers=optimizers, bad=None) == told
    limits = after[1].state_dict()["limits"]
    assert [limits[index]["rule_1"]["state"]["count"].tolist() for index in sorted(limits)] == counts
    histories = after[0].state_dict()["history"]
    assert set(histories) == set(range(len(optimizers[1])))


def test_the_state_of_an_optimizer_that_is_no_more_is_dropped(trainer):
    guard = NonFiniteGuard()
    guard.load_state_dict(guard.state_dict() | {"counters": {0: {"skipped": 1}, 1: {"skipped": 5}}})
    with pytest.warns(UserWarning, match=r"Discarded: optimizer 1\."):
        trainer(guard).fit(Regression(), data(3))
    assert guard.skipped_steps == 1


def test_a_resume_that_fails_at_its_start_may_be_tried_again(trainer, tmp_path):
    """With the state as it was loaded, whatever that fit would have made of it."""
    optimizers = ([[0], [1]], [[1]])
    told = "Discarded: optimizer 0 (2 parameters: net.0.weight, ...)."
    callbacks = [GradientClipping(Z, scope="parameter"), NonFiniteGuard()]
    first = trainer(*callbacks)
    first.fit(Parts(*optimizers[0]), data(4))
    state = deepcopy(callbacks[0].state_dict())
    again = GradientClipping(rules=[ClipRule(Z, scope="parameter", include="nowhere")])
    again.load_state_dict(deepcopy(state))
    with pytest.raises(ValueError, match="nowhere"):
        trainer(again).fit(Parts(*optimizers[1]), data(4))
    assert_same_bits(leaves(again.state_dict()), leaves(state))
    again.rules = callbacks[0].rules
    with pytest.warns(UserWarning, match=re.escape(told)):
        trainer(again).fit(Parts(*optimizers[1]), data(4))
    assert again.state_dict()["limits"][0]["rule_1"]["state"]["count"].tolist() == [8, 8]


@pytest.mark.parametrize("make", [GradientClipping, NonFiniteGuard, GradientNormMonitor])
def test_what_an_earlier_version_did_not_save_begins_empty(trainer, tmp_path, make):
    whole, first = make(), make()
    trainer(whole, max_epochs=2).fit(Regression(), data(4))
    fit = trainer(first)
    fit.fit(Regression(), data(4))
    fit.save_checkpoint(tmp_path / "early.ckpt")
    checkpoint = torch.load(tmp_path / "early.ckpt", weights_only=False)
    (state,) = [state for state in checkpoint["callbacks"].values() if "history" in state]
    for key in ("loss_above", "skipped_batches", "vanished", "guard"):
        state.pop(key, None)
    state["history"][0].pop("epoch")
    torch.save(checkpoint, tmp_path / "early.ckpt")
    later = make()
    trainer(later, max_epochs=2).fit(Regression(), data(4), ckpt_path=tmp_path / "early.ckpt", **SAFELY)
    assert later.state_dict()["history"][0]["steps"] == whole.state_dict()["history"][0]["steps"] == 8


DAMAGES = [
    (GradientClipping, lambda state: state["limits"][0]["rule_1"].pop("kind"), "KeyError: 'kind'"),
    (GradientClipping, lambda state: state["limits"][0]["rule_1"]["state"].update(mean="three"), "'mean' must be a tensor"),
    (GradientClipping, lambda state: state["guard"].update(counters={"first": {}}), "invalid literal for int"),
    (GradientClipping, lambda state: state["history"][0].pop("steps"), "KeyError: 'steps'"),
    (GradientClipping, lambda state: state["history"][0].update(counts=[1]), "not enough values"),
    (GradientClipping, lambda state: state["history"][0].update(norms=[1.0]), "TypeError"),
    (GradientClipping, lambda state: state.update(history=[1]), "AttributeError"),
    (NonFiniteGuard, lambda state: state["counters"][0].update(skips=3), "unexpected keyword argument 'skips'"),
    (NonFiniteGuard, lambda state: state.update(skipped_batches=(1, 2)), "not enough values"),
    (GradientNormMonitor, lambda state: state["blocks"][0].update(clipped=None), "AttributeError"),
    (GradientNormMonitor, lambda state: state.update(norms={0: {"length": 64}}), "KeyError: 'segments'"),
    (GradientNormMonitor, lambda state: state.update(norms={0: {"length": 0, "segments": []}}), "must be at least 1, got 0"),
    (GradientNoiseScale, lambda state: state["noise"].update({0: [1.0]}), "must be a mapping"),
    (FaultInjection, lambda state: state.pop("last_step"), "KeyError: 'last_step'"),
]


@pytest.mark.parametrize(("kind", "damage", "wrong"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_where_it_is_loaded(trainer, monkeypatch, kind, damage, wrong):
    monkeypatch.setenv("CLIP_CALLBACKS_INJECT", "1")
    options = {GradientClipping: {"max_norm": ADAPTIVE}, FaultInjection: {"kind": "spike", "step": 1}}
    callback = kind(**options.get(kind, {}))
    trainer(callback, accumulate_grad_batches=2 if kind is GradientNoiseScale else 1).fit(Regression(), data(3))
    before = deepcopy(callback.state_dict())
    damaged = deepcopy(before)
    damage(damaged)
    contract = f"the checkpoint's state of {kind.__name__} must be what its state_dict() returned"
    with pytest.raises(ValueError, match=wrong) as refused:
        callback.load_state_dict(damaged)
    assert str(refused.value).startswith(contract)
    assert_same_bits(leaves(callback.state_dict()), leaves(before)), "what was there before stays"


class Homemade(Callback):
    """Somebody's own callback, which goes by a name that ours has too."""

    state_key = "GradientClipping"

    def state_dict(self):
        return {"n": 3}


def test_the_state_of_another_callback_of_the_same_name_is_left_out(trainer, tmp_path):
    fit = trainer(Homemade())
    fit.fit(Regression(), data(2))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    ours = GradientClipping()
    with pytest.warns(
        UserWarning, match=r"GradientClipping starts from an empty state: it belongs to another .* keys \['n'\]"
    ) as caught:
        trainer(ours, max_epochs=2).fit(Regression(), data(2), ckpt_path=tmp_path / "a.ckpt", **SAFELY)
    assert len([warning for warning in caught if "starts from an empty state" in str(warning.message)]) == 1
    assert ours.state_dict()["history"][0]["steps"] == 2


class Loads(Callback):
    """Brings a callback a state when a batch has begun."""

    def __init__(self, callback, state):
        self.callback, self.state = callback, state

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            self.callback.load_state_dict(self.state)


class Hooked(Regression):
    def on_before_optimizer_step(self, optimizer):
        """As an override: the pass comes after it, once."""


def test_the_state_of_another_callback_changes_nothing_in_the_middle_of_a_batch(trainer):
    passes = []
    for loads in (True, False):
        torch.manual_seed(0)
        clipping = GradientClipping(0.1)
        module = Hooked()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(clipping, *([Loads(clipping, {"n": 3})] if loads else [])).fit(module, data(4))
        passes.append((clipping.state_dict()["history"][0]["counts"], [parameter.detach() for parameter in module.parameters()]))
        assert not {"on_before_optimizer_step"} & vars(module).keys(), "it has its own hook again"
    assert passes[0][0] == passes[1][0]
    assert_same_bits(passes[0][1], passes[1][1])


class Named(GradientClipping):
    """With a key of its own, as Lightning's documentation writes one."""

    @property
    def state_key(self) -> str:
        return f"Named[{self.rules[0].scope}]"


def test_a_subclass_may_have_a_key_of_its_own(trainer, tmp_path):
    fit = trainer(Named(2.0))
    fit.fit(Regression(), data(2))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"].keys() == {"Named[global]"}
