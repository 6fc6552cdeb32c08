"""Reading of logs: CSV, TensorBoard and MLflow."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger

from clip_callbacks import GradientClipping
from clip_callbacks.cli import main
from clip_callbacks.html_report import downsampling
from clip_callbacks.html_report.diagnosis import diagnose
from clip_callbacks.html_report.runs import UnusableLogError
from clip_callbacks.html_report.series import Series
from clip_callbacks.html_report.sources import read_runs
from tests.helpers.logs import journalled, read, run_main, said, table, texts, write
from tests.helpers.matrix import examples
from tests.helpers.training import Poisoned, Regression, data

pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*")  # how MLflow asks SQLAlchemy


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
    (log,) = run.optimizer_logs
    assert set(log.blocks()) == {"net.0", "net.2"}
    assert log.skipped_steps.last == 2
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
    assert run.optimizer_logs[0].total_norm.steps.tolist() == [0, 2, 3]


@pytest.mark.parametrize("header_again", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_that_is_still_being_written_is_left_out(header_again, end, tmp_path):
    lines = ["grad/total_norm,step", *(f"{1e-3 + step * 1e-9:.6e},{step}" for step in range(200))]
    if header_again:
        lines.insert(100, lines[0])
    text = end.join([*lines, "1.234500e-03,200"])
    for cut in range(len("1.234500e-03,200")):
        path = write(tmp_path, text=text[: len(text) - cut])
        run = read(path)
        assert run.metrics["grad/total_norm"].steps.tolist() == list(range(200)), cut
        assert run.metrics["grad/total_norm"].values.max() < 1.1e-3
        assert "The last line of metrics.csv has no end, as if it were still being written, and is left out." in run.notes
    assert not any("last line" in note for note in read(write(tmp_path, text=text + end)).notes)


@pytest.mark.parametrize("more", ["", "1,2,3\n"])
def test_rows_without_a_step_are_counted(more, tmp_path):
    text = "step,grad/total_norm\n0,1.0\n,2.0\n1,3.0\n,\n1e30,4.0\n2,5.0\n" + more
    run = read(write(tmp_path, text=text))
    assert run.metrics["grad/total_norm"].values.tolist() == [1.0, 3.0, 5.0]
    assert "2 rows of metrics.csv have no step and are left out." in run.notes


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
    assert "1 row of metrics.csv does not fit its header and is left out." in run.notes[0]


@pytest.mark.parametrize("step", ["1e30", "-1e30", "inf", "nan", "9223372036854775808"])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_rows_whose_step_is_none_are_left_out(tmp_path, step):
    run = read(write(tmp_path, text=f"step,grad/total_norm\n{step},9.0\n0,1.0\n1,2.0\n"))
    assert run.metrics["grad/total_norm"].steps.tolist() == [0, 1]


def test_a_cut_off_event_file_is_read_up_to_there(fitted, tmp_path):
    (source,) = (fitted / "board/run").glob("*tfevents*")
    whole = read(fitted / "board")
    content = source.read_bytes()
    for cut in (1, 5, 40, 400):
        (tmp_path / source.name).write_bytes(content[:-cut])
        run = read(tmp_path)
        assert "ends within a record and was read up to there" in run.notes[0]
        assert len(run.metrics["grad/total_norm"]) <= len(whole.metrics["grad/total_norm"])
        assert run.metrics["grad/total_norm"].values[0] == whole.metrics["grad/total_norm"].values[0]


@settings(deadline=None, max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
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

    from clip_callbacks.html_report.event_log import read_events

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
    assert run.optimizer_logs


@settings(deadline=None, max_examples=examples(150))
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


@settings(deadline=None, max_examples=examples(100))
@given(st.integers(1, 3000), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_downsampling_keeps_the_range_of_every_column(count, columns, seed):
    dice = np.random.default_rng(seed)
    steps = np.sort(dice.choice(10 * count, count, replace=False))
    series = Series.of(steps, dice.normal(size=count))
    reduced = downsampling.downsample(series, columns)
    assert reduced.lowest.min() == series.values.min()
    assert reduced.highest.max() == series.values.max()
    assert (reduced.lowest <= reduced.median).all()
    assert (reduced.median <= reduced.highest).all()
    assert reduced.has_all_points == (count <= 2 * columns)
    first, last = int(steps[0]), int(steps[-1])
    width = (last - first + 1) / columns
    for column in range(columns):
        inside = np.clip(((steps - first) / width).astype(int), 0, columns - 1) == column
        peak = downsampling.column_maxima(series, first, last, columns)[column]
        if inside.any():
            assert peak == series.values[inside].max()
        else:
            assert math.isnan(peak)


@settings(deadline=None, max_examples=examples(100))
@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0, 1)), min_size=2, max_size=60), st.integers(1, 40))
def test_shares_are_means_over_all_steps_also_those_that_were_not_logged(logged, columns):
    gaps, values = zip(*logged, strict=True)
    steps = np.cumsum(gaps) - 1
    series = Series.of(steps, values)
    each = np.concatenate([np.full(gap, value) for gap, value in logged])  # of every step
    each = each[series.first_step :]
    edges, found = downsampling.column_means(series, columns)
    assert edges[0] == series.first_step
    assert edges[-1] == steps[-1] + 1
    summed = np.concatenate([[0], np.cumsum(each)])
    expected = np.diff(np.interp(edges - series.first_step, np.arange(len(each) + 1), summed)) / np.diff(edges)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert series.mean == pytest.approx(each.mean())


def test_a_part_of_a_run_counts_its_own_steps(tmp_path, capsys):
    clipped = np.zeros(1000)
    clipped[:500], clipped[550] = 1.0, 1.0
    frame = table(1000, **{"grad/clip_fraction": clipped, "grad/skipped_steps": np.minimum(np.arange(1000) // 10, 49)})
    path = write(tmp_path, frame)
    (run,), _ = read_runs([str(path)])
    (whole,), (part,) = run.optimizer_logs, run.between(500, 599).optimizer_logs
    assert (whole.step_count, whole.clipped_share, whole.skipped_steps.last) == (1000, pytest.approx(0.501), 49)
    assert (part.step_count, part.clipped_share, part.skipped_steps.last) == (100, pytest.approx(0.01), 0)
    assert len(part.skips[0]) == 0
    assert "skipped" not in texts(diagnose(part, {}))


def test_a_part_of_a_run_counts_a_skip_at_its_first_step(tmp_path):
    skips = np.cumsum(np.isin(np.arange(100), [10, 50, 70])).astype(float)
    frame = table(100, **{"grad/skipped_steps": skips, "grad/overflowed_steps": skips})
    run = read(write(tmp_path, frame))
    for first, last, count in ((50, 99, 2), (51, 99, 1), (50, 69, 1), (None, 50, 2), (71, 99, 0)):
        (log,) = run.between(first, last).optimizer_logs
        assert (log.skipped_steps.last, log.overflowed_steps.last) == (count, count)


@pytest.mark.parametrize(
    ("first", "last", "count", "steps"), [(60, 149, 2, 90), (20, 149, 3, 130), (110, 199, 4, 90), (None, None, 5, 200)]
)
def test_a_part_of_a_sampled_run_counts_from_the_last_count_before_it(first, last, count, steps, tmp_path):
    frame = table(4, step=[49, 99, 149, 199], **{"grad/skipped_steps": [1.0, 1.0, 3.0, 5.0]})
    (log,) = read(write(tmp_path, frame)).between(first, last).optimizer_logs
    assert (log.skipped_steps.last, log.step_count) == (count, steps)


def test_the_skips_of_a_resumed_run_before_its_first_logged_step_count(trainer, tmp_path):
    first = trainer(GradientClipping(1.0), log_every_n_steps=10)
    first.fit(Regression(), data(20))
    first.save_checkpoint(tmp_path / "last.ckpt")
    logger = CSVLogger(tmp_path)
    resumed = trainer(GradientClipping(1.0), logger=logger, max_epochs=2, log_every_n_steps=10)
    with pytest.warns(RuntimeWarning, match="Non-finite"):
        resumed.fit(Poisoned(dict.fromkeys((21, 23, 35), math.nan)), data(20), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    run = read(Path(logger.log_dir))
    (log,) = run.optimizer_logs
    assert (log.skipped_steps.last, log.step_count) == (3, 20)
    assert "3 of 20 steps were skipped (15.00%)" in said(run)


def test_skips_after_the_last_logged_count_count(tmp_path):
    path = write(tmp_path, table(4, step=[9, 19, 29, 39], **{"grad/skipped_steps": [0.0, 0.0, 1.0, 1.0]}))
    journalled(tmp_path, 25, 41, 42, 5000)  # the last one is of a longer run in the same folder
    (log,) = read(path).optimizer_logs
    assert (log.skipped_steps.last, log.step_count) == (3, 43)


def test_a_run_that_was_resumed_begins_where_its_log_begins(tmp_path):
    frame = table(100, **{"grad/clip_fraction": [1.0] + [0.0] * 99, "grad/skipped_steps": 7.0})
    frame["step"] += 90_000
    (log,) = read(write(tmp_path, frame)).optimizer_logs
    assert (log.step_count, log.clipped_share) == (100, pytest.approx(0.01))
    assert log.skipped_steps.last == 0


def test_first_steps_without_a_norm_count(tmp_path):
    skipped = np.minimum(np.arange(100), 2.0) + 1
    frame = table(100, **{"grad/skipped_steps": skipped, "grad/overflowed_steps": skipped})
    frame.loc[:2, "grad/total_norm"] = math.nan  # an empty cell: the norm of the first three steps was not logged
    (log,) = read(write(tmp_path, frame)).optimizer_logs
    assert (log.step_count, log.skipped_steps.last) == (100, 3)
    assert "3 of 100 optimizer steps overflowed in float16: GradScaler skipped them" in texts(diagnose(log, {}))


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


@pytest.mark.usefixtures("undrawn")
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
    assert "not a database of MLflow" in err
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
    assert run.optimizer_logs
    assert any("is not an event file of TensorBoard" in note for note in run.notes)


def test_a_file_of_its_own_is_named_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("history.csv").write_text("step,foo\n1,2.0\n")
    with pytest.raises(UnusableLogError, match=r"history\.csv holds neither grad/total_norm nor"):
        read_runs(["history.csv"])


def test_a_file_of_one_line_without_an_end_says_so(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,grad/total_norm\n5,1.0")
    with pytest.raises(UnusableLogError, match="holds one line, which has no end and may be half written"):
        read_runs([str(path)])


def test_norms_of_two_prefixes_stay_two(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,a-grad/total_norm,b-grad/total_norm\n5,1.0,2.0\n6,1.5,2.5\n")
    ((run,), _) = read_runs([str(path)])
    assert sorted(log.logged_norm.values.tolist() for log in run.optimizer_logs) == [[1.0, 1.5], [2.0, 2.5]]


@pytest.mark.parametrize(
    ("columns", "optimizer", "suffixes"),
    [
        pytest.param(["grad/total_norm"], "Adam", [""], id="of several beside a log of one"),
        pytest.param(["grad/total_norm-Adam", "grad/total_norm-Adam-1"], None, ["-Adam", "-Adam-1"], id="of one beside several"),
        pytest.param(["grad/total_norm-Adam"], "Adam-1", ["-Adam", "-Adam-1"], id="of one whose steps were all bad"),
    ],
)
def test_a_journal_of_another_run_adds_no_optimizer(tmp_path, columns, optimizer, suffixes):
    (tmp_path / "metrics.csv").write_text(
        f"step,{','.join(columns)}\n" + "".join(f"{n}{',1.0' * len(columns)}\n" for n in range(9))
    )
    line = {"step": 3, "logged_step": 3, "epoch": 0, "batch": 3, "rank": 0, "policy": "skip", "stage": "loss", "message": "bad"}
    if optimizer:
        line["optimizer"] = optimizer
    (tmp_path / "nonfinite_steps.jsonl").write_text(json.dumps(line) + "\n")
    ((run,), _) = read_runs([str(tmp_path)])
    assert [log.norm.suffix for log in run.optimizer_logs] == suffixes


@pytest.mark.parametrize("folder", [b"bad\xffname", b"red\x1b[31m", b"a[x]b", b"100%s"])
def test_names_that_cannot_be_printed_are_escaped(tmp_path, folder):
    path = write(tmp_path / os.fsdecode(folder), table(30, **{"grad_norm/a\x1b[2J": 1.0, "grad_norm/b": 0.5}))
    page = tmp_path / "report.html"
    assert main(["report", str(path.parent), "-o", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "\x1b" not in text
    assert "a\\x1b[2J" in text
