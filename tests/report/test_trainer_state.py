"""Reading of trainer_state.json, which the Trainer of transformers writes."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

from clip_callbacks.html_report.runs import UnusableLogError
from clip_callbacks.html_report.sources import read_runs
from tests.helpers.logs import read, run_main, said

EVERY = 10
BROKEN = {210: math.nan, 220: -math.inf, 500: math.inf}


def history(steps=600, seed=0):
    """The log_history of a run up to some step."""
    dice = np.random.default_rng(seed)
    entries = []
    for step in range(EVERY, steps + 1, EVERY):
        norm = BROKEN.get(step, float(dice.lognormal(0.0, 0.6)))
        epoch = step / 300
        entries.append({"epoch": epoch, "grad_norm": norm, "learning_rate": 1e-4, "loss": 3 / math.sqrt(step), "step": step})
        if step % 200 == 0:
            entries.append({"epoch": epoch, "eval_loss": 3.1 / math.sqrt(step), "eval_runtime": 1.5, "step": step})
    return entries


def summary(steps=600):
    return {"epoch": 2.0, "step": steps, "total_flos": 1e9, "train_loss": 0.3, "train_runtime": 12.0}


def save(folder, entries):
    """Write a state as ``TrainerState.save_to_json`` does."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": EVERY * len(entries), "logging_steps": EVERY, "log_history": entries}
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run with three checkpoints."""
    folder = tmp_path / "out"
    for step in (5, 200, 600):  # 5: before the first logged step
        save(folder / f"checkpoint-{step}", history(step))
    return save(folder, [*history(), summary()])


def test_norms_losses_and_steps_are_read(finished):
    run = read(finished)
    (log,) = run.optimizer_logs
    expected = [entry["grad_norm"] for entry in history() if "grad_norm" in entry]
    assert (run.name, log.norm.name, log.step_count) == ("out", "grad_norm", 600)
    np.testing.assert_array_equal(log.logged_norm.values, expected)
    assert log.logged_norm.steps.tolist() == list(range(EVERY, 601, EVERY))
    assert list(run.losses()) == ["loss", "eval_loss"]
    assert "Of 4 trainer_state.json files the folder's own was read: it holds everything that the others hold." in run.notes


def test_what_is_written_by_transformers_is_read_as_well(tmp_path):
    trainer_callback = pytest.importorskip("transformers.trainer_callback")
    state = trainer_callback.TrainerState(log_history=history(), global_step=600)
    (tmp_path / "real").mkdir()
    state.save_to_json(str(tmp_path / "real/trainer_state.json"))
    real, like = read(tmp_path / "real"), read(save(tmp_path / "like", history()))
    assert real.metrics.keys() == like.metrics.keys()
    for key, series in like.metrics.items():
        np.testing.assert_array_equal(real.metrics[key].values, series.values)


def test_numbers_that_are_not_finite_are_counted_and_told(finished, capsys):
    code, out, _ = run_main(capsys, "suggest", finished)
    assert code == 0
    assert "3 of 60 norms are ignored: NaN, inf or not above 0." in out
    assert "the suggestion is also one for its max_grad_norm" in out
    text = said(read(finished))
    assert "3 of 60 logged norms are NaN or inf, first at optimizer step 210" in text
    assert "max_grad_norm of the Trainer (1.0 by default) is not in trainer_state.json" in text
    assert "was clipped" not in text


def test_without_a_state_of_its_own_a_folder_is_read_from_the_last_checkpoint(finished):
    (finished / "trainer_state.json").unlink()
    run = read(finished)
    assert (run.name, run.source) == ("out", str(finished / "checkpoint-600/trainer_state.json"))
    assert "Of 3 trainer_state.json files that of checkpoint-600 was read: it holds everything that the others hold." in run.notes


def test_a_run_that_went_on_after_its_state_was_saved_is_read_to_its_end(finished):
    save(finished / "checkpoint-900", history(900))
    assert read(finished).optimizer_logs[0].step_count == 900


def test_a_checkpoint_that_was_left_by_another_run_is_a_run_by_itself(finished):
    save(finished / "checkpoint-800", history(800, seed=1))
    runs, _ = read_runs([str(finished)])
    assert [run.optimizer_logs[0].step_count for run in runs] == [800, 600]
    assert len({run.name for run in runs}) == 2


def test_checkpoints_that_are_named_are_read_themselves(finished):
    named = [finished / "checkpoint-200", finished / "checkpoint-600/trainer_state.json"]
    runs, _ = read_runs([str(path) for path in named])
    assert [(run.name, run.optimizer_logs[0].step_count) for run in runs] == [("checkpoint-200", 200), ("checkpoint-600", 600)]
    shutil.copy(named[1], finished / "copy.json")
    assert len(read(finished / "copy.json").optimizer_logs[0].logged_norm) == 60
    assert len(read_runs([str(finished), *map(str, named)])[0]) == 1, "named twice, read once"


def test_a_run_that_went_to_tensorboard_too_is_shown_once(finished):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(finished / "runs/host")) as writer:  # goes further than the last checkpoint
        for entry in history(700):
            for key, value in entry.items():
                name = key.replace("eval_", "eval/") if key.startswith("eval_") else f"train/{key}"
                if key != "step":
                    writer.add_scalar(name, value, entry["step"])
    (run,), notes = read_runs([str(finished)])
    assert (run.kind, run.optimizer_logs[0].norm.name, len(run.optimizer_logs[0].logged_norm)) == (
        "TensorBoard",
        "train/grad_norm",
        70,
    )
    assert any("is the same run as" in note for note in notes)


def test_what_is_no_number_is_no_metric_and_null_is_nan(tmp_path):
    entries = history(300)
    entries[0] |= {"mode": "train", "flag": True, "list": [1.0], "grad_norm": None, "loss": "2.5"}
    run = read(save(tmp_path, [*entries, {"grad_norm": 1.0}, "text"]))
    assert not {"mode", "flag", "list"} & run.metrics.keys()
    assert math.isnan(run.metrics["grad_norm"].values[0])
    assert run.metrics["loss"].values[0] == 2.5
    assert any("2 entries of trainer_state.json have no step" in note for note in run.notes)


def test_two_runs_of_one_folder_are_told_apart_by_numbers(tmp_path):
    for seed, steps in enumerate((300, 600)):
        save(tmp_path / f"deep/out/checkpoint-{steps}", history(steps, seed))
    save(tmp_path / "other/run", history(300, 2)), save(tmp_path / "another/run", history(300, 3))
    runs, _ = read_runs([str(tmp_path)])
    assert {run.name for run in runs} == {"out", "out (2)", "other/run", "another/run"}


def test_steps_that_are_none_are_left_out_and_counted(tmp_path):
    odd = [{"step": step, "grad_norm": 9.0} for step in (10**30, -(2**63), math.inf, math.nan, None, "later")]
    run = read(save(tmp_path, [*odd, *history(300)]))
    assert run.metrics["grad_norm"].steps.tolist() == list(range(EVERY, 301, EVERY))
    assert any("6 entries of trainer_state.json have no step" in note for note in run.notes)


def test_a_damaged_checkpoint_does_not_take_the_others_along(finished):
    (finished / "checkpoint-600/trainer_state.json").write_text('{"log_history": [')
    (run,), notes = read_runs([str(finished)])
    assert run.optimizer_logs[0].step_count == 600
    assert "must be JSON" in notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON, as the Trainer of transformers writes it"),
        ("[1]", "must have a list 'log_history'"),
        ('{"log_history": null}', "must have a list 'log_history'"),
        ('{"log_history": []}', "holds an empty log_history: nothing was logged"),
        ('{"log_history": [{"step": 1, "loss": 2.0}]}', "holds neither grad/total_norm nor another metric that is known"),
        ("[" * 100_000, "must be JSON"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path, text, message):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(UnusableLogError, match=message.replace("[", r"\[")):
        read_runs([str(tmp_path)])
