"""What each logger's own library reads back from a short fit with bad steps in it, and what its dashboard shows."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clip_callbacks import AccumulationRescaling, ClipRule, GradientClipping, GradientNormMonitor, NonFiniteGuard, QuantileLimit
from tests.helpers import mlflow_store
from tests.helpers.browser import needs_browser
from tests.helpers.layouts import Charts, as_charts, layout_of
from tests.helpers.training import SAFELY, Poisoned, Regression, TwoNetworks, data

pytestmark = pytest.mark.filterwarnings(
    "ignore:Non-finite gradients:RuntimeWarning",
    "ignore:The ``noload`` loader strategy is deprecated",  # MLflow's, to SQLAlchemy
    "ignore:html5lib's sanitizer is deprecated:DeprecationWarning",  # TensorBoard's, to itself
)


Readings: TypeAlias = dict[str, dict[int, float]]
"""For each metric its value at each step."""

FLOAT32 = 2.0**-23
"""TensorBoard keeps values in float32; the others keep what they are given."""

STARTING_S = 120.0
"""How long a server may take on a loaded machine."""


class Recording(NamedTuple):
    """A logger, and what its own library reads back from it after the fit."""

    logger: Logger
    read: Callable[[], Readings]


Recorder: TypeAlias = Callable[[Path, str], AbstractContextManager[Recording]]
"""Of the folder to write to, and the address of an MLflow server."""


@pytest.fixture(autouse=True, scope="module")
def _no_network():
    """These packages would like to tell their makers of the run."""
    quiet = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "COMET_START_ONLINE": "false",
        "COMET_DISABLE_AUTO_LOGGING": "1",
        "COMET_LOGGING_CONSOLE": "ERROR",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quiet.items():
            patch.setenv(name, value)
        yield


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetched(url: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
        return json.load(answer)


@contextmanager
def served(command: Sequence[str | Path], path: str, folder: Path) -> Iterator[str]:
    """Run a server, by its module's command line without the port, until the context ends; it is up when ``path`` answers."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + STARTING_S
            while not answers(url + path):
                assert process.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < deadline, (folder / "server.log").read_text()
                time.sleep(0.2)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def tensorboard(folder: Path, server: str = "") -> Iterator[Recording]:
    logger = TensorBoardLogger(folder)

    def read() -> Readings:
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}

    yield Recording(logger, read)


def of_mlflow(logger: MLFlowLogger, uri: str) -> Readings:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    names = client.get_run(logger.run_id).data.metrics
    return {name: {metric.step: metric.value for metric in client.get_metric_history(logger.run_id, name)} for name in names}


@contextmanager
def mlflow_in_a_file(folder: Path, server: str = "") -> Iterator[Recording]:
    pytest.importorskip("mlflow")
    uri = mlflow_store.in_file(folder)
    logger = MLFlowLogger(tracking_uri=uri, artifact_location=str(folder / "artifacts"))
    yield Recording(logger, lambda: of_mlflow(logger, uri))


