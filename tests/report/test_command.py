"""The commands clip-callbacks report and clip-callbacks suggest."""

from __future__ import annotations

import io
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from clip_callbacks import GradientClipping, NonFiniteGradientError, NonFiniteGuard
from clip_callbacks.cli import main
from clip_callbacks.html_report.page import make_sections
from clip_callbacks.html_report.sources import read_runs
from tests.helpers.logs import journalled, read, run_main, said, table, texts, write
from tests.helpers.training import Poisoned, Regression, data

pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*")  # how MLflow asks SQLAlchemy


def test_suggest_in_text_holds_yaml_to_paste(tmp_path, capsys):
    import yaml

    frame = table(1000)
    code, out, err = run_main(capsys, "suggest", write(tmp_path, frame))
    assert (code, err) == (0, "")
    p90 = np.percentile(frame["grad/total_norm"], 90)
    assert f"max_norm={float(f'{p90:.1e}'):g} for the norm of all gradients would have clipped" in out
    snippet = yaml.safe_load(out[out.index("trainer:") : out.index("# or")])
    assert snippet["trainer"]["callbacks"][0]["init_args"]["max_norm"] == float(f"{p90:.1e}")


def test_suggest_as_json(tmp_path, capsys):
    write(tmp_path / "a", table(1000)), write(tmp_path / "b", table(10, seed=1))
    code, out, _ = run_main(capsys, "suggest", "--json", tmp_path)
    facts = json.loads(out)
    assert code == 0
    assert set(facts) == {"a", "b"}
    assert facts["a"]["percentiles"]["p50"] == pytest.approx(np.median(table(1000)["grad/total_norm"]))
    assert facts["b"]["steps"] == 10


def test_steps_can_be_chosen(tmp_path, capsys):
    path = write(tmp_path, table(100))
    for steps, count in (("10:19", 10), (":4", 5), ("90:", 10)):
        _, out, _ = run_main(capsys, "suggest", "--json", "--steps", steps, path)
        assert next(iter(json.loads(out).values()))["steps"] == count


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, capsys):
    for folder in ("x/csv/version_0", "y/csv/version_0", "y/csv/version_1"):
        write(tmp_path / folder, table(20, seed=len(folder) + random.Random(folder).randrange(99)))
    runs, _ = read_runs([str(tmp_path)])
    assert [run.name for run in runs] == ["x/csv/version_0", "y/csv/version_0", "version_1"]


@pytest.mark.usefixtures("undrawn")  # only the PNG files are drawn
def test_plots_are_written_as_png(tmp_path, capsys):
    from PIL import Image

    code, out, _ = run_main(capsys, "report", write(tmp_path, table()), "-o", tmp_path / "r.html", "--png", tmp_path / "png")
    assert code == 0
    assert "r.html" in out
    names = {path.name for path in (tmp_path / "png").iterdir()}
    assert names == {"norm.png", "loss.png", "coefficient.png", "histogram.png", "what_if.png"}
    for path in (tmp_path / "png").iterdir():
        with Image.open(path) as picture:
            assert picture.width == 1410
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, "an empty picture has one color"


