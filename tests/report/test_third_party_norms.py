"""Norms that other code logged: the metric that is read, and the messages about it."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.utilities import grad_norm

from clip_callbacks import GradientClipping
from clip_callbacks.html_report.diagnosis import diagnose
from clip_callbacks.html_report.norm_metrics import NormMetric, find_norms, missing_norm_message, norms_of_others
from clip_callbacks.html_report.runs import Run
from clip_callbacks.html_report.series import Series
from clip_callbacks.html_report.sources import read_runs
from tests.helpers.logs import read, run_main, said, table, write
from tests.helpers.mlflow_store import three_loggers
from tests.helpers.training import Regression, data, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*")  # how MLflow asks SQLAlchemy

SOURCES = {"csv": "csv", "tensorboard": "board", "mlflow": "mlflow.db"}
STEPS = 12
PARAMETERS = {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}


class Logging(Regression):
    """A module that logs norms as Lightning's documentation shows."""

    def on_before_optimizer_step(self, optimizer):
        self.log_dict(grad_norm(self, norm_type=2))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """One fit without a callback of ours, in three loggers."""
    folder = tmp_path_factory.mktemp("theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        make_trainer(folder, logger=three_loggers(folder, "theirs"), log_every_n_steps=1, max_epochs=1).fit(Logging(), data(STEPS))
    return folder


def log_of(norms, name="grad_norm", **columns):
    """The log of other code, with a step, a loss and a norm in each row."""
    steps = np.arange(len(norms))
    return pd.DataFrame({"step": steps, "train_loss": 1 / np.sqrt(1 + steps), name: norms} | columns)


def text_of(frame):
    return frame.to_csv(index=False, na_rep="nan")


def lognormal(count=200, seed=0):
    return np.random.default_rng(seed).lognormal(0.0, 0.6, count)


# ---- Lightning's grad_norm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_what_lightnings_utility_logged_is_read_from_every_logger(theirs, source):
    (log,) = read(theirs / source).optimizer_logs
    frame = pd.read_csv(theirs / "csv/run/metrics.csv")
    assert log.norm == NormMetric("grad_2.0_norm_total", is_ours=False, norm_type=2.0)
    assert log.step_count == len(log.total_norm) == STEPS
    np.testing.assert_allclose(log.total_norm.values, frame["grad_2.0_norm_total"].dropna(), rtol=1e-6)
    blocks = log.blocks()
    assert set(blocks) == PARAMETERS
    for name, series in blocks.items():
        np.testing.assert_allclose(series.values, frame[f"grad_2.0_norm/{name}"].dropna(), rtol=1e-6)


def test_it_is_one_run_with_a_suggestion_and_what_the_log_does_not_tell(theirs, tmp_path, capsys):
    code, out, err = run_main(capsys, "suggest", "--json", theirs)
    (facts,) = json.loads(out).values()
    norms = pd.read_csv(theirs / "csv/run/metrics.csv")["grad_2.0_norm_total"].dropna()
    assert code == 0
    assert err.count("is the same run as") == 2
    assert facts["metric"] == "grad_2.0_norm_total"
    assert facts["percentiles"]["p90"] == pytest.approx(np.percentile(norms, 90))
    assert any("does not tell, nor which optimizer steps were clipped or skipped" in reason for reason in facts["reasons"])
    assert "norm_type" not in facts


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_metric_that_is_not_there_is_refused_with_those_that_look_like_norms(theirs, capsys, source):
    code, out, err = run_main(capsys, "suggest", theirs / source, "--norm", "grad_norms")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "holds no metric 'grad_norms'. These metrics look like norms: grad_2.0_norm_total, " in err


@pytest.mark.parametrize(
    ("columns", "blocks"),
    [
        (["grad_2.0_norm_total", "grad_2.0_norm/a.w", "grad_1.0_norm/a.w"], {"a.w": "grad_2.0_norm/a.w"}),
        (["grad_2.0_norm_total", "grad_2.0_norm.a.w", "grad_2.0_norm_total_epoch"], {"a.w": "grad_2.0_norm.a.w"}),
        (["grad_2.0_norm_total_step", "grad_2.0_norm/w_step", "grad_2.0_norm/w_epoch"], {"w": "grad_2.0_norm/w_step"}),
        (["ours-grad_inf_norm_total", "ours-grad_inf_norm/w"], {"w": "ours-grad_inf_norm/w"}),
        (["train/grad_2.0_norm_total", "train/grad_2.0_norm/w", "grad_norm_clipped"], {"w": "train/grad_2.0_norm/w"}),
        (["grad_norm", "grad_norm/w", "grad_norm_epoch"], {"w": "grad_norm/w"}),
        (["l2_norm/grad/global", "l2_norm/grad/w", "l2_norm/moment/w"], {"w": "l2_norm/grad/w"}),
        (["total_grad_norm", "grad_norm/w"], {"w": "grad_norm/w"}),
    ],
)
def test_norms_of_parameters_are_those_of_the_blocks(columns, blocks):
    metrics = {name: Series.of([0, 1], [place, place]) for place, name in enumerate(columns, 1)}
    (log,) = Run("run", "", metrics).optimizer_logs
    assert log.norm.name == columns[0]
    found = {block: series.values[0] for block, series in log.blocks().items()}
    assert found == {block: metrics[name].values[0] for block, name in blocks.items()}


def test_an_order_of_the_norm_is_in_the_suggestion(tmp_path, capsys):
    import yaml

    path = write(tmp_path, log_of(lognormal(), "grad_inf_norm_total"))
    _, out, _ = run_main(capsys, "suggest", path)
    clipping = yaml.safe_load(out[out.index("trainer:") : out.index("# or")])["trainer"]["callbacks"][0]["init_args"]
    assert GradientClipping(**clipping).norm_type == math.inf
    assert "The suggestion is for norms of order inf" in out
    facts = json.loads(run_main(capsys, "suggest", "--json", path)[1])
    assert facts[tmp_path.name]["norm_type"] == "inf"


# ---- which metric is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "grad_norm", "train/grad_norm", "train_grad_norm", "grad_norm_step", "GradNorm", "Train/GradNorm", "gradient_norm",
        "gnorm", "train_inner/gnorm", "optim/total_grad_norm", "l2_norm/grad/global", "actor/grad_norm", "grad-norm",
        "my run - train/grad_norm", "grad/norm", "grad_norm/total", "global_grad_norm", "grad_2.0_norm_total",
        "grad_1e-05_norm_total",
    ],
)  # fmt: skip
def test_names_tell_the_norm_of_all_gradients(name):
    assert [norm.name for norm in find_norms(["train_loss", name])] == [name]
    assert not find_norms([name])[0].is_ours


