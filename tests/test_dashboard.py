"""What is read from logs, and what is said of them."""

from __future__ import annotations

import io
import json
import math
import random
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger

from clip_callbacks import GradientClipping, GradientNormMonitor, NonFiniteGuard
from clip_callbacks.cli import main
from clip_callbacks.dashboard import thinning
from clip_callbacks.dashboard.bad_steps import bad_steps, spikes
from clip_callbacks.dashboard.diagnosis import diagnose
from clip_callbacks.dashboard.page import make_sections
from clip_callbacks.dashboard.runs import Run, UnusableLogError
from clip_callbacks.dashboard.series import Series
from clip_callbacks.dashboard.sources import read_runs
from tests.conftest import Poisoned, Regression, data
from tests.test_clipping import TwoNetworks

pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*")  # how MLflow asks SQLAlchemy


def table(steps=100, seed=0, **columns):
    """A log of a run with clipping at 1, as CSVLogger writes it, a step in each row."""
    dice = np.random.default_rng(seed)
    norms = dice.lognormal(0.0, 0.7, steps)
    own = {
        "step": np.arange(steps),
        "train_loss": 1 / np.sqrt(1 + np.arange(steps)),
        "grad/total_norm": norms,
        "grad/clipped_norm": np.minimum(norms, 1),
        "grad/clip_coef": np.minimum(1 / norms, 1),
        "grad/max_norm": np.ones(steps),
        "grad/clip_fraction": (norms > 1).astype(float),
        "grad/skipped_steps": np.zeros(steps),
    }
    return pd.DataFrame(own | columns)