def unusable(tmp_path):
    """Input that cannot be used, with a part of the expected error message."""
    missing_norm_message = table()[["step", "train_loss"]]
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary/metrics.csv").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "events").mkdir()
    (tmp_path / "events/events.out.tfevents.1").write_bytes(b"this is no event file, whatever its name says")
    (tmp_path / "no_events").mkdir()
    (tmp_path / "no_events/events.out.tfevents.1").write_bytes(b"")
    (tmp_path / "other.db").write_bytes(b"no database")
    return {
        "nowhere": (tmp_path / "nowhere", "no such file or folder"),
        "empty folder": (tmp_path / "empty_folder", "holds no log that can be read"),
        "no grad metrics": (write(tmp_path / "no_norm", missing_norm_message), "holds neither grad/total_norm nor"),
        "empty file": (write(tmp_path / "nothing", text=""), "is empty: nothing was logged"),
        "header only": (write(tmp_path / "header", text="step,grad/total_norm\n"), "holds a header but no values"),
        "no step": (
            write(tmp_path / "stepless", text="a;step\n1;2\n"),
            "must have a column 'step', as a CSVLogger writes it; it begins with 'a;step'",
        ),
        "binary": (tmp_path / "binary", "must have a column 'step'"),
        "no event file": (tmp_path / "events", "not an event file of TensorBoard"),
        "empty event file": (tmp_path / "no_events", "holds no scalars: nothing was logged"),
        "no database": (tmp_path / "other.db", "not a database of MLflow"),
        "no server": ("http://localhost:9", "cannot be read"),
        "no such database": (f"sqlite:///{tmp_path}/none.db", "no such file"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "nowhere", "empty folder", "no grad metrics", "empty file", "header only", "no step", "binary", "no event file",
        "empty event file", "no database", "no server", "no such database",
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["report", "suggest"])
def test_unusable_input_is_one_line_and_exit_code_2(case, command, tmp_path, capsys):
    log, message = unusable(tmp_path)[case]
    page = tmp_path / "page.html"
    code, out, err = run_main(capsys, command, log, *(["-o", page] if command == "report" else []))
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("clip-callbacks: ")
    assert not page.exists()


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_cannot_be_used_beside_others_is_noted(tmp_path, capsys):
    write(tmp_path / "good", table()), write(tmp_path / "bad", text="")
    code, _, err = run_main(capsys, "report", tmp_path, "-o", tmp_path / "page.html")
    assert code == 0
    assert "Left out:" in err
    assert "is empty: nothing was logged" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "5"], "must be A:B"),
        (["--steps", "a:b"], "must be A:B"),
        (["--steps", "50:10"], "A not above B"),
        (["-o", "."], "--output must be a file"),
        (["--png", __file__], "--png must be a folder"),
        (["--steps", "1000:2000"], "nothing was logged from step 1000 to step 2000"),
        (["--loss", "train_los"], "--loss must be a metric of a run, got 'train_los'. The logs hold train_loss."),
    ],
)
def test_wrong_options_are_exit_code_2(arguments, message, tmp_path, capsys):
    path = write(tmp_path, table())
    try:
        code = main(["report", str(path), "-o", str(tmp_path / "page.html"), *arguments])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("source", ["csv", "board", "mlflow.db"])
def test_a_progress_bar_is_shown_to_a_terminal(fitted, tmp_path, source, monkeypatch):
    from clip_callbacks.html_report import csv_log, progress

    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    monkeypatch.setattr(progress, "INTERVAL_S", 0.0)
    monkeypatch.setattr(csv_log, "CHUNK_ROWS", 5)
    commands = {"suggest": ["run"]}
    if source == "csv":
        commands["report"] = ["run", "Drawing"]
    for command, bars in commands.items():
        for terminal in (Terminal(), io.StringIO()):
            monkeypatch.setattr(sys, "stderr", terminal)
            assert main([command, str(fitted / source), *(["-o", str(tmp_path / "page.html")] if command == "report" else [])]) == 0
            lines = terminal.getvalue().split("\r")
            shown = [what for what in ("run", "Drawing") if any(line.startswith(f"{what}: 100%") for line in lines)]
            assert shown == (bars if terminal.isatty() else [])


def test_an_empty_argument_is_refused(capsys):
    code, _, err = run_main(capsys, "suggest", "")
    assert code == 2
    assert "got an empty text" in err


def test_any_name_can_be_drawn(tmp_path, capsys):
    for name in ("_$\bad{$run", "dollar $5 and $6, äöü 猫" + "x" * 180):  # hidden, mathematics, no letters of the font, long
        write(tmp_path / name, table(60, **{f"grad_norm/{name}.0": 1.0, f"grad_norm/{name}.1": 2.0, f"{name[:9]}_loss": 1.0}))
    code, _, err = run_main(capsys, "report", tmp_path, "-o", tmp_path / "page.html")
    assert (code, err) == (0, "")


