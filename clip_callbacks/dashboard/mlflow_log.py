"""Reads runs from MLflow: a tracking server, a database, or a folder of files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clip_callbacks.dashboard.runs import Run, Series, UnusableLogError
from clip_callbacks.report import TOTAL_NORM

SQLITE = "sqlite:///"
LARGEST = 1.7976931348623157e308
"""What MLflow stores for infinity."""


def read_mlflow(uri: str) -> list[Run]:
    """All active runs that logged ``grad/total_norm``, of all experiments, the oldest first.

    Args:
        uri: Of the tracking store, such as ``sqlite:///mlflow.db`` or ``http://localhost:5000``; behind a ``#`` the name of an
            experiment, or the id of a run, if not all are wanted.

    Raises:
        UnusableLogError: If it cannot be reached, or holds no such run.
    """
    try:
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise UnusableLogError(f"{uri} needs MLflow to be read: pip install mlflow.") from None
    uri, _, wanted = uri.partition("#")
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():  # MLflow would make it
        raise UnusableLogError(f"{uri}: no such file.")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # its default is minutes of silence
    try:
        client = MlflowClient(tracking_uri=uri)
        found = [run for run in _all_runs(client, wanted) if any(key.startswith(TOTAL_NORM) for key in run.data.metrics)]
        runs = [_read(client, uri, run) for run in sorted(found, key=lambda run: run.info.start_time)]
    except Exception as error:  # whatever its stores raise: sockets, databases, versions
        raise UnusableLogError(f"{uri} cannot be read: {str(error).splitlines()[0]}") from None
    if not runs:
        raise UnusableLogError(f"{uri} holds no run{f' of {wanted!r}' if wanted else ''} with {TOTAL_NORM}.")
    return runs


def _all_runs(client: Any, wanted: str) -> list[Any]:
    experiments = client.search_experiments()
    named = [experiment for experiment in experiments if not wanted or experiment.name == wanted]
    if not named:
        return [client.get_run(wanted)]
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
    for key in tqdm(sorted(run.data.metrics), desc=name, unit="metric", delay=1.0, leave=False, disable=None):
        points = client.get_metric_history(run.info.run_id, key)
        values = [float("inf") if point.value >= LARGEST else point.value for point in points]
        metrics[key] = Series.of([point.step for point in points], values)
    return Run(name, f"{uri} {run.info.run_id}", metrics)
