"""The suggested loss_above, tested on streams of losses whose spikes are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml

import clip_callbacks
from clip_callbacks import RobustZScoreLimit
from clip_callbacks.core.limits import BlockNorms
from clip_callbacks.html_report.page import make_sections
from clip_callbacks.stats.loss_advice import MAX_JUDGED_LOSSES, MIN_LOSSES, advise_on_losses, limits_at
from tests.helpers.logs import read, run_main, table, write

COUNT = 3000


def drawn(distribution, *options, seed=0, count=COUNT):
    """Random numbers by a method of NumPy's generators, without SciPy, which takes a second to import."""
    return getattr(np.random.default_rng(seed), distribution)(*options, size=count)


def advised(losses, spikes=(), **options):
    is_spike = torch.zeros(len(losses), dtype=torch.bool)
    is_spike[list(spikes)] = True
    return advise_on_losses(torch.as_tensor(losses, dtype=torch.float64), is_spike, **options)


STEPS = np.arange(COUNT)
STREAMS = {
    "gaussian": drawn("normal", 2.0, 0.3),
    "student": 5 + drawn("standard_t", 5),
    "drifting": 3 + 8 * np.exp(-STEPS / 300) + 0.2 * drawn("normal"),
    "negative": -STEPS / 100 + drawn("normal"),
    "shrinking": np.exp(-STEPS / 400) * drawn("lognormal", 0.0, 0.3),
    "quiet": 3 + 0.01 * drawn("normal"),
}


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_limits_of_all_steps_at_once_are_those_of_one_step_after_the_other(scale):
    losses = torch.from_numpy(np.exp(0.3 * drawn("normal", count=300)))
    limit, state = RobustZScoreLimit(12.0, window=64, warmup=25, scale=scale), None  # no loss is above it, so that none is cut
    state, expected = limit.init(1), []
    for loss in losses:
        now, state = limit.step(BlockNorms(loss.reshape(1), are_losses=True), state)
        expected.append(now)
    places = torch.arange(300)
    torch.testing.assert_close(limits_at(losses, places, limit), torch.cat(expected))
    torch.testing.assert_close(limits_at(losses, places[::7], limit), torch.cat(expected)[::7])


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("z", [3.0, 5.0, 12.0])
@pytest.mark.parametrize("distribution", [["normal"], ["standard_t", 2]], ids=["normal", "student"])
def test_the_tail_is_that_of_the_judged_losses_before(distribution, z, every):
    losses = torch.from_numpy(drawn(*distribution, count=600))
    limit = RobustZScoreLimit(z, window=64, warmup=25, scale="linear")
    tail, expected = limit.init(1)["tail"], []
    for place in range(0, 600, every):
        before = losses[max(0, place - 64) : place]
        unused = torch.full((64 - len(before),), torch.inf, dtype=torch.float64)
        state = {"recent": torch.cat([before, unused])[:, None], "sorted": torch.cat([before.sort().values, unused])[:, None]}
        loss = BlockNorms(losses[place : place + 1], are_losses=True)
        now, after = limit.step(loss, state | {"count": torch.tensor([place]), "tail": tail})
        tail = after["tail"]
        expected.append(now)
    torch.testing.assert_close(limits_at(losses, torch.arange(0, 600, every), limit), torch.cat(expected))


@pytest.mark.parametrize("name", STREAMS)
def test_ordinary_losses_are_not_skipped_and_spikes_are(name):
    losses = STREAMS[name].copy()
    places = np.arange(500, COUNT, 500)
    losses[places] += np.maximum(30 * np.std(np.diff(losses)), np.abs(losses[places]))
    advice = advised(losses, places)
    assert advice.ordinary_skips <= 0.001 * COUNT
    assert advice.skips == len(places) + advice.ordinary_skips
    assert advice.limit.scale == ("log" if name == "shrinking" else "linear")
    assert advice.limit.floor == 0.01
    assert advice.outcome.startswith(f"would have skipped {advice.skips} of 3,000 steps (5 spikes and {advice.ordinary_skips} ")


def test_the_scale_follows_from_the_tail():
    calls = [advised(drawn(*each, count=5000)).limit for each in (["normal"], ["standard_t", 4], ["standard_exponential"])]
    assert [(limit.z, limit.scale) for limit in calls] == [(4.0, "linear")] * 3
    heavier = drawn("lognormal", 0.0, 1.4, count=2000)
    advice = advised(heavier)
    assert (advice.limit.z, advice.limit.scale) == (4.0, "log")
    assert "because on the linear one more of them are above the limit with any of these z" in " ".join(advice.reasons)
    assert advised(heavier - 1.0) is None, "the logarithmic scale is for losses above 0"


