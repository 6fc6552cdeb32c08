"""The training loss in the report: which metric it is, its spikes, and what the page says of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger

from clip_callbacks import GradientClipping, NonFiniteGradientError, NonFiniteGuard
from clip_callbacks.html_report.bad_steps import bad_steps
from clip_callbacks.html_report.diagnosis import diagnose
from clip_callbacks.html_report.losses import training_loss
from clip_callbacks.html_report.page import make_sections
from clip_callbacks.html_report.runs import Run
from clip_callbacks.html_report.series import Series
from clip_callbacks.html_report.spikes import LOSS_SPIKE_SIGMAS, MIN_LOSSES_BEFORE, loss_spikes
from tests.helpers.logs import read, said, table, texts, write, write_guarded
from tests.helpers.matrix import examples
from tests.helpers.training import Poisoned, data


def series(values):
    return Series.of(np.arange(len(values)), values)


def noise(count, seed=0):
    return np.random.default_rng(seed).normal(size=count)


# ---- the metric ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["val_loss", "train_loss"], "train_loss"),
        (["train_loss_step", "train_loss_epoch", "val_loss"], "train_loss_step"),
        (["train/loss", "eval/loss"], "train/loss"),
        (["loss", "train_nll"], "train_nll"),
        (["loss", "test_loss", "validation_loss"], "loss"),
        (["val_loss"], None),
        (["kl_loss", "reconstruction_loss"], None),
        (["train_perplexity", "train_error"], None),
        (["train_acc"], None),
        (["valLoss", "trainLoss"], "trainLoss"),
        (["val_cross_entropy", "train_cross_entropy"], "train_cross_entropy"),
        (["trainBCELoss"], "trainBCELoss"),
        (["loss_1"], "loss_1"),
        (["entropy", "valLoss"], None),
        (["grad_penalty_loss"], None),
    ],
)
def test_the_training_loss_is_known_by_its_name(keys, expected):
    run = Run("run", "", {key: series([1.0, 2.0]) for key in ["grad/total_norm", *keys]})
    found = training_loss(run.optimizer_logs[0], run.losses())
    assert (found.name if found else None) == expected


def test_a_loss_may_begin_with_grad():
    ours = ["grad/total_norm", "grad/loss_limit", "grad_norm/loss.weight", "grad_norm_p50/loss.weight", "grad_2.0_norm.loss.weight"]
    run = Run("run", "", {key: series([1.0, 2.0]) for key in [*ours, "grad_penalty_loss", "lossScale", "entropy"]})
    assert list(run.losses()) == ["grad_penalty_loss"]


def test_the_loss_of_the_guard_comes_first_and_a_named_one_before_others():
    metrics = {key: series([1.0, 2.0]) for key in ("grad/total_norm", "train_loss", "kl", "val_kl")}
    (log,) = Run("run", "", metrics).optimizer_logs
    assert training_loss(log, log.run.losses(("val_kl", "kl")), is_named=True).name == "kl"
    (log,) = Run("run", "", metrics | {"grad/loss": series([1.0])}).optimizer_logs
    assert training_loss(log, log.run.losses()).name == "grad/loss"


def test_one_loss_does_not_tell_of_two_optimizers():
    metrics = {f"grad/{key}-{name}": series([1.0]) for key in ("total_norm", "loss") for name in ("Adam", "SGD")}
    shared = Run("run", "", {key: metrics[key] for key in metrics if "total_norm" in key} | {"train_loss": series([1.0])})
    assert [training_loss(log, shared.losses()) for log in shared.optimizer_logs] == [None, None]
    assert [training_loss(log, {}).name for log in Run("run", "", metrics).optimizer_logs] == ["grad/loss-Adam", "grad/loss-SGD"]


def test_norms_of_weights_are_no_losses():
    assert Run("run", "", {"weight_norm/loss_head": series([1.0])}).losses() == {}


# ---- spikes in hindsight -------------------------------------------------------------------------------------------------------

STEPS = np.arange(4000)
HEALTHY = {
    "falling": 3 + 8 * np.exp(-STEPS / 300) + 0.05 * noise(4000),
    "without noise": 1 / np.sqrt(1 + STEPS),
    "negative, falling": -STEPS / 100 + noise(4000),
    "rising": STEPS / 10.0,
    "steps of epochs": 3 - STEPS // 500 * 0.2 + 0.02 * noise(4000),
    "a lasting jump": np.where(STEPS > 1000, 5.0, 1.0) + 0.1 * noise(4000),
    "constant": np.ones(4000),
    "mostly zero": np.where(noise(4000) > 0.7, np.abs(noise(4000, 1)), 0.0),
    "bfloat16": 3.25 + np.round(noise(4000) * 0.3) * 2**-6,
    "waves": np.sin(STEPS / 50),
}


@pytest.mark.parametrize("losses", HEALTHY.values(), ids=HEALTHY)
def test_healthy_losses_have_no_spikes(losses):
    assert loss_spikes(series(losses)).points.steps.tolist() == []


@pytest.mark.parametrize("shape", ["falling", "negative, falling", "a lasting jump", "steps of epochs"])
@pytest.mark.parametrize("sign", [1, -1])
def test_spikes_are_found_in_losses_of_any_sign(shape, sign):
    level = HEALTHY[shape] - (100 if sign < 0 else 0)
    spiky = level.copy()
    places = [5, 400, 777, 778, 2500, 3990]
    spiky[places] += 20 * np.std(np.diff(level)) + 0.1 * np.abs(level[places])
    found = loss_spikes(series(spiky))
    assert found.points.steps.tolist() == places
    assert (found.height > LOSS_SPIKE_SIGMAS).all()
    assert found.worst[0] in places


@given(st.lists(st.floats(-1e12, 1e12), max_size=80))
@settings(deadline=None, max_examples=examples(60))
def test_a_spike_is_above_both_sides(values):
    found = loss_spikes(series(values))
    for step, value in zip(found.points.steps, found.points.values, strict=True):
        before, after = values[max(0, step - 15) : step], values[step + 1 : step + 16]
        assert step >= MIN_LOSSES_BEFORE
        assert value > np.median(before)
        assert not after or len(after) < 15 or value > np.median(after)


# ---- the page ------------------------------------------------------------------------------------------------------------------


def test_findings_tell_what_became_of_loss_spikes(tmp_path):
    text = said(read(write_guarded(tmp_path)))
    assert (
        '2 steps with a spike of the loss were found, 1 of them skipped and 1 only reported (policy "warn"). The highest loss was '
        "9.5 at optimizer step 40, its limit 3.25. The norm was far above its usual size at 1 of them."
    ) in text
    assert "1 of 79 logged values of grad/loss is a spike" in text
    assert "The most extreme is 4 at optimizer step 60" in text


@pytest.mark.parametrize(("policy", "outcome"), [("skip", "was skipped."), ("warn", "was only reported")])
def test_one_journalled_spike_is_told_of_with_its_outcome(policy, outcome, tmp_path):
    path = write(tmp_path, table(100))
    entry = {"step": 50, "policy": policy, "stage": "spike", "total_norm": 1.0, "loss": -2.0, "loss_limit": -3.0}
    (tmp_path / "nonfinite_steps.jsonl").write_text(json.dumps(entry))
    (section,) = make_sections([read(path)], ())
    (finding,) = [finding for finding in section.findings if "spike of the loss" in finding.text]
    assert outcome in finding.text
    assert "The highest loss was -2 at optimizer step 50, its limit -3. The norm showed nothing unusual." in finding.text
    assert finding.severity == ("warn" if policy == "warn" else "note")
    (row,) = [row for row in section.bad_steps if row.step == 50]
    assert row.details == "loss -2 above its limit -3"


def test_a_spike_of_the_norm_alone_is_none_of_the_loss(tmp_path):
    path = write(tmp_path, table(100))
    entry = {"step": 50, "policy": "skip", "stage": "spike", "total_norm": 9.0, "limit": 5.0, "loss": 1.0, "loss_limit": 3.0}
    (tmp_path / "nonfinite_steps.jsonl").write_text(json.dumps(entry))
    run = read(path)
    assert "spike of the loss" not in said(run)
    (row,) = [row for row in bad_steps(run.optimizer_logs[0])[0] if row.step == 50]
    assert row.details == "loss 1 within its limit 3; norm 9 above its limit 5"


def test_spikes_of_the_users_own_loss_are_rows_and_findings(tmp_path):
    losses, norms = 2 + 0.01 * noise(300), np.exp(0.1 * noise(300, 1))
    losses[[100, 200]], norms[200] = (3.0, 4.0), 50.0
    frame = table(300, train_loss=losses, **{"grad/total_norm": norms})
    (section,) = make_sections([read(write(tmp_path, frame))], ())
    rows = {row.step: row for row in section.bad_steps}
    assert rows[100].outcome == "loss spike"
    assert rows[100].norm == norms[100]
    assert rows[100].details.startswith("train_loss 3, ")
    assert rows[200].details.endswith("; the loss 4 is a spike too")
    assert section.bad_count == 2
    assert "2 of 300 logged values of train_loss are spikes" in texts(section.findings)
    assert "The norm was far above its usual size at 1 of them." in texts(section.findings)


def test_spikes_in_the_journal_are_not_counted_as_ordinary_losses_or_twice(tmp_path):
    losses, norms = 2 + 0.01 * noise(300), np.exp(0.1 * noise(300, 1))
    losses[[100, 200]], norms[200] = (3.0, 4.0), 50.0
    path = write(tmp_path, table(300, **{"grad/loss": losses, "grad/total_norm": norms}))
    entry = {"policy": "warn", "stage": "spike", "loss_limit": 2.5}
    entries = [entry | {"step": step, "loss": losses[step], "total_norm": norms[step]} for step in (100, 200)]
    (tmp_path / "nonfinite_steps.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (section,) = make_sections([read(path)], ())
    assert (section.loss_advice.skips, section.loss_advice.ordinary_skips) == (2, 0)
    assert [row.step for row in section.bad_steps if row.step in (100, 200)] == [100, 200]
    assert "logged values of grad/loss" not in texts(section.findings)
    assert "The norm was far above its usual size at 1 of them." in texts(section.findings)


def test_a_page_without_spikes_says_that_losses_were_judged(tmp_path):
    (section,) = make_sections([read(write(tmp_path, table(100, **{"grad/total_norm": 1.0})))], ())
    assert section.no_bad_steps.endswith("No logged norm is a spike. Neither is a logged value of train_loss.")


def test_the_end_of_a_run_by_the_guard_is_a_problem(trainer, tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    bad = Poisoned(dict.fromkeys(range(5, 20), math.nan))
    fit = trainer(GradientClipping(1.0), NonFiniteGuard(max_consecutive=3), logger=logger, log_every_n_steps=1)
    with pytest.raises(NonFiniteGradientError), pytest.warns(RuntimeWarning, match="Non-finite"):
        fit.fit(bad, data(20))
    (log,) = read(Path(logger.log_dir)).optimizer_logs
    (finding,) = [finding for finding in diagnose(log, {}) if "in a row" in finding.text]
    assert finding.severity == "bad"
    assert finding.text.startswith("The log ends with 3 bad batches in a row, the last at optimizer step 7.")


@pytest.mark.parametrize(
    ("entry", "said_of_it"),
    [
        ({"policy": "raise", "streak": 1}, 'NonFiniteGuard(policy="raise") ended the run at optimizer step 99.'),
        ({"policy": "skip", "streak": 10}, "The log ends with 10 bad batches in a row"),
        ({"policy": "skip", "streak": 1}, None),
        ({"policy": "ignore", "streak": 10}, None),
        ({"policy": "warn", "streak": 10}, None),
        ({"policy": "skip", "streak": 10, "step": 50}, None),
    ],
)
def test_only_bad_steps_at_the_end_end_a_run(entry, said_of_it, tmp_path):
    path = write(tmp_path, table(100))
    (tmp_path / "nonfinite_steps.jsonl").write_text(json.dumps({"step": 99, "stage": "loss"} | entry))
    text = said(read(path))
    assert ("in a row" in text or "ended the run" in text) == bool(said_of_it)
    assert (said_of_it or "") in text