@pytest.mark.parametrize(
    "name",
    [
        "grad_norm_epoch", "grad_norm/model", "encoder.grad_norm", "grad_norm_2", "clipped_grad_norm", "max_grad_norm",
        "grad_norm_p90", "grad_norm_std", "grad-norm vs samples", "my run - train/grad_norm__MIN", "weight_norm", "norm",
        "gradient_accumulation", "grad_2.0_norm/net.0.weight", "degradation_norm",
    ],
)  # fmt: skip
def test_names_of_anything_else_are_listed_and_not_read(name, tmp_path, capsys):
    assert find_norms(["train_loss", name]) == ()
    code, _, err = run_main(capsys, "suggest", write(tmp_path, log_of(lognormal(60), name)))
    assert code == 2
    assert "holds neither grad/total_norm nor another metric that is known by its name as the norm of all gradients." in err
    assert f"These metrics look like norms: {name}. Choose one with --norm METRIC." in err
    assert run_main(capsys, "suggest", tmp_path, "--norm", name)[0] == 0


def test_a_log_in_which_nothing_looks_like_a_norm_says_how_to_log_one(tmp_path, capsys):
    _, _, err = run_main(capsys, "suggest", write(tmp_path, log_of(lognormal(60), "accuracy")))
    assert "It holds accuracy, train_loss: choose one with --norm METRIC." in err
    assert "GradientClipping(None) in the Trainer logs grad/total_norm" in err


def test_what_tensorboards_page_exports_needs_the_name_of_its_column(tmp_path, capsys):
    path = tmp_path / "run-train-tag-grad_norm.csv"
    norms = lognormal(60)
    pd.DataFrame({"Wall time": 1e9 + np.arange(60), "Step": np.arange(60), "Value": norms}).to_csv(path, index=False)
    _, _, err = run_main(capsys, "suggest", path)
    assert "It holds Value, Wall time: choose one with --norm METRIC." in err
    _, out, _ = run_main(capsys, "suggest", path, "--norm", "Value", "--json")
    (facts,) = json.loads(out).values()
    assert facts["percentiles"]["p50"] == pytest.approx(np.median(norms))


def test_of_many_that_look_like_norms_the_likely_ones_are_listed():
    names = [f"grad_norm/layer.{number}" for number in range(100)] + ["weight_norm", "my_grad_norm"]
    said = missing_norm_message("log", names)
    assert "look like norms: my_grad_norm, grad_norm/layer.0, " in said
    assert "and 94 more. Choose one with --norm" in said


