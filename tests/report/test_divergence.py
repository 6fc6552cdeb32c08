"""Runs that went out of control, by their training loss: true ones are found, and healthy ones are not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from clip_callbacks.html_report.divergence import explodes_at_end, out_of_control
from clip_callbacks.html_report.losses import TrainingLoss
from clip_callbacks.html_report.page import make_sections
from clip_callbacks.html_report.series import Series
from tests.helpers.logs import read, run_main, table, texts, write

STEPS = np.arange(400)


def judged(losses):
    return out_of_control(TrainingLoss("train_loss", Series.of(np.arange(len(losses)), losses), Series.empty()))


def noise(sigma, seed=0, count=400):
    return np.random.default_rng(seed).lognormal(0.0, sigma, count)


@pytest.mark.parametrize("sigma", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("count", [100, 400])
def test_stationary_losses_near_zero_are_healthy(sigma, count):
    alarms = sum(judged(1e-3 * noise(sigma, seed, count)) is not None for seed in range(200))
    assert alarms <= 3  # about 1 in 250 is expected at most


HEALTHY = {
    "falling": np.maximum(np.exp(-STEPS / 50), 0.1),
    "a low first value": np.where(STEPS == 0, 0.2, 1.0) * noise(1.0),
    "a spike that passes": np.where((STEPS > 110) & (STEPS < 140), 50.0, 1.0),
    "any sign": np.where(STEPS < 50, -1.0, 50.0),
    "short": np.geomspace(1, 1e3, 39),
}
DIVERGED = {
    "at the second step, and recovered": np.where(STEPS < 1, 19.0, 60.0 * np.exp(-STEPS / 300)) * noise(0.2),
    "at the second step": np.where(STEPS < 1, 7.0, 50.0),
    "at the ninth step": np.where(STEPS < 8, 1.0, 7.0) * noise(0.3),
    "doubled in the middle": np.where(STEPS < 200, 1.0, 2.2) * noise(0.1),
    "with much noise": np.where(STEPS < 200, 1.0, 5.0) * noise(1.0),
    "growing": np.exp(STEPS / 80) * noise(0.6),
    "after it had fallen": np.where(STEPS < 200, np.maximum(np.exp(-STEPS / 40), 0.3), 3.0),
}


@pytest.mark.parametrize("losses", HEALTHY.values(), ids=HEALTHY)
def test_healthy_losses_give_no_verdict(losses):
    assert judged(losses) is None


@pytest.mark.parametrize("losses", DIVERGED.values(), ids=DIVERGED)
def test_losses_that_rose_and_stayed_for_a_quarter_are_found(losses):
    assert "the training went out of control" in (judged(losses) or "")


def test_the_verdict_says_what_it_compares():
    said = judged(np.where(STEPS < 30, 1.0, 9.0)) or ""
    assert said.startswith("train_loss rose from 1 to 9 (the median of a quarter of the run): ")
    said = judged(np.where(STEPS == 0, 20.0, np.where(STEPS < 30, 1.0, 9.0))) or ""
    assert said.startswith("train_loss rose from 1 (the median of the first 5 values) to 9 (the median of a quarter")


def judged_at_end(losses):
    return explodes_at_end(TrainingLoss("train_loss", Series.of(np.arange(len(losses)), losses), Series.empty()))


FALLING = np.maximum(np.exp(-STEPS / 50), 0.1)
AT_END = {
    "three values": (np.where(STEPS > 396, 50.0, FALLING), 3),
    "ever steeper": (np.where(STEPS > 379, FALLING * np.exp((STEPS - 379.0) / 2), FALLING), 16),
    "with noise": (np.where(STEPS > 390, 1e3, 1.0) * noise(0.5), 9),
    "a short log": (np.where(np.arange(40) > 36, 30.0, 1.0), 3),
    "an eighth": (np.where(STEPS > 350, 30.0, 1.0), 49),
}


@pytest.mark.parametrize(("losses", "count"), AT_END.values(), ids=AT_END)
def test_losses_that_explode_at_the_end_are_found(losses, count):
    said = judged_at_end(losses) or ""
    assert f"rose to {losses[-1]:.3g} in the last {count} logged values" in said
    assert judged(losses) is None


@pytest.mark.parametrize(
    "losses",
    [
        *HEALTHY.values(),
        np.where(STEPS > 397, 50.0, FALLING),  # one or two bad batches
        np.where(STEPS > 390, 5.0, 1.0),
        np.where((STEPS > 390) & (STEPS < 399), 50.0, FALLING),  # it has come back
        np.where((STEPS > 390) | (STEPS == 7), 50.0, FALLING),
    ],
)
def test_other_ends_are_healthy(losses):
    assert judged_at_end(losses) is None


@pytest.mark.parametrize("count", [40, 100, 400])
def test_stationary_losses_do_not_explode_at_the_end(count):
    assert sum(judged_at_end(noise(1.5, seed, count)) is not None for seed in range(300)) <= 1


def test_the_page_warns_of_an_explosion_at_the_end(tmp_path):
    (section,) = make_sections([read(write(tmp_path, table(400, train_loss=AT_END["three values"][0])))], ())
    assert "train_loss was around 0.1, and rose to 50 in the last 3 logged values" in texts(section.findings)
    assert section.caution is None


RISING = np.linspace(0.01, 20, 400)
OTHER_LOSSES = {
    "parts of a loss": {"train_recon_loss": np.linspace(100, 60, 400), "train_kl_loss": RISING},
    "a validation": {"val_loss": RISING},
    "a weight": {"loss_weight": RISING},
    "bits of a quantization": {"quant_bits": np.where(STEPS < 200, 2.0, 8.0)},
    "an error": {"train_error": RISING},
    "a part beside the whole": {"loss": 1 / (1 + RISING), "kl_loss": RISING},
}


@pytest.mark.parametrize("losses", OTHER_LOSSES.values(), ids=OTHER_LOSSES)
def test_only_the_training_loss_tells_of_divergence(losses, tmp_path, capsys):
    path = write(tmp_path, table(400, **losses).drop(columns="train_loss"))
    (section,) = make_sections([read(path)], ())
    assert "out of control" not in texts(section.findings)
    assert "max_norm=" in run_main(capsys, "suggest", path)[1]


def test_losses_of_two_networks_tell_nothing_of_either(tmp_path):
    losses = {"g_loss": RISING, "train_loss": RISING}
    frame = pd.DataFrame({"step": STEPS, "grad/total_norm-Adam": 1.0, "grad/total_norm-Adam-1": 2.0} | losses)
    sections = make_sections([read(write(tmp_path, frame))], ())
    assert [section.caution for section in sections] == [None, None]
