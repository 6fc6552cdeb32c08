"""Findings of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from clip_callbacks import GradientClipping, GradientNormMonitor, NonFiniteGuard
from clip_callbacks.html_report.bad_steps import bad_steps
from clip_callbacks.html_report.diagnosis import diagnose
from clip_callbacks.html_report.page import make_sections
from clip_callbacks.html_report.runs import Run
from clip_callbacks.html_report.series import Series
from tests.helpers.logs import read, run_main, said, table, texts, write
from tests.helpers.training import Poisoned, TwoNetworks, data

pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*")  # how MLflow asks SQLAlchemy


# ---- findings ------------------------------------------------------------------------------------------------------------------


def test_the_share_of_clipped_steps_counts_steps_that_were_not_logged(trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    clipping = GradientClipping(6.5)
    from tests.helpers.training import GradientTape

    feed = torch.tensor([1.0, 9.0, 9.0, 2.0, 1.0, 9.0, 1.0])[:, None]
    trainer(clipping, logger=logger, log_every_n_steps=3).fit(GradientTape(feed))
    (log,) = read(Path(logger.log_dir)).optimizer_logs
    assert log.clipped_share == pytest.approx(3 / 6)  # the seventh step was not logged


def test_several_optimizers_have_logs_of_their_own(trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(GradientClipping(1.0), GradientNormMonitor(), logger=logger).fit(TwoNetworks(), data())
    run = read(Path(logger.log_dir))
    assert [log.suffix for log in run.optimizer_logs] == ["-SGD", "-SGD-1"]
    assert [log.name for log in run.optimizer_logs] == [f"{run.name} · SGD", f"{run.name} · SGD-1"]
    assert [list(log.blocks()) for log in run.optimizer_logs] == [["generator"], ["discriminator"]]
    assert all(len(log.total_norm) == 12 for log in run.optimizer_logs)


@pytest.mark.filterwarnings("ignore:Spike at")
def test_spikes_of_one_of_several_optimizers_are_listed_once(trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    guard = NonFiniteGuard(skip_above=1e3)
    trainer(guard, GradientClipping(None), logger=logger).fit(TwoNetworks({30: 1e5, 31: 1e5}), data(40))
    assert [guard.skipped_steps_of(index) for index in (0, 1)] == [2, 0]
    run = read(Path(logger.log_dir))
    first, second = make_sections([run], ())
    assert [(row.step, row.outcome) for row in first.bad_steps] == [(30, "skipped as a spike"), (31, "skipped as a spike")]
    assert [row.where for row in first.bad_steps] == [f"global_step {2 * n}, epoch 0, batch {n}, rank 0" for n in (30, 31)]
    assert (first.bad_count, second.bad_count) == (2, 0)
    assert "The log ends" not in texts(first.findings), "good steps follow, although global_step counts each batch twice"
    assert len(run.between(30, 30).bad_steps) == 1


def test_99_percent_clipped_is_a_learning_rate(tmp_path):
    frame = table(1000)
    frame["grad/clip_fraction"] = np.where(np.arange(1000) % 100, 1.0, 0.0)
    text = said(read(write(tmp_path, frame)))
    p90 = np.percentile(frame["grad/total_norm"], 90)
    assert "99% of steps are clipped by max_norm 1. max_norm acts as a learning rate" in text
    assert f"The p90 of the norm is {p90:.3g}" in text


def test_findings_name_what_they_find(tmp_path):
    steps = 400
    frame = table(
        steps,
        **{
            "grad/amp_scale": np.geomspace(65536, 2**-5, steps),
            "grad_norm/whole": table(steps)["grad/total_norm"] * 0.99,
            "grad_norm/dead": 1e-9,
            "update_ratio/whole": 0.5,
            "update_ratio/dead": 1e-9,
            "grad/shadow_clip_fraction/QuantileLimit(0.1)": 0.25,
        },
    )
    frame.loc[300:, "train_loss"] = math.nan
    frame.loc[123, "grad/total_norm"] = 5000.0
    frame["grad/skipped_steps"] = np.minimum(np.arange(steps) // 20, 7)
    path = write(tmp_path, text=frame.to_csv(index=False, na_rep="nan"))
    text = said(read(path))
    for part in (
        "train_loss is NaN or inf from optimizer step 300 to the end, at 100 logged steps.",
        "7 of 400 steps were skipped (1.75%)",
        "5e+03 at optimizer step 123",
        "The loss scale has fallen to 0.0312",
        "The norm of whole alone is 99% of total_norm",
        "The update-to-weight ratio of whole is above 0.01",
        "The update-to-weight ratio of dead is below 1e-05",
        "QuantileLimit(0.1) 25.0%",
    ):
        assert part in text, part


def test_a_healthy_run_gives_no_alarm(tmp_path):
    (section,) = make_sections([read(write(tmp_path, table(1000)))], ())
    assert {finding.severity for finding in section.findings} <= {"good", "note"}
    assert section.caution is None


def nan_at(steps, *places, level=1.0):
    """A loss that is NaN at some steps."""
    losses = np.full(steps, level)
    losses[list(places)] = math.nan
    return losses


def test_a_loss_is_broken_from_the_first_step_after_the_last_finite_one(tmp_path):
    norms = np.where(np.isin(np.arange(60), [5, 57, 58, 59]), math.nan, 1.0)
    frame = table(60, train_loss=nan_at(60, 5, 57, 58, 59), **{"grad/total_norm": norms}).drop(columns="grad/skipped_steps")
    text = said(read(write(tmp_path, text=frame.to_csv(index=False, na_rep="nan"))))
    assert "train_loss is NaN or inf from optimizer step 57 to the end, at 3 logged steps: nothing was learned from them." in text
    assert "GradientClipping skips such steps" in text


@pytest.mark.parametrize("places", [(5, 59), (59,)])
def test_a_skipped_step_at_the_end_is_no_broken_run(places, tmp_path):
    text = said(read(write(tmp_path, text=table(60, train_loss=nan_at(60, *places)).to_csv(index=False, na_rep="nan"))))
    assert f"train_loss is NaN or inf at {len(places)} of 60 logged steps, first at optimizer step {places[0]}." in text
    assert "to the end" not in text


@pytest.mark.parametrize("key", ["val_loss", "train_loss", "train_loss_epoch"])
def test_means_that_are_not_finite_do_not_tell_whether_steps_were_learned_from(key, tmp_path):
    frame = table(58).drop(columns="train_loss")
    ends = np.where(np.arange(60) % 10 == 9, "nan", "")
    frame = frame.reindex(range(60)).assign(step=range(60), **{key: ends})
    text = said(read(write(tmp_path, frame)))
    assert f"{key} is NaN or inf from optimizer step 9 to the end, at 6 logged steps." in text
    assert "nothing was learned" not in text


def test_a_loss_that_grew_warns_of_its_norms(tmp_path):
    frame = table(200, train_loss=np.concatenate([[7.0], np.full(199, 50.0)]))
    (section,) = make_sections([read(write(tmp_path, frame))], ())
    assert "train_loss rose from 7 to 50" in (section.caution or "")
    assert section.caution in texts(section.findings)


def test_a_limit_that_never_clips_guards_against_spikes(tmp_path):
    frame = table(200, **{"grad/clip_fraction": 0.0, "grad/max_norm": 1000.0})
    assert "Fewer than 0.1% of steps are clipped by max_norm 1e+03, which guards against rare spikes" in said(
        read(write(tmp_path, frame))
    )


@pytest.mark.parametrize("fraction", [{}, {"grad/clip_fraction": np.zeros(60)}])
def test_a_log_without_max_norm_does_not_tell_whether_other_code_clipped(fraction, tmp_path):
    norms = np.where(np.arange(60) == 30, 50.0, 1.0)
    frame = pd.DataFrame({"step": range(60), "grad/total_norm": norms} | fraction)
    (section,) = make_sections([read(write(tmp_path, frame))], ())
    said_of_it = texts(section.findings)
    assert "these callbacks clipped no step by its norm. The log does not tell whether anything else clipped" in said_of_it
    assert [row.details for row in section.bad_steps] == ["50 times the median of neighbouring steps"]


def test_a_log_without_counts_does_not_tell_of_clipped_and_skipped_steps(tmp_path):
    frame = pd.DataFrame({"step": range(0, 600, 10), "grad/total_norm": 1.0})
    (section,) = make_sections([read(write(tmp_path, frame))], ())
    assert "About one step in 10 was logged" in texts(section.findings)
    assert "are counted over all steps" not in texts(section.findings)
    assert section.no_bad_steps.startswith("The log does not tell whether steps were skipped.")


def test_a_spike_within_the_limit_is_told_of_with_it(tmp_path):
    norms = np.where(np.arange(60) == 30, 50.0, 1.0)
    frame = table(60, **{"grad/total_norm": norms, "grad/max_norm": 80.0})
    rows, _ = bad_steps(read(write(tmp_path, frame)).optimizer_logs[0])
    assert [row.details for row in rows] == ["50 times the median of neighbouring steps; within max_norm 80"]


def test_the_journal_names_tensors_in_the_table_of_bad_steps(trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    with pytest.warns(RuntimeWarning, match="Non-finite"):
        trainer(GradientClipping(0.5), logger=logger).fit(Poisoned({2: math.nan, 5: math.inf}), data(8))
    (log,) = read(Path(logger.log_dir)).optimizer_logs
    rows, count = bad_steps(log)
    assert [(row.step, row.outcome) for row in rows] == [(2, "skipped"), (5, "skipped")]
    assert count == 2
    assert rows[0].where == "epoch 0, batch 2, rank 0"
    assert rows[0].details == 'stage "loss"; not finite: net.0.weight, net.0.bias, net.2.weight, net.2.bias'
    assert '2 of 8 steps were skipped (25.00%). The most frequent stage is "loss": the loss was not finite.' in texts(
        diagnose(log, {})
    )


def test_spikes_skipped_by_the_guard_are_rows_with_their_norm(trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    with pytest.warns(RuntimeWarning, match="Spike"):
        trainer(NonFiniteGuard(skip_above=1e3), GradientClipping(1.0), logger=logger).fit(Poisoned({3: 1e6}), data(30))
    rows, _ = bad_steps(read(Path(logger.log_dir)).optimizer_logs[0])
    (spike,) = [row for row in rows if row.outcome == "skipped as a spike"]
    assert [row.step for row in rows].count(3) == 1
    assert spike.step == 3
    assert spike.norm > 1e3
    assert "net.0.weight" in spike.details


def test_without_a_journal_skips_are_rows_too(tmp_path):
    frame = table(50, **{"grad/skipped_steps": [0.0] * 20 + [2.0] * 30})
    rows, _ = bad_steps(read(write(tmp_path, frame)).optimizer_logs[0])
    assert (20, "skipped") in [(row.step, row.outcome) for row in rows]


def test_a_broken_journal_is_noted(tmp_path):
    path = write(tmp_path, table())
    good = {"step": 3, "epoch": 0, "batch": 3, "rank": 0, "policy": "skip", "stage": "loss", "gradients": [{"name": "w"}]}
    (tmp_path / "nonfinite_steps.jsonl").write_text(json.dumps(good) + "\n{not json\n[1]\n" + '{"step": 5, "gradients": 5}')
    run = read(path)
    assert len(run.bad_steps) == 1
    assert "3 lines of nonfinite_steps.jsonl cannot be read" in run.notes[0]


@pytest.mark.parametrize(
    ("keys", "losses"),
    [
        (["train_loss", "val_loss", "lr-SGD", "epoch"], ["train_loss", "val_loss"]),
        (["train_loss_step", "train_loss_epoch", "val_loss"], ["train_loss_step", "val_loss"]),
        (["train_loss_epoch"], ["train_loss_epoch"]),
        (["train_bits", "val_bits", "grad_norm/x"], ["train_bits", "val_bits"]),
        (
            ["train/Loss", "kl_loss", "epoch_loss", "gradient_penalty_loss", "val-NLL"],
            ["train/Loss", "kl_loss", "epoch_loss", "gradient_penalty_loss", "val-NLL"],
        ),
        (["loss", "loss_weight", "kl/loss_scale", "mse_coef"], ["loss"]),
        (["train_acc", "val_f1", "train_time", "lossless", "accuracy"], []),
    ],
)
def test_losses_are_found_by_their_names(keys, losses):
    metrics = {key: Series.of([0], [1.0]) for key in keys}
    assert list(Run("run", "", metrics).losses()) == losses


def test_spikes_are_told_by_the_norms_around_them():
    falling = np.geomspace(10, 0.1, 400) * np.random.default_rng(0).lognormal(0, 0.05, 400)
    falling[300] *= 8
    run = Run("run", "", {"grad/total_norm": Series.of(np.arange(400), falling)})
    found, times = run.optimizer_logs[0].norm_spikes
    assert found.steps.tolist() == [300]
    assert times[0] == pytest.approx(8, rel=0.2)


def test_norms_logged_as_not_finite_are_rows(tmp_path):
    frame = table(60)
    frame.loc[7, "grad/total_norm"] = math.nan
    rows, _ = bad_steps(read(write(tmp_path, text=frame.to_csv(index=False, na_rep="nan"))).optimizer_logs[0])
    assert (7, "norm not finite") in [(row.step, row.outcome) for row in rows]


def test_limits_that_were_not_logged_clip_all_the_same(tmp_path):
    frame = table(60, **{"grad/clip_fraction": 1.0}).drop(columns="grad/max_norm")
    assert "100% of steps are clipped by a max_norm that was not logged" in said(read(write(tmp_path, frame)))


def test_a_run_out_of_control_gets_no_number(tmp_path, capsys):
    frame = table(200, train_loss=np.concatenate([[7.0], np.full(199, 50.0)]))
    path = write(tmp_path, frame)
    assert "no suggestion: train_loss rose from 7 to 50" in run_main(capsys, "suggest", path)[1]
    assert json.loads(run_main(capsys, "suggest", "--json", path)[1])[tmp_path.name]["max_norm"] is None


def test_blocks_keep_what_tells_them_apart():
    from clip_callbacks.html_report.axes import natural_order, shorten, without_common_parts

    names = [
        f"encoder.transformer.layers.{number}.attention.{part}.projection" for number in range(12) for part in ("key", "value")
    ]
    assert without_common_parts(names) == [f"{number}.attention.{part}" for number in range(12) for part in ("key", "value")]
    assert without_common_parts(["a.b", "a"]) == ["b", "a"]
    assert without_common_parts(["one.name"]) == ["one.name"]
    assert shorten("abcdefghij", 7) == "abc…hij"
    assert sorted(["l.10", "l.9", "k"], key=natural_order) == ["k", "l.9", "l.10"]


@pytest.mark.parametrize(
    ("steps", "count"), [([1, 2, 3], 50), ([1049, 1050, 1051], 20)], ids=["from the beginning", "from mid-run"]
)
def test_more_skipped_steps_than_the_log_has_steps_are_no_share_of_them(tmp_path, steps, count):
    counts = {f"grad/{which}_steps": [30.0, 40.0, 50.0] for which in ("skipped", "overflowed")}
    (section,) = make_sections([read(write(tmp_path, table(3, step=steps, **counts)))], ())
    told, overflows = [finding.text for finding in section.findings if "skipped" in finding.text]
    assert "The log does not tell of how many" in told
    assert overflows.startswith(f"{count} optimizer steps overflowed")
    assert "%" not in told