def test_text_in_cells_is_counted(tmp_path):
    text = table(10).astype(object).to_csv(index=False).splitlines()
    text[3] = ",".join(["2", "tensor(1.0)", *text[3].split(",")[2:]])
    run = read(write(tmp_path, text="\n".join(text)))
    assert "1 cell of metrics.csv is not a number and is read as NaN." in run.notes[0]
    assert math.isnan(run.metrics["train_loss"].values[2])


def test_suggest_says_its_notes(tmp_path, capsys):
    text = table(30).to_csv(index=False) + "1,2,3,4,5,6,7,8,9,10\n"
    code, out, err = run_main(capsys, "suggest", "--json", write(tmp_path, text=text))
    assert code == 0
    assert "does not fit its header" in err
    assert "does not fit its header" in next(iter(json.loads(out).values()))["notes"][0]


@pytest.mark.usefixtures("undrawn")
def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, capsys, monkeypatch):
    path, page = write(tmp_path / "log", table()), tmp_path / "page.html"
    page.write_text("the old one")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    code, _, err = run_main(capsys, "report", path, "-o", page)
    assert code == 2
    assert "No space left on device" in err
    assert page.read_text() == "the old one"
    assert sorted(child.name for child in tmp_path.iterdir()) == ["log", "page.html"]


@pytest.mark.usefixtures("drawn_wide")
def test_runs_whose_metrics_have_other_names_stand_side_by_side(tmp_path, capsys):
    first = table(50)
    second = table(80, seed=1).rename(columns={"train_loss": "train_bits"})
    second.columns = [key + "-Adam" if key.startswith("grad/") else key for key in second]
    write(tmp_path / "a", first), write(tmp_path / "b", second.drop(columns="grad/max_norm-Adam"))
    code, out, err = run_main(capsys, "report", tmp_path, "-o", tmp_path / "page.html")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert f"train_loss {first['train_loss'].iloc[-1]:.3g}" in lines["a"]
    assert f"train_bits {second['train_bits'].iloc[-1]:.3g}" in lines["b"]
    assert "b · Adam" in (tmp_path / "page.html").read_text()