def test_ours_comes_first_then_lightnings_then_the_shortest_name():
    names = ["grad_2.0_norm_total", "grad_1.0_norm_total", "grad_inf_norm_total", "grad_norm", "optim/grad_norm"]
    assert [norm.name for norm in norms_of_others(sorted(names, reverse=True))] == names
    assert [norm.name for norm in find_norms([*names, "grad/total_norm-SGD", "grad/total_norm-Adam"])] == [
        "grad/total_norm-Adam",
        "grad/total_norm-SGD",
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["train/grad_norm", "val/grad_norm"],
        ["training/grad_2.0_norm_total", "val/grad_2.0_norm_total", "test/grad_norm"],
        ["train_inner/gnorm", "eval/gnorm"],
        ["train/total_grad_norm", "net/grad_norm"],
        ["optimizer/global_grad_norm", "dev/grad_norm"],
    ],
)
def test_the_norm_of_the_training_comes_before_those_of_other_data_and_parts(names):
    assert [norm.name for norm in norms_of_others(names[::-1])] == names


def test_the_metric_that_was_read_is_named_if_others_could_be_meant(tmp_path):
    norms = lognormal(50)
    run = read(write(tmp_path / "theirs", log_of(norms, "actor/grad_norm", **{"critic/grad_norm": 2 * norms})))
    assert (
        "The norm of all gradients was read from actor/grad_norm. Use --norm to read another metric: critic/grad_norm." in run.notes
    )
    run = read(write(tmp_path / "ours", table(50, grad_norm=norms)))
    assert "The norm of all gradients was read from grad/total_norm. Use --norm to read another metric: grad_norm." in run.notes
    run = read(write(tmp_path / "alone", log_of(norms)))
    assert run.notes == ()


def test_several_norms_that_were_asked_for_stand_side_by_side(tmp_path, capsys):
    path = write(tmp_path, table(60, norm_g=lognormal(60, 1), norm_d=lognormal(60, 2)))
    (run,), _ = read_runs([str(path)], ["norm_g", "grad/total_norm", "norm_d"])
    assert [(log.name, log.norm.is_ours) for log in run.optimizer_logs] == [
        (f"{run.name} · norm_g", False),
        (run.name, True),
        (f"{run.name} · norm_d", False),
    ]
    assert run.optimizer_logs[1].total_norm.values.tolist() == run.metrics["grad/total_norm"].values.tolist()
    (alone,), _ = read_runs([str(path)], ["norm_g"])
    assert [log.name for log in alone.optimizer_logs] == [run.name]
    code, out, _ = run_main(capsys, "suggest", "--json", path, "--norm", "norm_g", "--norm", "norm_d", "--steps", ":39")
    assert code == 0
    assert [facts["steps"] for facts in json.loads(out).values()] == [40, 40]


def test_runs_without_the_metric_that_was_asked_for_are_left_out(tmp_path):
    write(tmp_path / "a", table(50)), write(tmp_path / "b", log_of(lognormal(50), "mine"))
    (run,), notes = read_runs([str(tmp_path)], ["mine"])
    assert run.name == "b"
    assert "holds no metric 'mine'. These metrics look like norms: grad/total_norm. " in notes[0]


def test_a_store_of_mlflow_holds_norms_of_any_name_behind_any_prefix(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=str(tmp_path / "mlruns"))
    experiment = client.create_experiment("theirs")
    for name in ("ours-grad/total_norm", "train/grad_norm", "mine", "accuracy"):
        identifier = client.create_run(experiment, run_name=name).info.run_id
        for step in range(3):
            client.log_metric(identifier, name, 1.0 + step, step=step)
    runs, _ = read_runs([str(tmp_path)])
    assert {log.norm.name for run in runs for log in run.optimizer_logs} == {"grad/total_norm", "train/grad_norm"}
    (run,), _ = read_runs([str(tmp_path)], ["mine"])
    assert run.optimizer_logs[0].total_norm.values.tolist() == [1.0, 2.0, 3.0]


# ---- tables --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["Step", "global_step", "trainer/global_step", "_step", "iteration", "\ufeffstep"])
def test_any_table_with_a_column_for_the_step_is_read(tmp_path, step):
    path = tmp_path / "history.csv"
    log_of(lognormal(30)).rename(columns={"step": step}).to_csv(path, index=False)
    run = read(path)
    assert run.metrics.keys() == {"train_loss", "grad_norm"}
    assert run.optimizer_logs[0].total_norm.steps.tolist() == list(range(30))
    path.write_text(path.read_text() + path.read_text().splitlines()[0].lstrip("\ufeff") + ",more\n30,1.0,2.0,3.0\n")
    assert len(read(path).optimizer_logs[0].total_norm) == 31


