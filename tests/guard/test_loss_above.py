"""NonFiniteGuard(loss_above=…): a window whose loss is far too large is skipped like a bad one, whatever its gradients are."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from clip_callbacks import (
    AccumulationRescaling,
    EmaLimit,
    FixedLimit,
    GradientClipping,
    GradientNormMonitor,
    LabelTokens,
    NonFiniteGradientError,
    NonFiniteGuard,
    RobustZScoreLimit,
    Rollback,
    WarmupLimit,
)
from clip_callbacks.guard.options import GuardOptions
from tests.helpers.matrix import matrix
from tests.helpers.tagging import Tagger, loader, sentences
from tests.helpers.training import (
    SAFELY,
    EitherWay,
    Regression,
    TwoNetworks,
    assert_same_bits,
    data,
    limit_states,
    make_trainer,
    scaled,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:Spike:RuntimeWarning", "ignore:.*lr_scheduler.step.*:UserWarning")

BATCHES = 10
STEADY = RobustZScoreLimit(6.0, window=20, warmup=3, scale="linear")


class Lifted(EitherWay):
    """A number is added to the losses of chosen batches: their gradients stay what they are."""

    def __init__(self, offsets, *, is_manual=False, **options):
        super().__init__(**options)
        self.offsets, self.automatic_optimization, self.losses = offsets, not is_manual, []

    def loss(self, batch, batch_idx):
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        loss = super().loss(batch, batch_idx) / 100 + self.offsets.get(number, 0.0)
        self.losses.append(loss.item())
        return loss


def lifted(offsets=None, **options):
    torch.manual_seed(0)
    return Lifted({5: 50.0, 8: 1e6} if offsets is None else offsets, **options)


def without(*left_out, batches=BATCHES):
    from torch.utils.data import DataLoader

    return DataLoader([batch for number, batch in enumerate(data(batches)) if number not in left_out], batch_size=None)


WAYS = {
    "automatic": {},
    "manual": {"is_manual": True},
    "on the device": {"fused": True, "deferred": True},
    "16-mixed": {"scaled": True},
    "16-mixed fused": {"scaled": True, "fused": True},
}


def fitted(folder, module_options, way, loader, guard_options, **trainer_options):
    options = dict(WAYS[way])
    is_scaled, deferred = options.pop("scaled", False), options.pop("deferred", None)
    module = lifted(**module_options, **options)
    guard = NonFiniteGuard(deferred=deferred, **guard_options)
    fit = make_trainer(folder, guard, GradientClipping(1.0), **trainer_options, **(scaled(init_scale=64.0) if is_scaled else {}))
    fit.fit(module, loader)
    return module, guard, fit


@matrix(way=list(WAYS), optimizer=["SGD", "AdamW"], limit=["number", "adaptive"])
def test_a_skipped_spike_never_happened(tmp_path, way, optimizer, limit):
    threshold = {"number": 40.0, "adaptive": STEADY}[limit]
    options = {"optimizer": getattr(torch.optim, optimizer)}
    ours, guard, _ = fitted(tmp_path, options, way, data(BATCHES), {"loss_above": threshold})
    clean, other, _ = fitted(tmp_path, options | {"offsets": {}}, way, without(5, 8), {"loss_above": threshold})
    assert guard.skipped_steps == guard.spikes == 2
    assert other.spikes == 0
    assert_same_bits(weights(ours), weights(clean))
    for key, value in ours.optimizers(use_pl_optimizer=False).state_dict()["state"].items():
        assert_same_bits(
            [it for it in value.values() if it is not None],
            [it for it in clean.optimizers(use_pl_optimizer=False).state_dict()["state"][key].values() if it is not None],
        )


def test_losses_may_have_any_sign(tmp_path):
    """A threshold below 0, and an adaptive one for losses that change their sign."""
    offsets = dict.fromkeys(range(BATCHES), -1e4) | {6: -100.0}
    _, guard, _ = fitted(tmp_path, {"offsets": offsets}, "automatic", data(BATCHES), {"loss_above": -5e3})
    assert guard.spikes == 1
    offsets = {number: float(number % 3 - 1) * 10 for number in range(40)} | {30: 400.0}
    _, guard, _ = fitted(tmp_path, {"offsets": offsets}, "automatic", data(40), {"loss_above": STEADY})
    assert guard.spikes == 1


def logged(folder, key="grad/loss"):
    """The values of a metric by step, as the CSV file has them."""
    import csv

    with (folder / "lightning_logs/version_0/metrics.csv").open() as file:
        return {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row.get(key)}


@pytest.mark.parametrize("way", list(WAYS))
def test_the_loss_is_that_of_the_step(tmp_path, way):
    module, _, _ = fitted(tmp_path, {}, way, data(BATCHES), {"loss_above": 1e9}, logger=CSVLogger(tmp_path))
    torch.testing.assert_close(torch.tensor(list(logged(tmp_path).values())), torch.tensor(module.losses))
    assert set(logged(tmp_path, "grad/loss_limit").values()) == {1e9}


@pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")
@pytest.mark.parametrize("rescales", [False, True])
@pytest.mark.parametrize("level", ["window", "microbatch"])
def test_the_loss_of_a_window_is_the_mean_of_its_micro_batches(tmp_path, rescales, level):
    """Of the short last window too; without the micro-batches that are dropped."""

    class Dropping(Lifted):
        def loss(self, batch, batch_idx):
            loss = super().loss(batch, batch_idx)
            return loss * math.nan if (batch_idx, level) == (1, "microbatch") else loss

    torch.manual_seed(0)
    module = Dropping({3: 5.0})
    callbacks = [NonFiniteGuard(loss_above=1e9, level=level), *([AccumulationRescaling()] if rescales else [])]
    fit = make_trainer(tmp_path, *callbacks, accumulate_grad_batches=3, logger=CSVLogger(tmp_path))
    fit.fit(module, data(8))
    assert callbacks[0].dropped_micro_batches == (level == "microbatch")
    kept = [[loss for place, loss in enumerate(module.losses) if place in window] for window in ({0, 1, 2}, {3, 4, 5}, {6, 7})]
    if level == "microbatch":
        del kept[0][1]
    expected = [math.fsum(window) / len(window) for window in kept]
    torch.testing.assert_close(torch.tensor(list(logged(tmp_path).values())), torch.tensor(expected))


def test_the_loss_of_a_window_is_weighted_as_its_gradient_is(tmp_path):
    batches = sentences([1, 12, 4, 0, 9])
    module = Tagger()
    callbacks = [NonFiniteGuard(loss_above=1e9), AccumulationRescaling(LabelTokens("labels"))]
    fit = make_trainer(tmp_path, *callbacks, accumulate_grad_batches=2, logger=CSVLogger(tmp_path))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    fit.fit(module, loader(batches))
    whole = [{key: torch.cat([batch[key] for batch in batches[at : at + 2]]) for key in ("inputs", "labels")} for at in (0, 2, 4)]
    expected = [module.loss(batch).item() for batch in whole]
    torch.testing.assert_close(torch.tensor(list(logged(tmp_path).values())), torch.tensor(expected))


class Accumulating(Regression):
    """Two backward passes a step in manual optimization."""

    automatic_optimization = False

    def __init__(self, divisor):
        super().__init__()
        self.automatic_optimization = False
        self.divisor, self.losses = divisor, []

    def training_step(self, batch, batch_idx):
        if batch_idx % 2 == 0:
            self.optimizers().zero_grad()
        loss = self.loss(batch, batch_idx)
        self.losses.append(loss.item())
        self.manual_backward(loss / self.divisor)
        if batch_idx % 2:
            self.optimizers().step()


@pytest.mark.parametrize(("divisor", "divides"), [(2, False), (1, True), (1, False)])
def test_the_loss_of_a_manual_window_is_that_of_its_gradient(tmp_path, divisor, divides):
    torch.manual_seed(0)
    module = Accumulating(divisor)
    callbacks = [NonFiniteGuard(loss_above=1e9), *([AccumulationRescaling(divide=True)] if divides else [])]
    make_trainer(tmp_path, *callbacks, logger=CSVLogger(tmp_path)).fit(module, data(4))
    mean = 2 if divisor == 2 or divides else 1
    expected = [(module.losses[at] + module.losses[at + 1]) / mean for at in (0, 2)]
    torch.testing.assert_close(torch.tensor(list(logged(tmp_path).values())), torch.tensor(expected))


@pytest.mark.parametrize("deferred", [False, True])
def test_it_is_loud_named_and_counted(tmp_path, deferred):
    module, guard = lifted(fused=True), NonFiniteGuard(loss_above=40.0, skip_above=1e4, deferred=deferred)
    fit = make_trainer(tmp_path, guard, logger=CSVLogger(tmp_path))
    with pytest.warns(RuntimeWarning) as caught:
        fit.fit(module, data(BATCHES))
    first, _ = (text for warning in caught if (text := str(warning.message)).startswith("Spike"))
    assert re.match(r"Spike at step 5, .*: loss 5[0-9.]* is above loss_above, now 40: the step is skipped \(bad step 1 in a", first)
    assert "Largest gradients: net." in first
    lines = [json.loads(line) for line in (tmp_path / "lightning_logs/version_0/nonfinite_steps.jsonl").read_text().splitlines()]
    assert [(line["step"], line["stage"], line["limit"], line["loss_limit"]) for line in lines] == [
        (5, "spike", 1e4, 40.0),
        (8, "spike", 1e4, 40.0),
    ]
    assert lines[0]["loss"] == pytest.approx(module.losses[5], rel=1e-6)
    assert fit.callback_metrics["grad/spikes"] == fit.callback_metrics["grad/skipped_steps"] == 2


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_norm_and_loss_together(tmp_path, both, deferred):
    """Batch 3 has a large norm, batch 5 a large loss, batch 7 both."""

    class Both(Lifted):
        def loss(self, batch, batch_idx):
            return super().loss(batch, batch_idx) * {3: 300.0, 7: 1e4}.get(batch_idx, 1.0)

    torch.manual_seed(0)
    module = Both({3: -1e3 / 3, 5: 100.0}, fused=True)
    module.make_optimizer, module.options = torch.optim.SGD, {"lr": 0.0, "fused": True}
    norms, callback = [], GradientNormMonitor()
    guard = NonFiniteGuard(skip_above=20.0, loss_above=40.0, both=both, deferred=deferred)
    module.on_train_batch_end = lambda *_: norms.append(float(callback.last_report.total_norm))
    make_trainer(tmp_path, guard, callback).fit(module, data(BATCHES))
    is_large = [(norm > 20.0, place in {5, 7}) for place, norm in enumerate(norms)]
    assert is_large[3] == (True, False)
    assert is_large[5] == (False, True)
    assert guard.spikes == sum(norm and loss if both else norm or loss for norm, loss in is_large) == (1 if both else 3)


class Multiplied(Lifted):
    """The last loss but one is NaN, and its gradients with it."""

    def loss(self, batch, batch_idx):
        return super().loss(batch, batch_idx) * {BATCHES - 2: math.nan}.get(batch_idx, 1.0)


@pytest.mark.parametrize("way", ["automatic", "manual", "16-mixed", "16-mixed fused"])
def test_warn_reports_and_changes_nothing(tmp_path, way, monkeypatch):
    """Except that a GradScaler skips what is not finite, whatever the policy."""
    monkeypatch.setitem(globals(), "Lifted", Multiplied)
    offsets = {5: 50.0, 7: 1e6}
    options = {"loss_above": 40.0, "skip_above": 1e3, "max_consecutive": 2, "policy": "warn", "bundles": tmp_path / "bundles"}
    with pytest.warns(RuntimeWarning) as caught:
        ours, guard, _ = fitted(tmp_path, {"offsets": offsets}, way, data(BATCHES), options, logger=CSVLogger(tmp_path))
    theirs, _, _ = fitted(tmp_path, {"offsets": offsets}, way, data(BATCHES), {"policy": "ignore"})
    assert_same_bits([it.nan_to_num(7.0) for it in weights(ours)], [it.nan_to_num(7.0) for it in weights(theirs)])
    is_scaled = way.startswith("16")
    assert bool(weights(ours)[0].isnan().any()) is not is_scaled
    texts = [text for warning in caught if (text := str(warning.message)).startswith(("Spike", "Non-finite"))]
    assert [text.partition(" at ")[0] for text in texts] == ["Spike", "Spike", "Non-finite gradients"]
    assert ["step is taken" in text for text in texts] == [True, True, not is_scaled]
    assert "Stage: the loss is non-finite" in texts[2]
    assert (guard.spikes, guard.skipped_steps) == (2, int(is_scaled))
    assert (guard.reported_steps == 0) is is_scaled
    lines = [json.loads(line) for line in (tmp_path / "lightning_logs/version_0/nonfinite_steps.jsonl").read_text().splitlines()]
    assert [(line["step"], line["policy"]) for line in lines][:3] == [(5, "warn"), (7, "warn"), (8, "warn")]
    assert len(list((tmp_path / "bundles").iterdir())) == len(lines)


def test_a_run_that_has_diverged_is_not_warned_of_without_end(tmp_path):
    offsets = dict.fromkeys(range(3, BATCHES), math.nan)
    options = {"policy": "warn", "max_consecutive": 3}
    with pytest.warns(RuntimeWarning) as caught:
        _, guard, fit = fitted(tmp_path, {"offsets": offsets}, "automatic", data(BATCHES), options)
    texts = [text for warning in caught if (text := str(warning.message)).startswith("Non-finite gradients")]
    assert len(texts) == 3
    assert "those that follow are only counted" in texts[2]
    assert guard.reported_steps == fit.callback_metrics["grad/reported_steps"] == BATCHES - 3
    assert guard.skipped_steps == 0


def test_a_report_is_made_before_the_step_is_taken(tmp_path):
    """Afterwards the weights are ruined, and would be blamed."""
    with pytest.raises(ValueError, match="`deferred` cannot be True here: the guard must know of bad gradients before"):
        fitted(tmp_path, {}, "on the device", data(2), {"policy": "warn"})


def test_a_spike_that_is_taken_enters_the_limits_of_clipping(tmp_path):
    clipping = GradientClipping(RobustZScoreLimit(warmup=2))
    guard = NonFiniteGuard("warn", loss_above=40.0)
    make_trainer(tmp_path, guard, clipping).fit(lifted(), data(BATCHES))
    assert guard.spikes == 2
    (state,) = limit_states(clipping)
    assert state["count"].item() == BATCHES


def test_too_many_in_a_row_stop_the_run(tmp_path):
    offsets = {3: 100.0, 4: math.nan, 5: 100.0}
    with pytest.warns(RuntimeWarning), pytest.raises(NonFiniteGradientError, match="bad step 3 in a row[^$]*raise loss_above"):
        fitted(tmp_path, {"offsets": offsets}, "automatic", data(BATCHES), {"loss_above": 40.0, "max_consecutive": 3})


def test_spikes_in_a_row_lead_back(tmp_path):
    offsets = {6: 100.0, 7: 100.0}
    rollback = {"loss_above": STEADY, "max_consecutive": 2, "rollback": Rollback(every_n_steps=4)}
    ours, guard, _ = fitted(tmp_path, {"offsets": offsets}, "automatic", data(BATCHES), rollback)
    clean, twin, _ = fitted(tmp_path, {"offsets": {}}, "automatic", without(4, 5, 6, 7), {"loss_above": STEADY})
    assert guard.rollbacks == 1
    assert_same_bits(weights(ours), weights(clean))
    states = [it.state_dict()["loss_above"][0]["state"] for it in (guard, twin)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_state_is_in_the_checkpoint(tmp_path):
    limit = WarmupLimit(STEADY, steps=5, warmup_limit=1e4)
    offsets = {17: 100.0}

    def module():
        return lifted(offsets, lr=1e-3)

    whole, whole_guard = module(), NonFiniteGuard(loss_above=limit)
    make_trainer(tmp_path, whole_guard, max_epochs=2).fit(whole, data(12))
    first = make_trainer(tmp_path, NonFiniteGuard(loss_above=limit))
    first.fit(module(), data(12))
    first.save_checkpoint(tmp_path / "middle.ckpt")
    second, guard = module(), NonFiniteGuard(loss_above=limit)
    make_trainer(tmp_path, guard, max_epochs=2).fit(second, data(12), ckpt_path=tmp_path / "middle.ckpt", **SAFELY)
    assert_same_bits(weights(second), weights(whole))
    assert guard.spikes == whole_guard.spikes == 1
    states = [it.state_dict()["loss_above"][0]["state"] for it in (guard, whole_guard)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")
@pytest.mark.parametrize("way", ["automatic", "on the device"])
def test_a_loss_that_is_bad_leaves_no_trace_in_the_threshold(tmp_path, way):
    guards = []
    for offsets, left_out in (({4: math.nan, 6: math.inf}, ()), ({}, (4, 6))):
        guards.append(fitted(tmp_path, {"offsets": offsets}, way, without(*left_out), {"loss_above": STEADY})[1])
    assert [(guard.spikes, guard.skipped_steps) for guard in guards] == [(0, 2), (0, 0)]
    states = [it.state_dict()["loss_above"][0]["state"] for it in guards]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_each_of_two_optimizers_is_judged_by_its_own_losses(tmp_path):
    guard = NonFiniteGuard(loss_above=1e4)
    torch.manual_seed(0)
    make_trainer(tmp_path, guard).fit(TwoNetworks({4: 1e7}), data(BATCHES))
    assert [guard.skipped_steps_of(index) for index in (0, 1)] == [1, 0]


def test_a_search_of_lbfgs_is_judged_by_where_it_begins(tmp_path):
    module = lifted({5: 100.0}, optimizer=torch.optim.LBFGS, lr=0.01)
    before = []
    module.on_train_batch_start = lambda *_: before.append(weights(module))
    guard = NonFiniteGuard(loss_above=40.0)
    make_trainer(tmp_path, guard).fit(module, data(8))
    assert guard.spikes == guard.skipped_steps == 1
    assert_same_bits(before[5], before[6])


@pytest.mark.parametrize("rescales", [False, True])
def test_a_loss_that_lightning_does_not_know_of_is_said_once(tmp_path, rescales):
    class Aside(Lifted):
        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.loss(batch, batch_idx).backward()
            self.optimizers().step()

    torch.manual_seed(0)
    guard = NonFiniteGuard(loss_above=-1.0)
    callbacks = [guard, AccumulationRescaling()] if rescales else [guard]
    with pytest.warns(UserWarning, match="The loss of an optimizer step") as caught:
        make_trainer(tmp_path, *callbacks).fit(Aside({5: 100.0}, is_manual=True), data(8))
    assert len([warning for warning in caught if "Call self.manual_backward" in str(warning.message)]) == 1
    assert guard.spikes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_losses_of_other_dtypes(tmp_path, dtype):
    class Cast(Lifted):
        def loss(self, batch, batch_idx):
            return super().loss(batch, batch_idx).to(dtype)

    guard = NonFiniteGuard(loss_above=40.0)
    make_trainer(tmp_path, guard, accumulate_grad_batches=2).fit(Cast({4: 100.0, 5: 100.0}), data(BATCHES))
    assert guard.spikes == 1


@pytest.mark.parametrize("deferred", [False, True])
def test_an_infinite_float16_loss_with_finite_gradients_is_no_spike(tmp_path, deferred):
    """It may be an effect of the loss scale: the gradients tell, and they are finite."""

    class Half(Lifted):
        def loss(self, batch, batch_idx):
            return super().loss(batch, batch_idx).half()

    guard = NonFiniteGuard(loss_above=40.0, deferred=deferred)
    make_trainer(tmp_path, guard).fit(Half({4: math.inf, 6: 100.0}, fused=True), data(BATCHES))
    assert guard.spikes == guard.skipped_steps == 1


def test_batches_without_a_loss_do_not_count(tmp_path):
    class Leaving(Lifted):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in {2, 5} else super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    guard, module = NonFiniteGuard(loss_above=1e9), Leaving({})
    fit = make_trainer(tmp_path, guard, accumulate_grad_batches=3, logger=CSVLogger(tmp_path))
    fit.fit(module, data(6))
    expected = [sum(module.losses[at : at + 2]) / 2 for at in (0, 2)]
    torch.testing.assert_close(torch.tensor(list(logged(tmp_path).values())), torch.tensor(expected))


def test_a_window_of_another_length_has_a_mean_too(tmp_path):
    """The number of micro-batches changes within a window."""

    class Changing(Lifted):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.trainer.accumulate_grad_batches = 4

    for callbacks in ([], [AccumulationRescaling()]):
        torch.manual_seed(0)
        module, guard = Changing({}), NonFiniteGuard(loss_above=1e9)
        fit = make_trainer(tmp_path, guard, *callbacks, accumulate_grad_batches=2)
        fit.fit(module, data(4))
        assert float(fit.callback_metrics["grad/loss"]) == pytest.approx(sum(module.losses) / 4, rel=1e-6)


@pytest.mark.parametrize("both", [False, True])
def test_a_search_for_the_learning_rate_judges_no_loss(both):
    limits = GuardOptions(skip_above=5.0, loss_above=1.0, both=both).for_search().limits
    assert limits == ((None, None, False) if both else (FixedLimit(5.0), None, False))


@pytest.mark.parametrize("policy", ["raise", "zero", "ignore"])
def test_it_needs_a_policy_that_skips_or_warns(policy):
    with pytest.raises(ValueError, match=f"`loss_above` must be None for the policy '{policy}', got 5.0"):
        NonFiniteGuard(policy, loss_above=5.0)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, True, "high"])
def test_numbers_that_are_no_threshold(number):
    with pytest.raises(ValueError, match="`loss_above` must be a finite number, got"):
        NonFiniteGuard(loss_above=number)


def test_options_that_do_not_go_together():
    with pytest.raises(ValueError, match="`loss_above` must be a number, or a Limit that takes losses, .*got EmaLimit"):
        NonFiniteGuard(loss_above=EmaLimit())
    for options in ({}, {"skip_above": 1.0}, {"loss_above": 1.0}):
        with pytest.raises(ValueError, match="`both` must be False unless `skip_above` and `loss_above` are given"):
            NonFiniteGuard(both=True, **options)