def write(folder, frame=None, text=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.csv"
    path.write_text(text if frame is None else frame.to_csv(index=False))
    return path


def texts(findings):
    return " ".join(finding.text for finding in findings)


def said(run):
    (section,) = make_sections([run], ())
    return texts(section.findings)


def read(path):
    (run,), notes = read_runs([str(path)])
    return replace(run, notes=(*run.notes, *notes))


# ---- reading -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """One fit with bad steps, in three loggers."""
    from tests.conftest import make_trainer

    folder = tmp_path_factory.mktemp("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loggers = [
            CSVLogger(folder, "csv", version="run"),
            TensorBoardLogger(folder, "board", version="run"),
            MLFlowLogger("ours", run_name="run", tracking_uri=f"sqlite:///{folder}/mlflow.db"),
        ]
        torch.manual_seed(0)
        callbacks = [GradientClipping(0.5), GradientNormMonitor()]
        trainer = make_trainer(folder, *callbacks, logger=loggers, log_every_n_steps=2, max_epochs=3)
        trainer.fit(Poisoned({4: math.nan, 9: math.inf}), data(10))
    return folder


SOURCES = {"csv": "csv", "tensorboard": "board", "mlflow": "mlflow.db"}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_what_a_fit_logged_is_read_from_every_logger(fitted, source):
    run = read(fitted / source)
    frame = pd.read_csv(fitted / "csv/run/metrics.csv")
    assert {key for key in run.metrics if key.startswith("grad")} == {key for key in frame if key.startswith("grad")}
    for key in [key for key in frame if key.startswith("grad")]:
        expected = frame[frame[key].notna()]
        assert run.metrics[key].steps.tolist() == expected["step"].tolist(), key
        torch.testing.assert_close(  # event files hold float32
            torch.tensor(run.metrics[key].values, dtype=torch.float32), torch.tensor(expected[key].to_numpy(), dtype=torch.float32)
        )
    (track,) = run.tracks
    assert set(track.blocks()) == {"net.0", "net.2"}
    assert track.skipped_steps.last == 2
    assert run.name == "run" if source != "csv" else run.name in {"run", "csv"}


def test_one_run_in_two_loggers_is_shown_once_with_the_journal_of_either(fitted):
    runs, notes = read_runs([str(fitted)])
    assert len(runs) == 1
    assert len(notes) == 2
    assert all("is the same run as" in note for note in notes)
    assert [entry["batch"] for entry in runs[0].bad_steps] == [4, 9]


def test_a_server_of_mlflow_is_asked_for_one_experiment_or_run(fitted):
    uri = f"sqlite:///{fitted}/mlflow.db"
    (run,), _ = read_runs([f"{uri}#ours"])
    identifier = run.source.split()[-1]
    (same,), _ = read_runs([f"{uri}#{identifier}"])
    assert same.source == run.source
    with pytest.raises(UnusableLogError):
        read_runs([f"{uri}#theirs"])


def test_infinities_and_nan_are_values_and_empty_cells_are_not(tmp_path):
    text = "step,grad/total_norm,train_loss\n0,1.0,2.0\n1,,nan\n2,3.0,\n3,4.0,-inf\n4,NaN,inf\n"
    run = read(write(tmp_path, text=text))
    assert run.metrics["grad/total_norm"].steps.tolist() == [0, 2, 3, 4]
    assert run.metrics["train_loss"].steps.tolist() == [0, 1, 3, 4]
    assert [str(value) for value in run.metrics["train_loss"].values] == ["2.0", "nan", "-inf", "inf"]
    assert run.tracks[0].total_norm.steps.tolist() == [0, 2, 3]


def test_columns_that_change_in_mid_run(tmp_path):
    first, second = table(10), table(20, extra=1.0).iloc[10:]
    text = first.to_csv(index=False) + second.to_csv(index=False)
    run = read(write(tmp_path, text=text))
    assert run.metrics["grad/total_norm"].steps.tolist() == list(range(20))
    assert run.metrics["extra"].steps.tolist() == list(range(10, 20))
    assert "change in mid-run: it was read in 2 parts" in run.notes[0]


def test_rows_that_do_not_fit_are_left_out_and_counted(tmp_path):
    text = table(10).to_csv(index=False) + "1,2,3,4,5,6,7,8,9,10\n" + "11,0.5,7.0,7.0,1,1,1,0\n"
    run = read(write(tmp_path, text=text))
    assert run.metrics["grad/total_norm"].steps.tolist() == [*range(10), 11]
    assert "1 rows of metrics.csv do not fit" in run.notes[0]


def test_a_cut_off_event_file_is_read_up_to_there(fitted, tmp_path):
    (source,) = (fitted / "board/run").glob("*tfevents*")
    whole = read(fitted / "board")
    content = source.read_bytes()
    for cut in (1, 5, 40, 400):
        (tmp_path / source.name).write_bytes(content[:-cut])
        run = read(tmp_path)
        assert "cut off in its last record" in run.notes[0]
        assert len(run.metrics["grad/total_norm"]) <= len(whole.metrics["grad/total_norm"])
        assert run.metrics["grad/total_norm"].values[0] == whole.metrics["grad/total_norm"].values[0]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    events=st.lists(
        st.tuples(
            st.sampled_from(["grad/total_norm", "a", "a\x15b", "\x15" * 9, "x" * 130, "ü"]),
            st.integers(-3, 3) | st.integers(0, 2**40),
            st.floats(width=32),
            st.sampled_from(["scalar", "tensor", "text", "two"]),
        ),
        min_size=1,
    )
)
def test_events_are_read_as_tensorboard_reads_them(events, tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.summary.writer.record_writer import RecordWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    from clip_callbacks.dashboard.event_log import read_events

    path = tmp_path / "events.out.tfevents.1"
    scalars = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
    with path.open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=1.0, file_version="brain.Event:2").SerializeToString())
        for tag, step, number, form in [*events, ("end", 1, 1.0, "scalar")]:
            value = {
                "scalar": Summary.Value(tag=tag, simple_value=number),
                "two": Summary.Value(tag=tag, simple_value=number),
                "tensor": Summary.Value(tag=tag, tensor=make_tensor_proto(np.float32(number)), metadata=scalars),
                "text": Summary.Value(tag=tag, tensor=make_tensor_proto("text")),
            }[form]
            values = [value, Summary.Value(tag="second", simple_value=2.0)] if form == "two" else [value]
            writer.write(Event(wall_time=float(step), step=step, summary=Summary(value=values)).SerializeToString())
    expected = {}
    for event in LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.HasField("simple_value"):
                expected.setdefault(value.tag, []).append((event.step, value.simple_value))
            elif value.metadata.plugin_data.plugin_name == "scalars":
                expected.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    metrics, notes = read_events([path])
    assert notes == []
    assert metrics.keys() == expected.keys()
    for tag, points in expected.items():
        series = Series.of(*zip(*points, strict=True))
        np.testing.assert_array_equal(metrics[tag].steps, series.steps)
        np.testing.assert_array_equal(metrics[tag].values, series.values)


