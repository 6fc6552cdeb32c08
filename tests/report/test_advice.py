"""The suggested max_norm, tested on distributions whose percentiles are known."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger

import clip_callbacks
from clip_callbacks import GradientNormMonitor
from clip_callbacks.html_report.page import make_sections
from clip_callbacks.html_report.sources import read_runs
from clip_callbacks.stats import advice as advice_module
from clip_callbacks.stats.advice import advise, rounded
from tests.helpers.matrix import examples
from tests.helpers.training import GradientTape


def of_scipy(name, *shapes, **options):
    """A distribution of SciPy, which is imported where it is needed: that takes a second."""
    from scipy import stats

    return getattr(stats, name)(*shapes, **options)


DISTRIBUTIONS = {
    "lognormal": partial(of_scipy, "lognorm", 0.6, scale=3.0),
    "wide lognormal": partial(of_scipy, "lognorm", 1.5, scale=1e-4),
    "gamma": partial(of_scipy, "gamma", 4.0, scale=50.0),
    "uniform": partial(of_scipy, "uniform", 0.5, 2.0),
    "pareto": partial(of_scipy, "pareto", 2.5, scale=0.1),
}


def drawn(distribution, count=20_000, seed=0):
    return torch.from_numpy(distribution.rvs(count, random_state=np.random.default_rng(seed)))


@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_the_percentiles_of_known_distributions_are_recovered(make):
    distribution = make()
    advice = advise(drawn(distribution))
    for percent, value in advice.percentiles.items():
        share = percent / 100
        # four standard errors of an empirical share: one draw in 16,000 is further off
        assert abs(distribution.cdf(value) - share) < 4 * math.sqrt(share * (1 - share) / 20_000), percent
    assert advice.max_norm == pytest.approx(
        distribution.ppf(0.9), rel=0.05 + 0.03
    )  # rounding to two digits, and the sampling error
    assert advice.clips == pytest.approx(0.1, abs=0.03)


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=200), st.randoms())
@settings(deadline=None, max_examples=examples(200))
def test_numbers_are_those_of_numpy(values, dice):
    bad = [math.nan, math.inf, -math.inf, 0.0, -1.0]
    mixed = values + bad
    dice.shuffle(mixed)
    advice = advise(torch.tensor(mixed, dtype=torch.float64))
    assert (advice.steps, advice.left_out) == (len(values), len(bad))
    for percent, value in advice.percentiles.items():
        assert value == pytest.approx(np.percentile(values, percent), rel=1e-9)
    assert advice.clips == np.mean(np.array(values) > advice.max_norm)
    assert advice.max_norm > 0
    assert advice.largest == max(values)


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=50), st.integers(1, 99))
@settings(deadline=None)
def test_rounding_clips_about_the_same_steps(values, percent):
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    exact = float(torch.quantile(ordered, percent / 100))
    short = rounded(exact, ordered)
    assert abs((ordered > short).double().mean() - (ordered > exact).double().mean()) <= 0.02 + 1e-12
    assert short == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("value", [2.04, 0.1443, 5.04, 7.559779775880585, 1.79e308, 5e-324])
def test_constant_norms_are_not_clipped_by_rounding_and_do_not_stand_out(value):
    advice = advise(torch.full((500,), value, dtype=torch.float64))
    assert advice.clips == 0.0
    assert advice.outliers == 0.0
    assert 0 < advice.max_norm < math.inf


def test_norms_within_five_percent_do_not_stand_out():
    advice = advise(torch.tensor([1.0] * 60 + [1.0001] * 40, dtype=torch.float64))
    assert advice.outliers == 0.0


@pytest.mark.parametrize("norms", [[], [math.nan] * 3, [0.0], [math.inf, -1.0]])
def test_without_a_norm_there_is_no_advice(norms):
    assert advise(torch.tensor(norms)) is None


def test_the_outliers_of_a_lognormal_distribution_are_its_share_beyond_three_sigma():
    advice = advise(drawn(of_scipy("lognorm", 0.7), 200_000))
    assert advice.outliers == pytest.approx(of_scipy("norm").sf(3.0), rel=0.15)


def test_spikes_are_a_tail_that_clipping_is_for():
    norms = drawn(of_scipy("lognorm", 0.3), 5000)
    norms[::50] *= 40
    advice = advise(norms)
    assert advice.outliers == pytest.approx(0.02, abs=0.004)
    assert any(f"{advice.outliers:.2%} of the steps are outliers" in reason for reason in advice.reasons)


def test_a_run_without_outliers_has_no_word_about_them():
    assert not any("outliers" in reason for reason in advise(torch.linspace(1.0, 2.0, 400)[torch.randperm(400)]).reasons)


def test_a_run_that_went_out_of_control_is_judged_by_the_quarter_with_the_lowest_median():
    calm, wild = drawn(of_scipy("lognorm", 0.2), 1000), drawn(of_scipy("lognorm", 0.2, scale=50.0), 3000)
    advice = advise(torch.cat([calm, wild]), out_of_control=True)
    assert advice.max_norm == float(f"{np.percentile(calm, 90):.1e}")
    assert advice.is_from_stable_quarter
    assert any("quarter of the run with the lowest median" in reason for reason in advice.reasons)


def test_norms_that_grow_in_a_healthy_run_are_judged_by_all_of_them():
    growing = drawn(of_scipy("lognorm", 0.1), 4000) * torch.linspace(1, 5, 4000)
    advice = advise(growing)
    assert advice.clips == pytest.approx(0.1, abs=0.021)
    assert not advice.is_from_stable_quarter
    assert any("If the loss grew too" in reason for reason in advice.reasons)


def test_a_dip_in_the_middle_is_no_growth():
    norms = torch.cat(
        [drawn(of_scipy("lognorm", 0.05, scale=scale), 500, seed) for seed, scale in enumerate((1.0, 0.3, 1.02, 1.02))]
    )
    advice = advise(norms, out_of_control=True)
    assert not advice.is_from_stable_quarter
    assert advice.clips == pytest.approx(0.1, abs=0.021)


def test_norms_that_fall_are_told_of():
    falling = drawn(of_scipy("lognorm", 0.1), 4000) * torch.logspace(1, -1, 4000)
    advice = advise(falling)
    assert advice.max_norm == float(f"{np.percentile(falling, 90):.1e}")
    assert any("no single number fits all of them" in reason for reason in advice.reasons)
    assert advice.quarters == pytest.approx([float(np.median(part)) for part in np.array_split(falling.numpy(), 4)])


def test_a_short_run_is_not_divided():
    norms = torch.logspace(0, 3, advice_module.MIN_NORMS_FOR_QUARTERS - 1)
    assert advise(norms).quarters == ()
    assert advise(norms).reasons[-1] == "There are fewer than 40 steps: ask again with a longer run."
    assert "log more often" in advise(norms, is_sampled=True).reasons[-1]


@pytest.mark.parametrize(("every", "steps"), [(1, 24), (3, 72)])
def test_only_who_logged_some_of_the_steps_is_told_to_log_more_often(trainer, tmp_path, every, steps, said):
    monitor, csv = GradientNormMonitor(), CSVLogger(tmp_path)
    fit = trainer(monitor, logger=csv, log_every_n_steps=every, max_steps=steps, max_epochs=-1)
    fit.fit(GradientTape(1 + torch.rand(24, 1)))
    (section,) = make_sections(read_runs([csv.log_dir])[0], ())
    assert section.advice.steps == 24, "of the log"
    assert ("log more often" in section.advice.describe()) == (every > 1)
    assert "log more often" not in " ".join([*said, *monitor.advice().reasons])


def test_facts_are_json_without_nan():
    facts = advise(drawn(DISTRIBUTIONS["gamma"](), 100)).facts()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("shape", ["steady", "falling"])
def test_the_configuration_is_one_that_lightning_cli_takes(adaptive, shape, tmp_path):
    import yaml

    from tests.integration.test_configuration import callbacks

    norms = drawn(of_scipy("lognorm", 0.2), 400) * (torch.logspace(2, 0, 400) if shape == "falling" else 1)
    advice = advise(norms)
    path = tmp_path / "advice.yaml"
    path.write_text(yaml.safe_dump(advice.configuration(adaptive=adaptive)))
    (callback,) = callbacks(f"--config={path}")
    (rule,) = callback.rules
    assert rule.max_norm == (eval(advice.adaptive_call, vars(clip_callbacks)) if adaptive else advice.max_norm)