@pytest.mark.usefixtures("drawn_wide")
def test_names_cannot_inject_markup(tmp_path, capsys):
    name = '<script>alert("x")</script>'
    frame = table(30, **{f"grad_norm/{name}": 1.0, "train_loss<b>": 1.0})
    folder = tmp_path / "<i>run"
    code, *_ = run_main(capsys, "report", write(folder, frame), "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert code == 0
    assert "<script" not in page
    assert "<i>run" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.usefixtures("drawn_wide")
def test_an_empty_run_without_finite_norms_has_a_page(tmp_path, capsys):
    frame = table(30, **{"grad/total_norm": math.nan, "train_loss": math.nan})
    path = write(tmp_path, text=frame.to_csv(index=False, na_rep="nan"))
    code, *_ = run_main(capsys, "report", path, "-o", tmp_path / "page.html")
    assert code == 0
    assert "No logged step has a finite norm above 0" in (tmp_path / "page.html").read_text()
    assert "no suggestion: no finite norm" in run_main(capsys, "suggest", path)[1]


@pytest.mark.usefixtures("drawn_wide")
@pytest.mark.parametrize("interval", [1, 50])
@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_run_that_was_bad_from_its_first_step_has_a_page(kind, interval, trainer, tmp_path, capsys):
    fit = trainer(GradientClipping(1.0), NonFiniteGuard(), logger=kind(tmp_path), log_every_n_steps=interval)
    with pytest.raises(NonFiniteGradientError), pytest.warns(RuntimeWarning, match="Non-finite"):
        fit.fit(Poisoned(dict.fromkeys(range(20), math.nan)), data(20))
    code, out, _ = run_main(capsys, "report", tmp_path, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert code == 0
    assert out.splitlines()[3].split()[:11] == ["version_0", "10", *"------", "10", "-", "0"]
    assert "10 of 10 steps were skipped (100.00%). The most frequent stage is &#34;loss&#34;" in page
    assert "The log ends with 10 bad batches in a row" in page
    assert "no suggestion: no finite norm" in run_main(capsys, "suggest", tmp_path)[1]


def test_a_part_of_a_run_without_a_good_step_has_a_page(tmp_path, capsys):
    frame = table(60, **{"grad/skipped_steps": np.clip(np.arange(60) - 19.0, 0, 10)})
    frame.loc[20:29, ["grad/total_norm", "grad/clipped_norm", "grad/clip_coef", "train_loss"]] = math.nan
    (log,) = read(write(tmp_path, frame)).between(20, 29).optimizer_logs
    assert (log.name, log.skipped_steps.last, log.step_count) == (tmp_path.name, 10, 10)
    (log,) = read(tmp_path).between(25, 25).optimizer_logs
    assert (log.skipped_steps.last, log.step_count) == (1, 1)


def test_an_optimizer_without_a_good_step_is_on_the_page(tmp_path):
    skipped = {"grad/skipped_steps-Adam": np.zeros(30), "grad/skipped_steps-Adam-1": np.arange(1.0, 31)}
    frame = pd.DataFrame({"step": range(30), "grad/total_norm-Adam": 1.0} | skipped)
    first, second = make_sections([read(write(tmp_path, frame))], ())
    assert (first.log.suffix, second.log.suffix) == ("-Adam", "-Adam-1")
    assert "30 of 30 steps were skipped" in texts(second.findings)
    assert "skipped" not in texts(first.findings)
    (tmp_path / "journal").mkdir()
    path = write(tmp_path / "journal", frame[["step", "grad/total_norm-Adam"]])
    journalled(tmp_path / "journal", *range(30), optimizer="Adam-1")
    assert [log.skipped_steps.last for log in read(path).optimizer_logs][1] == 30


def test_a_journal_alone_is_a_log_unless_logs_are_beside_it(tmp_path):
    path = journalled(tmp_path, 3, 7)
    (log,) = read(path).optimizer_logs
    assert (log.skipped_steps.last, log.run.last_step) == (2, 7)
    assert "Nothing but the journal of bad steps was found" in said(log.run)
    write(tmp_path / "below", table(20))
    assert read(tmp_path).name == "below"


def test_counts_are_not_offered_as_norms(tmp_path, capsys):
    frame = table(20, **{"grad/total_norm_p50": 1.0, "grad_norm_p50/net": 1.0, "encoder_norm": 1.0})
    _, _, err = run_main(capsys, "suggest", write(tmp_path, frame), "--norm", "mine")
    assert "These metrics look like norms: grad/total_norm, encoder_norm. Choose" in err


@pytest.mark.usefixtures("drawn_wide")
def test_a_fit_of_regression_needs_no_option(trainer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(GradientClipping(0.1), logger=CSVLogger("lightning_logs", "")).fit(Regression(), data())
    assert run_main(capsys, "report", "lightning_logs")[0] == 0
    assert (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("scope", "is_local"), [("layer", True), ("global", False)])
def test_a_suggestion_after_local_norms_says_for_which_norm_it_is(trainer, tmp_path, capsys, scope, is_local):
    class Silent(Regression):
        def training_step(self, batch, batch_idx):
            return self.loss(batch, batch_idx)

    logger = CSVLogger(tmp_path, name="", version="run")
    trainer(GradientClipping(0.5, scope=scope), logger=logger, max_epochs=4).fit(Silent(), data(12))
    assert main(["suggest", str(tmp_path)]) == 0
    assert ("This run was clipped by local norms" in capsys.readouterr().out) is is_local
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "report.html")]) == 0
    assert ("which is why clipped_norm is above max_norm" in (tmp_path / "report.html").read_text()) is is_local


@pytest.mark.usefixtures("drawn_wide")
@pytest.mark.parametrize("command", ["suggest", "report"])
def test_a_log_of_one_step_is_enough(command, tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("step,grad/total_norm,grad/skipped_steps\n49,1.5,0\n")
    page = ["-o", tmp_path / "page.html"] if command == "report" else []
    assert run_main(capsys, command, tmp_path, *page)[0] == 0