def test_a_damaged_event_file_is_read_up_to_there(fitted, tmp_path):
    (source,) = (fitted / "board/run").glob("*tfevents*")
    content = bytearray(source.read_bytes())
    middle = content.index(b"grad/clip_coef", len(content) // 2)
    content[middle - 12 : middle + 30] = b"\xff" * 42
    (tmp_path / source.name).write_bytes(content)
    run = read(tmp_path)
    assert "it was read up to there" in run.notes[0]
    assert run.tracks


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e300, 1e300))))
def test_where_steps_go_back_the_later_branch_counts(points):
    series = Series.of([step for step, _ in points], [value for _, value in points])
    expected = {}
    for step, value in points:
        expected = {at: held for at, held in expected.items() if at < step} | {step: value}
    assert series.steps.tolist() == list(expected)
    assert series.values.tolist() == list(expected.values())
    at = np.array([-1, *expected, 10**7])
    held = series.at(at)
    assert math.isnan(held[0])
    assert held[1:-1].tolist() == list(expected.values())


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3000), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_thinning_keeps_the_range_of_every_column(count, columns, seed):
    dice = np.random.default_rng(seed)
    steps = np.sort(dice.choice(10 * count, count, replace=False))
    series = Series.of(steps, dice.normal(size=count))
    thinned = thinning.thin(series, columns)
    assert thinned.low.min() == series.values.min()
    assert thinned.high.max() == series.values.max()
    assert (thinned.low <= thinned.middle).all()
    assert (thinned.middle <= thinned.high).all()
    assert thinned.is_whole == (count <= 2 * columns)
    first, last = int(steps[0]), int(steps[-1])
    width = (last - first + 1) / columns
    for column in range(columns):
        inside = np.clip(((steps - first) / width).astype(int), 0, columns - 1) == column
        peak = thinning.peaks(series, first, last, columns)[column]
        if inside.any():
            assert peak == series.values[inside].max()
        else:
            assert math.isnan(peak)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0, 1)), min_size=2, max_size=60), st.integers(1, 40))
def test_shares_are_means_over_all_steps_also_those_that_were_not_logged(logged, columns):
    gaps, values = zip(*logged, strict=True)
    steps = np.cumsum(gaps) - 1
    series = Series.of(steps, values)
    each = np.concatenate([np.full(gap, value) for gap, value in logged])  # of every step
    each = each[series.begin :]
    edges, found = thinning.shares(series, columns)
    assert edges[0] == series.begin
    assert edges[-1] == steps[-1] + 1
    summed = np.concatenate([[0], np.cumsum(each)])
    expected = np.diff(np.interp(edges - series.begin, np.arange(len(each) + 1), summed)) / np.diff(edges)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert series.mean == pytest.approx(each.mean())


# ---- what it says --------------------------------------------------------------------------------------------------------------


