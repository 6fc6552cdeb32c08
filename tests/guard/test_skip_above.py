"""NonFiniteGuard(skip_above=…): a finite step that is far too large is skipped like a bad one."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from clip_callbacks import (
    ClipRule,
    FixedLimit,
    GradientClipping,
    NonFiniteGradientError,
    NonFiniteGuard,
    RobustZScoreLimit,
    WarmupLimit,
    clip_step,
)
from tests.helpers.laws import with_gradients
from tests.helpers.records import record_of
from tests.helpers.training import SAFELY, Poisoned, assert_same_bits, data, limit_states, weights

SPIKES = pytest.mark.filterwarnings("ignore:Spike:RuntimeWarning")


def without(loader, *bad):
    """The same batches without some of them."""
    from torch.utils.data import DataLoader

    batches = [batch for number, batch in enumerate(loader) if number not in bad]
    return DataLoader(batches, batch_size=None)


def spiked(**options):
    torch.manual_seed(0)
    return Poisoned({5: 1e6, 8: 1e9}, **options)


@SPIKES
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("deferred", [False, None])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_skipped_spike_never_happened(trainer, fused, deferred, optimizer):
    options = {"optimizer": optimizer, "fused": fused} | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    ours, clean = spiked(**options), Poisoned({}, **options)
    clean.load_state_dict(ours.state_dict())
    guard = NonFiniteGuard(skip_above=100.0, deferred=True if fused and deferred is None else deferred)
    family = [guard, clipping := GradientClipping(RobustZScoreLimit(warmup=2))]
    trainer(*family).fit(ours, data(12))
    trainer(NonFiniteGuard(deferred=guard.deferred), twin := GradientClipping(RobustZScoreLimit(warmup=2))).fit(
        clean, without(data(12), 5, 8)
    )
    assert_same_bits(weights(ours), weights(clean))
    assert guard.skipped_steps == clipping.skipped_steps == 2
    ((ours_state,), (clean_state,)) = limit_states(clipping), limit_states(twin)
    assert all(torch.equal(ours_state[key], clean_state[key]) for key in ours_state)


@pytest.mark.parametrize("deferred", [False, True])
def test_it_is_loud_and_named(trainer, tmp_path, deferred):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    module = spiked(fused=True)
    fit = trainer(NonFiniteGuard(skip_above=FixedLimit(100.0), deferred=deferred), logger=logger)
    with pytest.warns(RuntimeWarning) as caught:
        fit.fit(module, data(12))
    first, second = (text for warning in caught if (text := str(warning.message)).startswith("Spike"))
    told = r"Spike at step 5, .*rank 0: total_norm .* is above skip_above, now 100: the step is skipped \(bad step 1 in a row"
    assert re.match(told, first)
    assert "Largest gradients: net." in first
    assert "step 8" in second
    lines = [json.loads(line) for line in (tmp_path / "lightning_logs/version_0/nonfinite_steps.jsonl").read_text().splitlines()]
    assert [(line["step"], line["stage"], line["streak"]) for line in lines] == [(5, "spike", 1), (8, "spike", 1)]
    assert lines[0]["limit"] == 100.0 < lines[0]["total_norm"]
    assert lines[0]["largest"][0]["norm"] <= lines[0]["total_norm"]
    assert fit.callback_metrics["grad/skipped_steps"] == 2


@SPIKES
@pytest.mark.parametrize("deferred", [False, True])
def test_too_many_in_a_row_stop_the_run_whatever_they_are(trainer, deferred):
    torch.manual_seed(0)
    module = Poisoned({3: 1e6, 4: math.nan, 5: 1e7}, fused=True)
    guard = NonFiniteGuard(skip_above=100.0, max_consecutive=3, deferred=deferred)
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(NonFiniteGradientError, match="bad step 3 in a row[^$]*raise skip_above"),
    ):
        trainer(guard).fit(module, data(12))


@SPIKES
def test_an_adaptive_limit_skips_spikes_of_a_run_at_any_scale(trainer):
    for scale in (1e-3, 1.0, 1e3):
        torch.manual_seed(0)
        module = Poisoned({number: scale * (1e4 if number in {30, 41} else 1.0) for number in range(60)}, lr=1e-3 / scale)
        guard = NonFiniteGuard(skip_above=RobustZScoreLimit(4.0, warmup=10))
        trainer(guard).fit(module, data(60))
        assert guard.skipped_steps == 2


@SPIKES
def test_a_lasting_level_is_followed_or_stops_the_run():
    """In the limit's own state a spike counts as clipped."""
    state, weight = None, torch.nn.Parameter(torch.zeros(1))
    skipped = []
    for step in range(300):
        weight.grad = torch.tensor([1.0 + 0.1 * math.sin(step) if step < 100 else 5.0])
        report, state = clip_step([weight], state, rules=[], skip_above=RobustZScoreLimit(3.0, window=50))
        skipped.append(bool(report.skipped))
        assert (weight.grad is None) is skipped[-1]
    assert not any(skipped[:100])
    assert all(skipped[100:110])
    assert not any(skipped[200:])


