"""Read runs from MLflow: from a tracking server, a database, or a folder of files."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from clip_callbacks.html_report.norm_metrics import find_norms, missing_norm_message
from clip_callbacks.html_report.progress import progress_bar
from clip_callbacks.html_report.runs import Run, UnusableLogError
from clip_callbacks.html_report.series import Series

SQLITE = "sqlite:///"


def read_mlflow(uri: str, norms: Sequence[str] = ()) -> list[Run]:
    """Read all active runs that logged a norm of all gradients, the oldest first.

    Args:
        uri: Address of the tracking store, such as ``sqlite:///mlflow.db`` or ``http://localhost:5000``; optionally followed by
            ``#`` and the name of one experiment or the id of one run.
        norms: Metrics that are norms of all gradients; if empty, they are found by their names.

    Raises:
        UnusableLogError: If the store cannot be reached, or holds no such run.
    """
    try:
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise UnusableLogError(f"MLflow must be installed to read {uri}: pip install mlflow.") from None
    named = uri.removesuffix("#")
    uri, _, wanted = uri.partition("#")
    if uri.startswith(SQLITE) and not is_database(Path(uri.removeprefix(SQLITE))):
        raise UnusableLogError(f"{uri}: no such file, or not a database of MLflow.")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # by default it retries silently for minutes
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow no longer develops its store of files, but still reads it
    try:
        client = MlflowClient(tracking_uri=uri)
        active = _active_runs(client, wanted)
        found = [run for run in active if find_norms(run.data.metrics, norms)]
        runs = [_read(client, uri, run) for run in sorted(found, key=lambda run: run.info.start_time)]
    except Exception as error:  # the stores raise errors of sockets, databases and versions
        raise UnusableLogError(f"{uri} cannot be read: {str(error).splitlines()[0][:200]}") from None
    if not runs:
        source = f"{named} ({len(active)} runs)"
        raise UnusableLogError(missing_norm_message(source, {key for run in active for key in run.data.metrics}, norms))
    return runs


def is_database(path: Path) -> bool:
    """Return whether a file is a database of MLflow, which would create its tables in any other database."""
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            names = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error:
        return False
    return {"experiments", "runs", "metrics"} <= names


def _active_runs(client: Any, wanted: str) -> list[Any]:
    experiments = client.search_experiments()
    named = [experiment for experiment in experiments if not wanted or experiment.name == wanted]
    if not named:
        return [run for run in [client.get_run(wanted)] if run.info.lifecycle_stage == "active"]
    runs, token = [], None
    while True:
        page = client.search_runs([experiment.experiment_id for experiment in named], page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _read(client: Any, uri: str, run: Any) -> Run:
    metrics = {}
    name = run.info.run_name or run.info.run_id
    with progress_bar(name, len(run.data.metrics), "metric") as bar:
        for key in sorted(run.data.metrics):
            points = sorted(client.get_metric_history(run.info.run_id, key), key=lambda point: point.timestamp)
            metrics[key] = Series.of([point.step for point in points], [point.value for point in points])
            bar.update()
    return Run.of(name, f"{uri} {run.info.run_id}", metrics, "MLflow")