def test_a_larger_z_is_taken_where_four_is_too_small():
    losses = drawn("normal", count=5000)
    losses[200::400] = 5.5
    assert advised(losses).limit.z == 5.0


def test_losses_that_no_limit_fits_give_no_suggestion():
    assert advised(np.where(STEPS % 20 == 0, 100.0, 1.0) + 0.1 * drawn("normal")) is None


def test_a_short_run_gives_no_suggestion():
    losses = drawn("normal", count=MIN_LOSSES)
    assert advised(losses[1:]) is None
    assert advised(losses) is not None


def test_the_reasons_say_what_the_log_leaves_open():
    losses = drawn("normal", 2.0, 0.1, count=2 * MAX_JUDGED_LOSSES)
    reasons = " ".join(advised(losses, metric="train_loss", is_ours=False, steps_between=50.0).reasons)
    assert "About one loss in 50 steps was logged, but the guard sees all" in reasons
    assert "spans 128 steps instead of 6,400" in reasons
    assert "The module logged train_loss. The guard judges the loss that training_step returns" in reasons
    assert "10,000 of 20,000 logged losses, evenly spread over the run, were judged." in reasons
    reasons = " ".join(advised(losses[:1000]).reasons)
    assert not any(part in reasons for part in ("About one loss", "The module logged", "evenly spread"))


@pytest.mark.parametrize("name", STREAMS)
def test_the_configuration_is_that_of_the_limit(name):
    advice = advised(STREAMS[name])
    assert eval(advice.call, vars(clip_callbacks)) == advice.limit
    (guard,) = yaml.safe_load(yaml.safe_dump(advice.configuration()))["trainer"]["callbacks"]
    given = guard["init_args"]["loss_above"]
    assert guard["class_path"] == "clip_callbacks.NonFiniteGuard"
    assert getattr(clip_callbacks, given["class_path"].rpartition(".")[2])(**given["init_args"]) == advice.limit
    facts = advice.facts()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_the_command_and_the_page_give_it(tmp_path, capsys):
    losses = 2 + 0.02 * drawn("normal", count=400)
    losses[300] = 5.0
    path = write(tmp_path, table(400, train_loss=losses))
    code, out, _ = run_main(capsys, "suggest", path)
    assert code == 0
    assert "loss_above=RobustZScoreLimit(z=4.0, floor=0.01, scale='linear') would have skipped 1 of 400 steps (1 spike" in out
    (guard,) = yaml.safe_load(out[out.rindex("trainer:") :])["trainer"]["callbacks"]
    assert guard["init_args"]["loss_above"]["init_args"] == {"z": 4.0, "floor": 0.01, "scale": "linear"}
    facts = json.loads(run_main(capsys, "suggest", "--json", path)[1])[tmp_path.name]
    assert facts["max_norm"] > 0
    assert (facts["loss_above"]["skips"], facts["loss_above"]["metric"]) == (1, "train_loss")


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_no_limit_fits_is_told_of(tmp_path, capsys):
    losses = np.where(np.arange(400) % 100 < 20, 100.0, 1.0) + 0.1 * drawn("normal", count=400)  # each jump lasts: no spike
    path = write(tmp_path, table(400, train_loss=losses))
    code, out, _ = run_main(capsys, "suggest", path)
    assert code == 0
    assert "No suggestion of a loss_above: more than 0.1% of the losses that are no spikes in hindsight" in out
    assert json.loads(run_main(capsys, "suggest", "--json", path)[1])[tmp_path.name]["loss_above"] is None
    assert run_main(capsys, "report", path, "-o", tmp_path / "page.html")[0] == 0
    assert "No suggestion of a loss_above" in (tmp_path / "page.html").read_text()
    assert "No suggestion of a loss_above" not in run_main(capsys, "suggest", write(tmp_path / "short", table(50)))[1]


@pytest.mark.usefixtures("undrawn")
def test_a_run_out_of_control_and_one_without_a_loss_get_none(tmp_path, capsys):
    grown = table(200, train_loss=np.concatenate([[7.0], np.full(199, 50.0)]))
    frames = {"grown": grown, "silent": table(200).drop(columns="train_loss"), "calm": table(200)}
    sections = make_sections([read(write(tmp_path / name, frame)) for name, frame in frames.items()], ())
    by_name = {section.log.name: section for section in sections}
    assert [by_name[name].loss_advice for name in ("grown", "silent")] == [None, None]
    assert by_name["calm"].loss_advice is not None
    assert run_main(capsys, "report", tmp_path / "calm", "-o", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "Suggested max_norm and loss_above" in page
    assert "YAML of loss_above for calm" in page