@SPIKES
def test_the_state_is_in_the_checkpoint(trainer, tmp_path):
    limit = WarmupLimit(RobustZScoreLimit(3.0, warmup=5), steps=5, warmup_limit=1e4)

    def module():
        torch.manual_seed(0)
        return Poisoned({17: 1e6}, lr=1e-3)

    whole, whole_guard = module(), NonFiniteGuard(skip_above=limit)
    trainer(whole_guard, max_epochs=2).fit(whole, data(12))
    first = trainer(NonFiniteGuard(skip_above=limit))
    first.fit(module(), data(12))
    first.save_checkpoint(tmp_path / "middle.ckpt")
    second, guard = module(), NonFiniteGuard(skip_above=limit)
    trainer(guard, max_epochs=2).fit(second, data(12), ckpt_path=tmp_path / "middle.ckpt", **SAFELY)
    assert_same_bits(weights(second), weights(whole))
    assert guard.skipped_steps == whole_guard.skipped_steps == 1
    states = [it.state_dict()["skip_above"][0]["state"] for it in (guard, whole_guard)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@SPIKES
@pytest.mark.parametrize("fused", [False, True])
def test_under_a_grad_scaler_the_scale_stays(trainer, fused):
    from lightning.pytorch.plugins import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    module, guard = spiked(fused=fused), NonFiniteGuard(skip_above=30.0)
    module.factors = {5: 300.0}
    before = []
    module.on_before_optimizer_step = lambda optimizer: before.append(weights(module))
    trainer(guard, plugins=[plugin]).fit(module, data(8, size=1.0))
    assert guard.skipped_steps == 1
    assert guard.overflowed_steps == 0
    assert_same_bits(before[5], before[6])
    assert plugin.scaler.get_scale() == 16.0
    with pytest.raises(ValueError, match="`deferred` cannot be True here: a GradScaler"):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        trainer(NonFiniteGuard(skip_above=100.0, deferred=True), plugins=[plugin]).fit(spiked(fused=True), data(2))


@SPIKES
def test_a_search_of_lbfgs_is_judged_by_where_it_begins(trainer):
    module = spiked(optimizer=torch.optim.LBFGS, lr=0.1)
    guard = NonFiniteGuard(skip_above=1000.0)
    before = []
    module.on_train_batch_start = lambda *_: before.append(weights(module))
    trainer(guard).fit(module, data(8))
    assert guard.skipped_steps == 1
    assert_same_bits(before[5], before[6])


def test_in_a_plain_loop_with_any_policy():
    for policy in ("skip", "raise", "zero", "ignore"):
        module = with_gradients(0, size=100.0)
        report, (rule, veto) = clip_step(
            module.named_parameters(), rules=[ClipRule(RobustZScoreLimit())], skip_above=1.0, nonfinite=policy
        )
        assert report.skipped
        assert record_of(report).finite
        assert record_of(report).thresholds.norm.limit == 1.0
        assert all(parameter.grad is None for parameter in module.parameters())
        assert rule["count"].item() == 0
        assert veto == {}


def test_exactly_at_the_limit_is_not_above_it():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert not clip_step([weight], rules=[], skip_above=5.0)[0].skipped
    assert clip_step([weight], rules=[], skip_above=4.9999)[0].skipped


@pytest.mark.parametrize("policy", ["raise", "zero", "ignore"])
def test_it_needs_the_policy_that_skips(policy):
    with pytest.raises(ValueError, match=f"`skip_above` must be None for the policy '{policy}', got 5.0"):
        NonFiniteGuard(policy, skip_above=5.0)
    with pytest.raises(ValueError, match="`skip_above` must be a number above 0"):
        NonFiniteGuard(skip_above=0.0)
