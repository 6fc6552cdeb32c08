"""What each logger's own library reads back from a short fit with bad steps in it, and what its dashboard shows."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pandas as pd
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clip_callbacks import AccumulationRescaling, GradientClipping, GradientNormMonitor, NonFiniteGuard, QuantileLimit
from tests.conftest import Poisoned, data

Readings: TypeAlias = dict[str, dict[int, float]]
"""For each metric its value at each step."""

FLOAT32 = 2.0**-23
"""TensorBoard keeps values in float32; the others keep what they are given."""

STARTING_S = 120.0
"""How long a server may take on a loaded machine."""

pytestmark = pytest.mark.filterwarnings(
    "ignore:Non-finite gradients:RuntimeWarning",
    "ignore:The ``noload`` loader strategy is deprecated",  # MLflow's, to SQLAlchemy
)


class Recording(NamedTuple):
    """A logger, and what its own library reads back from it after the fit."""

    logger: Logger
    read: Callable[[], Readings]


Recorder: TypeAlias = Callable[[Path], AbstractContextManager[Recording]]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
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
    for name, value in quiet.items():
        monkeypatch.setenv(name, value)


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
def tensorboard(folder: Path) -> Iterator[Recording]:
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
def mlflow_in_a_file(folder: Path) -> Iterator[Recording]:
    pytest.importorskip("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    logger = MLFlowLogger(tracking_uri=uri, artifact_location=str(folder / "artifacts"))
    yield Recording(logger, lambda: of_mlflow(logger, uri))


@contextmanager
def mlflow_on_a_server(folder: Path) -> Iterator[Recording]:
    pytest.importorskip("mlflow")
    store = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", folder / "artifacts"]
    with served(["mlflow", "server", "--workers", "1", *store], "/health", folder) as url:
        logger = MLFlowLogger(tracking_uri=url)
        yield Recording(logger, lambda: of_mlflow(logger, url))


def records(logger: WandbLogger, kind: str) -> list[dict[str, Any]]:
    """What W&B's own command line finds in the file that an offline run has left."""
    (file,) = Path(logger.experiment.dir).parent.glob("*.wandb")
    logger.experiment.finish()
    shown = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", file], check=True, capture_output=True, timeout=STARTING_S
    )
    every = [json.loads(line) for line in shown.stdout.splitlines()]
    return [record[kind] for record in every if record["type"] == kind]


@contextmanager
def wandb(folder: Path) -> Iterator[Recording]:
    pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=folder)

    def read() -> Readings:
        readings: Readings = {}
        for record in records(logger, "history"):
            for name, value in record["item"].items():
                readings.setdefault(name, {})[record["item"]["trainer/global_step"]] = float(value)
        return readings

    try:
        yield Recording(logger, read)
    finally:
        logger.experiment.finish()


@contextmanager
def comet(folder: Path) -> Iterator[Recording]:
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
        GradientClipping(0.5, shadow=[0.25, QuantileLimit(0.5, warmup=1)]),
        GradientNormMonitor("layer"),
    ]
    trainer(*everything, logger=list(loggers), accumulate_grad_batches=2, max_epochs=2).fit(Poisoned(FACTORS), data(BATCHES))


RECORDERS = [tensorboard, mlflow_in_a_file, mlflow_on_a_server, wandb, comet]


@pytest.mark.parametrize("recorder", RECORDERS, ids=lambda recorder: recorder.__name__)
def test_a_loggers_own_library_reads_back_what_the_csv_log_says(recorder: Recorder, trainer, tmp_path):
    csv = CSVLogger(tmp_path / "csv")
    folder = tmp_path / "other"
    folder.mkdir()
    with recorder(folder) as recording:
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