def test_the_share_of_clipped_steps_counts_steps_that_were_not_logged(trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    clipping = GradientClipping(6.5)
    from tests.conftest import GradientTape

    feed = torch.tensor([1.0, 9.0, 9.0, 2.0, 1.0, 9.0, 1.0])[:, None]
    trainer(clipping, logger=logger, log_every_n_steps=3).fit(GradientTape(feed))
    (track,) = read(Path(logger.log_dir)).tracks
    assert track.share_clipped == pytest.approx(3 / 6)  # the seventh step was not logged


def test_several_optimizers_are_tracks_of_their_own(trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(GradientClipping(1.0), GradientNormMonitor(), logger=logger).fit(TwoNetworks(), data())
    run = read(Path(logger.log_dir))
    assert [track.suffix for track in run.tracks] == ["-SGD", "-SGD-1"]
    assert [track.name for track in run.tracks] == [f"{run.name} · SGD", f"{run.name} · SGD-1"]
    assert [list(track.blocks()) for track in run.tracks] == [["generator"], ["discriminator"]]
    assert all(len(track.total_norm) == 12 for track in run.tracks)


def test_99_percent_clipped_is_a_learning_rate(tmp_path):
    frame = table(1000)
    frame["grad/clip_fraction"] = np.where(np.arange(1000) % 100, 1.0, 0.0)
    text = said(read(write(tmp_path, frame)))
    p90 = np.percentile(frame["grad/total_norm"], 90)
    assert "99% of steps are clipped by max_norm 1: max_norm acts as a learning rate" in text
    assert f"p90 is {p90:.3g}" in text


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
        "train_loss is NaN or inf from step 300 and stays so",
        "7 of 400 steps were skipped (1.75%)",
        "5e+03 at step 123",
        "The loss scale has fallen to 0.0312",
        "The norm of whole alone is 99% of total_norm",
        "Hardly any gradient arrives at dead",
        "The update-to-weight ratio of whole is above 0.01",
        "The update-to-weight ratio of dead is below 1e-05",
        "QuantileLimit(0.1) 25.0%",
    ):
        assert part in text, part


def test_a_healthy_run_gives_no_alarm(tmp_path):
    (section,) = make_sections([read(write(tmp_path, table(1000)))], ())
    assert {finding.severity for finding in section.findings} <= {"good", "note"}
    assert section.caution is None


def test_a_loss_that_grew_warns_of_its_norms(tmp_path):
    frame = table(200, train_loss=np.concatenate([[7.0], np.full(199, 50.0)]))
    (section,) = make_sections([read(write(tmp_path, frame))], ())
    assert "train_loss rose from 7 to 50" in (section.caution or "")
    assert section.caution in texts(section.findings)


def test_a_limit_that_never_clips_is_an_insurance(tmp_path):
    frame = table(200, **{"grad/clip_fraction": 0.0, "grad/max_norm": 1000.0})
    assert "max_norm 1e+03 hardly ever clips" in said(read(write(tmp_path, frame)))


def test_the_journal_names_offenders_in_the_table_of_bad_steps(trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    with pytest.warns(RuntimeWarning, match="Non-finite"):
        trainer(GradientClipping(0.5), logger=logger).fit(Poisoned({2: math.nan, 5: math.inf}), data(8))
    (track,) = read(Path(logger.log_dir)).tracks
    rows, count = bad_steps(track)
    assert [(row.step, row.what) for row in rows] == [(2, "skipped"), (5, "skipped")]
    assert count == 2
    assert rows[0].where == "epoch 0, batch 2, rank 0"
    assert rows[0].offenders == "loss: net.0.weight, net.0.bias, net.2.weight, net.2.bias"
    assert '2 of 8 steps were skipped (25.00%). Most often the stage is "loss".' in texts(diagnose(track, {}))


def test_spikes_skipped_by_the_guard_are_rows_with_their_norm(trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    with pytest.warns(RuntimeWarning, match="Spike"):
        trainer(NonFiniteGuard(skip_above=1e3), GradientClipping(1.0), logger=logger).fit(Poisoned({3: 1e6}), data(8))
    rows, _ = bad_steps(read(Path(logger.log_dir)).tracks[0])
    (spike,) = [row for row in rows if row.what == "skipped as a spike"]
    assert spike.step == 3
    assert spike.norm > 1e3
    assert "net.0.weight" in spike.offenders


def test_without_a_journal_skips_are_rows_too(tmp_path):
    frame = table(50, **{"grad/skipped_steps": [0.0] * 20 + [2.0] * 30})
    rows, _ = bad_steps(read(write(tmp_path, frame)).tracks[0])
    assert (20, "skipped") in [(row.step, row.what) for row in rows]


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
        (["train_acc", "val_f1", "train_time", "lossless", "accuracy"], []),
    ],
)
def test_losses_are_found_by_their_names(keys, losses):
    metrics = {key: Series.of([0], [1.0]) for key in keys}
    assert list(Run("run", "", metrics).losses()) == losses


# ---- the command ---------------------------------------------------------------------------------------------------------------


def run_main(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_suggest_in_text_holds_yaml_to_paste(tmp_path, capsys):
    import yaml

    frame = table(1000)
    code, out, err = run_main(capsys, "suggest", write(tmp_path, frame))
    assert (code, err) == (0, "")
    p90 = np.percentile(frame["grad/total_norm"], 90)
    assert f"max_norm={float(f'{p90:.1e}'):g} would have clipped" in out
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


def test_pictures_are_written_as_png(tmp_path, capsys):
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
    """Input that cannot be used, with what the error must say."""
    no_norm = table()[["step", "train_loss"]]
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
        "no grad metrics": (write(tmp_path / "no_norm", no_norm), "holds no grad/total_norm"),
        "empty file": (write(tmp_path / "nothing", text=""), "is empty: nothing was logged"),
        "header only": (write(tmp_path / "header", text="step,grad/total_norm\n"), "holds a header and no values"),
        "no step": (
            write(tmp_path / "stepless", text="a;step\n1;2\n"),
            "no column 'step', as what a CSVLogger writes: it begins with 'a;step'",
        ),
        "binary": (tmp_path / "binary", "no column 'step'"),
        "no event file": (tmp_path / "events", "not one of TensorBoard's event files"),
        "empty event file": (tmp_path / "no_events", "holds no scalars: nothing was logged"),
        "no database": (tmp_path / "other.db", "no database of MLflow"),
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
        (["--steps", "50:10"], "A up to B"),
        (["-o", "."], "--output must be a file"),
        (["--png", __file__], "--png must be a folder"),
        (["--steps", "1000:2000"], "nothing was logged from step 1000 to step 2000"),
        (["--loss", "train_los"], "no run has a metric 'train_los'"),
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


@pytest.mark.parametrize(
    ("source", "shown"), [("csv", ["run", "Drawing"]), ("board", ["run", "Drawing"]), ("mlflow.db", ["run", "Drawing"])]
)
def test_a_progress_bar_is_shown_to_a_terminal(fitted, tmp_path, source, shown, monkeypatch):
    from clip_callbacks.dashboard import csv_log, progress

    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    monkeypatch.setattr(csv_log, "ROWS", 5)
    for terminal in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main(["report", str(fitted / source), "-o", str(tmp_path / "page.html")]) == 0
        lines = terminal.getvalue().split("\r")
        found = [what for what in shown if any(line.startswith(f"{what}: 100%") for line in lines)]
        assert found == (shown if terminal.isatty() else [])


def test_an_empty_argument_is_refused(capsys):
    code, _, err = run_main(capsys, "suggest", "")
    assert code == 2
    assert "got an empty text" in err


def test_a_part_of_a_run_counts_its_own_steps(tmp_path, capsys):
    clipped = np.zeros(1000)
    clipped[:500], clipped[550] = 1.0, 1.0
    frame = table(1000, **{"grad/clip_fraction": clipped, "grad/skipped_steps": np.minimum(np.arange(1000) // 10, 50)})
    path = write(tmp_path, frame)
    (run,), _ = read_runs([str(path)])
    (whole,), (part,) = run.tracks, run.within(500, 599).tracks
    assert (whole.steps, whole.share_clipped, whole.skipped_steps.last) == (1000, pytest.approx(0.501), 50)
    assert (part.steps, part.share_clipped, part.skipped_steps.last) == (100, pytest.approx(0.01), 0)
    assert len(part.skips[0]) == 0
    assert "skipped" not in texts(diagnose(part, {}))


def test_a_run_that_was_resumed_begins_where_its_log_begins(tmp_path):
    frame = table(100, **{"grad/clip_fraction": [1.0] + [0.0] * 99, "grad/skipped_steps": 7.0})
    frame["step"] += 90_000
    (track,) = read(write(tmp_path, frame)).tracks
    assert (track.steps, track.share_clipped) == (100, pytest.approx(0.01))
    assert track.skipped_steps.last == 0


def test_a_branch_that_was_given_up_is_left_out(tmp_path):
    first, again = table(100), table(150, seed=1).iloc[45::7]
    run = read(write(tmp_path, pd.concat([first, again])))
    assert run.metrics["grad/total_norm"].steps.tolist() == [*range(45), *range(45, 150, 7)]
    assert "Steps go back: 54 points" in run.notes[0]


def test_a_loggers_prefix_is_taken_off(trainer, tmp_path):
    logger = CSVLogger(tmp_path, prefix="ours")
    trainer(GradientClipping(1.0), logger=logger).fit(Regression(), data())
    run = read(Path(logger.log_dir))
    assert {"grad/total_norm", "train_loss"} <= run.metrics.keys()


def test_two_runs_of_one_kind_of_log_are_never_one(tmp_path, capsys):
    write(tmp_path / "a", table()), write(tmp_path / "b", table())
    assert len(read_runs([str(tmp_path)])[0]) == 2
    assert len(read_runs([str(tmp_path), str(tmp_path / "a"), str(tmp_path)])[0]) == 2, "named twice, read once"


def test_what_is_read_stays_as_it_is(fitted, tmp_path, capsys):
    import hashlib
    import shutil
    import sqlite3

    folder = tmp_path / "logs"
    shutil.copytree(fitted, folder)
    with sqlite3.connect(folder / "study.db") as database:
        database.execute("CREATE TABLE trials (number INTEGER)")
    database.close()

    def state():
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}

    before = state()
    assert run_main(capsys, "report", folder, "-o", tmp_path / "page.html")[0] == 0
    assert state() == before
    code, _, err = run_main(capsys, "suggest", folder / "study.db")
    assert code == 2
    assert "no database of MLflow" in err
    assert state() == before


def test_a_folder_of_mlflows_files(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=str(tmp_path / "mlruns"))
    experiment = client.create_experiment("ours")
    kept, gone = (client.create_run(experiment, run_name=name).info.run_id for name in ("kept", "gone"))
    for identifier in (kept, gone):
        for step in range(5):
            client.log_metric(identifier, "grad/total_norm", 1.0 + step, step=step)
    client.delete_run(gone)
    (run,), _ = read_runs([str(tmp_path)])
    assert run.name == "kept"
    assert run.metrics["grad/total_norm"].values.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    with pytest.raises(UnusableLogError):
        read_runs([f"{(tmp_path / 'mlruns').as_uri()}#{gone}"])


def test_one_file_that_cannot_be_read_does_not_take_the_others_along(fitted, tmp_path):
    import shutil

    shutil.copytree(fitted / "board", tmp_path / "board")
    (tmp_path / "board/run/events.out.tfevents.9.other").write_bytes(b"no event file at all, but so it is called")
    run = read(tmp_path / "board")
    assert run.tracks
    assert any("is not one of TensorBoard's event files" in note for note in run.notes)


@pytest.mark.parametrize("name", ["_hidden", "$\bad{$run", "dollar $5 and $6", "ein Lauf äöü 猫", "x" * 200])
def test_any_name_can_be_drawn(name, tmp_path, capsys):
    frame = table(60, **{f"grad_norm/{name}.0": 1.0, f"grad_norm/{name}.1": 2.0, f"{name[:9]}_loss": 1.0})
    write(tmp_path / name, frame), write(tmp_path / "other", table(50, seed=1))
    code, _, err = run_main(capsys, "report", tmp_path, "-o", tmp_path / "page.html", "--png", tmp_path / "png")
    assert (code, err) == (0, "")


def test_text_in_cells_is_counted(tmp_path):
    text = table(10).astype(object).to_csv(index=False).splitlines()
    text[3] = ",".join(["2", "tensor(1.0)", *text[3].split(",")[2:]])
    run = read(write(tmp_path, text="\n".join(text)))
    assert "1 cells of metrics.csv are no numbers" in run.notes[0]
    assert math.isnan(run.metrics["train_loss"].values[2])


def test_suggest_says_its_notes(tmp_path, capsys):
    text = table(30).to_csv(index=False) + "1,2,3,4,5,6,7,8,9,10\n"
    code, out, err = run_main(capsys, "suggest", "--json", write(tmp_path, text=text))
    assert code == 0
    assert "do not fit its header" in err
    assert "do not fit its header" in next(iter(json.loads(out).values()))["notes"][0]


def test_the_command_itself_in_a_process_of_its_own(tmp_path):
    path = write(tmp_path, table())
    command = [sys.executable, "-m", "clip_callbacks.cli", "suggest", str(path)]
    done = subprocess.run(" ".join(command) + " | head -1", shell=True, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "would have clipped" in done.stdout


HIDING = """
import sys
import clip_callbacks  # what Lightning needs itself it has by now

from clip_callbacks.cli import main

for missing in ("pandas", "matplotlib", "jinja2", "yaml", "tqdm"):
    kept, sys.modules[missing] = sys.modules.get(missing), None
    for name in [name for name in sys.modules if name.startswith("clip_callbacks.dashboard")]:
        del sys.modules[name]
    print(missing, main(["report", sys.argv[1]]))
    if kept:
        sys.modules[missing] = kept
    else:
        del sys.modules[missing]
"""


def test_a_missing_package_is_named(tmp_path):
    command = [sys.executable, "-c", HIDING, str(write(tmp_path, table()))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["pandas", "2", "matplotlib", "2", "jinja2", "2", "yaml", "2", "tqdm", "2"]
    assert done.stderr.count("pip install 'clip_callbacks[report]'") == 5
    assert "Traceback" not in done.stderr


def test_spikes_are_told_by_the_norms_around_them():
    falling = np.geomspace(10, 0.1, 400) * np.random.default_rng(0).lognormal(0, 0.05, 400)
    falling[300] *= 8
    run = Run("run", "", {"grad/total_norm": Series.of(np.arange(400), falling)})
    found, times = spikes(run.tracks[0])
    assert found.steps.tolist() == [300]
    assert times[0] == pytest.approx(8, rel=0.2)


def test_norms_logged_as_not_finite_are_rows(tmp_path):
    frame = table(60)
    frame.loc[7, "grad/total_norm"] = math.nan
    rows, _ = bad_steps(read(write(tmp_path, text=frame.to_csv(index=False, na_rep="nan"))).tracks[0])
    assert (7, "norm not finite") in [(row.step, row.what) for row in rows]


def test_limits_that_were_not_logged_clip_all_the_same(tmp_path):
    frame = table(60, **{"grad/clip_fraction": 1.0}).drop(columns="grad/max_norm")
    assert "100% of steps are clipped by a limit that was not logged" in said(read(write(tmp_path, frame)))


def test_a_run_out_of_control_gets_no_number(tmp_path, capsys):
    frame = table(200, train_loss=np.concatenate([[7.0], np.full(199, 50.0)]))
    path = write(tmp_path, frame)
    assert "no suggestion: train_loss rose from 7 to 50" in run_main(capsys, "suggest", path)[1]
    assert json.loads(run_main(capsys, "suggest", "--json", path)[1])[tmp_path.name]["max_norm"] is None


def test_blocks_keep_what_tells_them_apart():
    from clip_callbacks.dashboard.axes import naturally, short, without_common_ends

    names = [
        f"encoder.transformer.layers.{number}.attention.{part}.projection" for number in range(12) for part in ("key", "value")
    ]
    assert without_common_ends(names) == [f"{number}.attention.{part}" for number in range(12) for part in ("key", "value")]
    assert without_common_ends(["a.b", "a"]) == ["b", "a"]
    assert without_common_ends(["one.name"]) == ["one.name"]
    assert short("abcdefghij", 7) == "abc…hij"
    assert sorted(["l.10", "l.9", "k"], key=naturally) == ["k", "l.9", "l.10"]


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


def test_an_empty_run_without_finite_norms_has_a_page(tmp_path, capsys):
    frame = table(30, **{"grad/total_norm": math.nan, "train_loss": math.nan})
    path = write(tmp_path, text=frame.to_csv(index=False, na_rep="nan"))
    code, *_ = run_main(capsys, "report", path, "-o", tmp_path / "page.html")
    assert code == 0
    assert "No logged step has a finite norm above 0" in (tmp_path / "page.html").read_text()
    assert "no suggestion: no finite norm" in run_main(capsys, "suggest", path)[1]


def test_a_fit_of_regression_needs_no_option(trainer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(GradientClipping(0.1), logger=CSVLogger("lightning_logs", "")).fit(Regression(), data())
    assert run_main(capsys, "report", "lightning_logs")[0] == 0
    assert (tmp_path / "report.html").exists()


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
    assert ("clipped_norm lies above max_norm: the norms are local" in (tmp_path / "report.html").read_text()) is is_local