def test_norms_that_are_not_finite_are_counted_and_told(tmp_path, capsys):
    norms = lognormal(100)
    norms[[7, 8]], norms[50] = math.nan, math.inf
    path = write(tmp_path, text=text_of(log_of(norms)))
    _, out, _ = run_main(capsys, "suggest", path)
    assert "3 of 100 norms are ignored: NaN, inf or not above 0." in out
    facts = json.loads(run_main(capsys, "suggest", "--json", path)[1])[tmp_path.name]
    assert (facts["steps"], facts["left_out"]) == (97, 3)
    assert facts["percentiles"]["p50"] == pytest.approx(np.median(norms[np.isfinite(norms)]))
    assert "3 of 100 logged norms are NaN or inf, first at optimizer step 7" in said(read(path))


@pytest.mark.parametrize(("broken", "is_over"), [([7, 8, 99], False), ([7, 98, 99], True), ([99], False), (range(100), False)])
def test_norms_that_stay_nan_are_the_end(broken, is_over):
    norms = lognormal(100)
    norms[list(broken)] = math.nan
    run = Run("run", "", {"grad_norm": Series.of(np.arange(100), norms)})
    (found,) = [finding for finding in diagnose(run.optimizer_logs[0], {}) if "logged norms are NaN" in finding.text]
    assert ("None is finite after optimizer step 97" in found.text) is is_over
    assert found.severity == ("bad" if is_over else "warn")


# ---- messages ------------------------------------------------------------------------------------------------------------------


def test_what_the_log_does_not_tell_is_not_claimed():
    norms = lognormal(400)
    norms[100] = 60.0
    run = Run("run", "", {"grad_norm": Series.of(np.arange(1, 401), norms)})
    text = said(run)
    assert "The norms were logged as grad_norm, not by clip_callbacks. The log does not tell" in text
    for unknown in ("clipped or skipped", "before or after clipping", "loss scale", "each micro-batch"):
        assert unknown in text
    assert "was clipped" not in text
    assert f"p90 {np.percentile(norms, 90):.3g}" in text
    assert run.optimizer_logs[0].step_count == 400, "counted from 1"


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_what_was_read(tmp_path, capsys):
    norms = lognormal(60)
    norms[30] = 60.0
    write(tmp_path / "theirs", log_of(norms)), write(tmp_path / "calm", log_of(np.full(60, 1.0) + 0.1 * lognormal(60)))
    assert run_main(capsys, "report", tmp_path, "-o", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "The norm of theirs was logged by other code as grad_norm." in page
    assert "grad_norm over optimizer steps." in page
    assert "times the median of neighbouring steps</td>" in page, "whether it was clipped is not known"
    assert "The log does not tell whether steps were skipped. No logged norm is a spike." in page
    for claim in (
        "gradients before clipping, on the logged",
        "Clipped and skipped steps are",
        "within max_norm",
        "No step was skipped",
    ):
        assert claim not in page


def test_norms_taken_after_a_clip_give_no_number(tmp_path, capsys):
    norms = lognormal(200)
    clipped = np.where(norms > 1, norms / (norms + 1e-6), norms)
    path = write(tmp_path, log_of(clipped))
    code, out, _ = run_main(capsys, "suggest", path)
    assert code == 0
    assert (
        f"no suggestion: {(norms > 1).sum()} of 200 norms are 1, and none is larger: grad_norm was taken after clipping to "
        "that value." in out
    )
    assert "was taken after clipping" in said(read(path))
    seldom = np.minimum(norms, np.quantile(norms, 0.95))
    assert "max_norm=" in run_main(capsys, "suggest", write(tmp_path / "seldom", log_of(seldom)))[1]
    assert "max_norm=" in run_main(capsys, "suggest", write(tmp_path / "before", log_of(norms)))[1]


def test_a_loss_that_sums_up_the_run_does_not_hide_the_one_that_rose():
    steps = np.arange(1, 201)
    losses = np.where(steps < 5, 1.0, 9.0)
    metrics = {"loss": (steps, losses), "train_loss": ([200], [8.0]), "eval_loss": (steps, 1 / steps), "grad_norm": (steps, losses)}
    run = Run("run", "", {key: Series.of(*points) for key, points in metrics.items()})
    assert "loss rose from 1 to 9" in said(run)