@contextmanager
def mlflow_on_a_server(folder: Path, server: str) -> Iterator[Recording]:
    logger = MLFlowLogger(tracking_uri=server)
    yield Recording(logger, lambda: of_mlflow(logger, server))


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory) -> Iterator[str]:
    """Started once: it takes ten seconds to make its tables."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    store = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", folder / "artifacts"]
    with served(["mlflow", "server", "--workers", "1", *store], "/health", folder) as url:
        yield url


def inspected(logger: WandbLogger, *options: str) -> str:
    """What W&B finds in the file that an offline run leaves: a line of JSON for each record.

    This is what ``wandb leet inspect`` starts, after an interpreter has imported W&B for a second.
    """
    from wandb.util import get_core_path

    (file,) = Path(logger.experiment.dir).parent.glob("*.wandb")
    logger.experiment.finish()
    command, of_file = [get_core_path(), "leet", "inspect", "--no-observability", "--json"], ["--run-file", file, file.parents[1]]
    deadline = time.monotonic() + STARTING_S
    while '"type":"exit"' not in (whole := _output([*command, *of_file])).replace(" ", ""):  # another process writes the file
        assert time.monotonic() < deadline
    return _output([*command, *options, *of_file]) if options else whole


def _output(command: list[Any]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=STARTING_S).stdout


def records(logger: WandbLogger, kind: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in inspected(logger).splitlines()]
    return [record[kind] for record in every if record["type"] == kind]


@contextmanager
def wandb(folder: Path, server: str = "") -> Iterator[Recording]:
    pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=folder)

    def read() -> Readings:
        readings: Readings = {}
        for item in (record["item"] for record in records(logger, "history")):
            for name, value in item.items():
                readings.setdefault(name, {})[item["trainer/global_step"]] = float(value)
        return readings

    try:
        yield Recording(logger, read)
    finally:
        logger.experiment.finish()


@contextmanager
def comet(folder: Path, server: str = "") -> Iterator[Recording]:
    pytest.importorskip("comet_ml")
    unwanted = ("log_code", "log_graph", "parse_args", "log_git_metadata", "log_git_patch", "log_env_details")
    # Lightning's own `online=False` switches the experiment off altogether; COMET_START_ONLINE leaves it on
    logger = CometLogger(offline_directory=str(folder), auto_output_logging=False, **dict.fromkeys(unwanted, False))

    def read() -> Readings:
        logger.experiment.end()
        (archive,) = folder.glob("*.zip")
        with zipfile.ZipFile(archive) as content:
            messages = [json.loads(line) for line in content.read("messages.json").splitlines()]
        readings: Readings = {}
        for metric in (message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"):
            readings.setdefault(metric["metricName"], {})[metric["step"]] = float(metric["metricValue"])
        return readings

    try:
        yield Recording(logger, read)
    finally:
        logger.experiment.end()


def of_csv(logger: CSVLogger) -> Readings:
    frame = pd.read_csv(Path(logger.log_dir) / "metrics.csv").set_index("step")
    return {name: frame[name].dropna().to_dict() for name in frame}


def ours(readings: Readings) -> Readings:
    return {name: values for name, values in readings.items() if name.startswith("grad")}


BATCHES = 9
FACTORS = {2: math.nan, 7: math.inf, 14: math.nan}
"""Windows of an epoch are batches 0-1, 2-3, 4-5, 6-7, 8: steps 1 and 3 are bad, and of the second epoch step 7."""


def fit_with_bad_steps(trainer: Callable[..., Trainer], *loggers: Logger) -> None:
    everything = [
        AccumulationRescaling(),
        NonFiniteGuard(),
        GradientClipping(5.0, shadow=[2.5, QuantileLimit(0.5, warmup=1)]),
        GradientNormMonitor("layer"),
    ]
    trainer(*everything, logger=list(loggers), accumulate_grad_batches=2, max_epochs=2).fit(Poisoned(FACTORS), data(BATCHES))


RECORDERS = [tensorboard, mlflow_in_a_file, pytest.param(mlflow_on_a_server, marks=pytest.mark.slow), wandb, comet]


@pytest.mark.parametrize("recorder", RECORDERS, ids=lambda recorder: recorder.__name__)
def test_a_loggers_own_library_reads_back_what_the_csv_log_says(recorder: Recorder, trainer, tmp_path, request):
    server = request.getfixturevalue("mlflow_server") if recorder is mlflow_on_a_server else ""
    csv = CSVLogger(tmp_path / "csv")
    folder = tmp_path / "other"
    folder.mkdir()
    with recorder(folder, server) as recording:
        fit_with_bad_steps(trainer, csv, recording.logger)
        readings = recording.read()
    expected = of_csv(csv)
    assert {name: list(values) for name, values in ours(readings).items()} == {
        name: list(values) for name, values in ours(expected).items()
    }
    for name, values in ours(expected).items():
        assert readings[name] == pytest.approx(values, rel=FLOAT32), name
    assert all(math.isfinite(value) for values in ours(readings).values() for value in values.values())
    assert set(readings["grad/skipped_steps"]) <= set(readings["train_loss"]), "on the x-axis of Lightning's own metrics"


def test_the_csv_log_says_what_happened(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    fit_with_bad_steps(trainer, csv)
    readings = of_csv(csv)
    steps, bad = set(range(10)), {1, 3, 7}
    assert readings["grad/skipped_steps"] == {step: sum(step >= each for each in bad) for step in steps}
    for name in ("total_norm", "clipped_norm", "clip_coef", "max_norm", "clip_fraction"):
        assert set(readings[f"grad/{name}"]) == steps - bad, name
    assert set(readings["grad_norm/net.0"]) == steps - bad
    assert set(readings["grad/accumulation_scale"]) == {4, 9}
    assert set(readings["grad/total_norm_p90"]) == {4, 9}
    assert all(math.isfinite(value) for values in ours(readings).values() for value in values.values())


@pytest.mark.slow
@needs_browser
def test_mlflows_page_shows_our_metrics(trainer, tmp_path, mlflow_server, opened):
    with mlflow_on_a_server(tmp_path, mlflow_server) as recording:
        fit_with_bad_steps(trainer, recording.logger)
        last = list(recording.read()["grad/total_norm"].values())[-1]
        experiment, run = recording.logger.experiment_id, recording.logger.run_id
        with opened(f"{mlflow_server}/#/experiments/{experiment}/runs/{run}") as seen:
            seen.page.get_by_text("grad/total_norm", exact=True).wait_for()
            assert f"{last:.2f}"[:4] in seen.page.get_by_role("row").filter(has_text="grad/total_norm").first.inner_text()
            assert {urllib.parse.urlsplit(url).hostname for url in seen.requests} == {"127.0.0.1"}


NORMS, COEFFICIENTS = "total_norm, clipped_norm, max_norm", "clip_coef, clip_fraction"


def matches(charts: Charts, tags: Iterable[str]) -> Charts:
    """The metrics in each chart, found as TensorBoard finds them."""
    return {
        title: [tag for pattern in patterns for tag in sorted(tags) if re.match(pattern, tag)] for title, patterns in charts.items()
    }


def test_tensorboards_own_server_serves_the_layout_and_has_data_for_every_line_of_it(trainer, tmp_path):
    with tensorboard(tmp_path) as recording:
        fit_with_bad_steps(trainer, recording.logger)
        logged = recording.read()
    with served(["tensorboard.main", "--logdir", tmp_path, "--load_fast", "false"], "/data/runs", tmp_path) as url:
        wait_until(lambda: fetched(f"{url}/data/plugin/custom_scalars/layout"))
        charts = as_charts(fetched(f"{url}/data/plugin/custom_scalars/layout"))["Gradients"]
        (run,) = fetched(f"{url}/data/runs")
        lines = {
            title: [fetched(f"{url}/data/plugin/custom_scalars/scalars", run=run, tag=tag)["tag_to_events"] for tag in tags]
            for title, tags in charts.items()
        }
    found = {title: [tag for line in each for tag in line] for title, each in lines.items()}
    assert found == {
        NORMS: ["grad/total_norm", "grad/clipped_norm", "grad/max_norm"],
        COEFFICIENTS: ["grad/clip_coef", "grad/clip_fraction"],
        "clip_fraction, applied and shadow limits": [
            "grad/clip_fraction",
            "grad/shadow_clip_fraction/FixedLimit-2.5",
            "grad/shadow_clip_fraction/QuantileLimit-quantile_0.5-warmup_1",
        ],
        "skipped_steps": ["grad/skipped_steps"],
        "accumulation_scale": ["grad/accumulation_scale"],
    }
    for tag, events in [entry for each in lines.values() for line in each for entry in line.items()]:
        assert {step: value for _, step, value in events} == logged[tag]


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + STARTING_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("members", "charts"),
    [
        ([GradientNormMonitor()], ["total_norm"]),
        ([NonFiniteGuard()], ["total_norm", "skipped_steps"]),
        ([AccumulationRescaling()], ["total_norm", "accumulation_scale"]),
        ([GradientClipping(1.0)], [NORMS, COEFFICIENTS, "skipped_steps"]),
        (
            [GradientClipping(rules=[ClipRule(1.0, name="all"), ClipRule(0.5, "layer", name="body.0-x")])],
            [
                *(NORMS, COEFFICIENTS),
                *("all: total_norm, max_norm", "all: clip_coef, clip_fraction"),
                *("body.0-x: total_norm, max_norm", "body.0-x: clip_coef, clip_fraction"),
                "skipped_steps",
            ],
        ),
    ],
    ids=["monitor", "guard", "rescaling", "clipping", "rules"],
)
def test_there_are_charts_only_of_what_the_members_log(members, charts, trainer, tmp_path):
    with tensorboard(tmp_path) as recording:
        trainer(*members, logger=recording.logger, accumulate_grad_batches=2).fit(Regression(), data(5))
        found = matches(layout_of(tmp_path)["Gradients"], recording.read())
    assert list(found) == charts
    assert [len(tags) for tags in found.values()] == [len(title.split(": ")[-1].split(", ")) for title in charts]


def test_a_grad_scaler_has_a_chart(trainer, tmp_path):
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    with tensorboard(tmp_path) as recording:
        trainer(GradientNormMonitor(), logger=recording.logger, plugins=[precision]).fit(Regression(), data(3))
        found = matches(layout_of(tmp_path)["Gradients"], recording.read())
    assert found == {"total_norm": ["grad/total_norm"], "amp_scale": ["grad/amp_scale"]}


def test_each_of_several_optimizers_has_its_own_category(trainer, tmp_path):
    with tensorboard(tmp_path) as recording:
        trainer(GradientClipping(1.0), logger=recording.logger).fit(TwoNetworks(), data(3))
        logged = recording.read()
    found = {category: matches(charts, logged) for category, charts in layout_of(tmp_path).items()}
    names = {NORMS: ("total_norm", "clipped_norm", "max_norm"), COEFFICIENTS: ("clip_coef", "clip_fraction")}
    names["skipped_steps"] = ("skipped_steps",)
    assert found == {
        f"Gradients-{suffix}": {title: [f"grad/{name}-{suffix}" for name in each] for title, each in names.items()}
        for suffix in ("SGD", "SGD-1")
    }


def test_the_patterns_match_behind_a_loggers_prefix_and_nothing_else(trainer, tmp_path):
    logger = TensorBoardLogger(tmp_path, prefix="a+b.c")
    trainer(GradientNormMonitor(), logger=logger).fit(Regression(), data(2))
    with_more = [*EventAccumulator(logger.log_dir).Reload().Tags()["scalars"], "a+bxc-grad/total_norm", "grad/total_norm"]
    assert matches(layout_of(tmp_path)["Gradients"], with_more) == {"total_norm": ["a+b.c-grad/total_norm"]}


class WithALayout(Regression):
    def on_fit_start(self):
        self.logger.experiment.add_custom_scalars({"Mine": {"loss": ["Multiline", ["train_loss"]]}})


def test_a_layout_that_the_module_writes_takes_the_place_of_ours(trainer, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    for _ in range(2):
        trainer(GradientClipping(1.0), logger=logger).fit(WithALayout(), data(2))
    assert layout_of(tmp_path) == {"Mine": {"loss": ["train_loss"]}}
    trainer(GradientNormMonitor(), logger=TensorBoardLogger(tmp_path, version="another")).fit(Regression(), data(2))
    assert layout_of(tmp_path) == {"Mine": {"loss": ["train_loss"]}, "Gradients": {"total_norm": ["^grad/total_norm$"]}}


def test_a_layout_is_there_once_after_several_fits_and_a_resume(trainer, tmp_path):
    logger = TensorBoardLogger(tmp_path / "logs", version="run")
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    first = trainer(GradientClipping(1.0), checkpoint, logger=logger, enable_checkpointing=True)
    first.fit(Regression(), data(3))
    once = layout_of(tmp_path / "logs")
    first.fit_loop.max_epochs = 2
    first.fit(Regression(), data(3))
    assert layout_of(tmp_path / "logs") == once
    again = TensorBoardLogger(tmp_path / "logs", version="run")
    members = [GradientClipping(1.0), ModelCheckpoint(checkpoint.dirpath)]
    second = trainer(*members, logger=again, enable_checkpointing=True, max_epochs=3)
    second.fit(Regression(), data(3), ckpt_path=checkpoint.last_model_path, **SAFELY)
    assert layout_of(tmp_path / "logs") == once
    assert list(once) == ["Gradients"]


class WithADefinition(Poisoned):
    def on_fit_start(self):
        self.logger.experiment.define_metric("grad/clip_coef", summary="max")


def test_wandbs_table_of_runs_says_more_of_our_metrics_than_their_last_values(trainer, tmp_path):
    csv = CSVLogger(tmp_path / "csv")
    with wandb(tmp_path) as recording:
        clipping = GradientClipping(5.0, shadow=[2.5])
        trainer(clipping, logger=[recording.logger, csv]).fit(WithADefinition({1: math.nan}), data(8))
        summary = json.loads(inspected(recording.logger, "--summary"))["summary"]
        x_axes = {metric.get("name"): metric.get("step_metric") for metric in records(recording.logger, "metric")}
    logged = {name: list(values.values()) for name, values in of_csv(csv).items()}
    mean = {name: pytest.approx(sum(values) / len(values)) for name, values in logged.items()}
    norms, coefficients = logged["grad/total_norm"], logged["grad/clip_coef"]
    shadow = "grad/shadow_clip_fraction/FixedLimit-2.5"
    expected = {
        "grad/total_norm": {"max": max(norms), "last": norms[-1]},
        "grad/clip_coef": {"min": min(coefficients), "last": coefficients[-1], "max": max(coefficients)},  # its module's too
        "grad/clip_fraction": {"mean": mean["grad/clip_fraction"], "last": logged["grad/clip_fraction"][-1]},
        shadow: {"mean": mean[shadow], "last": logged[shadow][-1]},
        "grad/skipped_steps": 1,
    }
    assert {name: summary[name] for name in expected} == expected
    defined = ["grad/total_norm", "grad/clip_fraction", shadow.replace(".", r"\.")]
    assert [x_axes[name] for name in defined] == ["trainer/global_step"] * 3
