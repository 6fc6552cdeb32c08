"""From what a user names to runs: finds the logs in folders, has them read, gives the runs names that differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_callbacks.dashboard.csv_log import read_csv
from clip_callbacks.dashboard.event_log import read_events
from clip_callbacks.dashboard.mlflow_log import read_mlflow
from clip_callbacks.dashboard.runs import Run, UnusableLogError
from clip_callbacks.report import JOURNAL, TOTAL_NORM

EVENTS = "tfevents"
DATABASES = (".db", ".sqlite", ".sqlite3")


def read_runs(logs: Sequence[str]) -> tuple[list[Run], list[str]]:
    """All runs with gradient metrics in the logs that were named.

    Args:
        logs: Files (``metrics.csv``, TensorBoard's event files, MLflow's sqlite database), folders that hold such anywhere below
            them, or addresses of MLflow's stores.

    Returns:
        The runs, and notes on what was left out.

    Raises:
        UnusableLogError: If something named does not exist, or no run with gradient metrics is left.
    """
    runs: list[Run] = []
    problems: list[str] = []
    for log in logs:
        found, problem = _read(log)
        runs += found
        problems += problem
    usable, notes = [], []
    for run in runs:
        if run.tracks:
            usable.append(run)
        else:
            problems.append(f"{run.source} holds no {TOTAL_NORM}: was a callback of clip_callbacks in the Trainer?")
    if not usable:
        more = f" (and {len(problems) - 1} more logs that cannot be used)" if len(problems) > 1 else ""
        raise UnusableLogError(f"{problems[0]}{more}")
    kept, doubles = _without_doubles(usable)
    notes += [f"Left out: {problem}" for problem in problems] + doubles
    return _named(kept), notes


def _read(log: str) -> tuple[list[Run], list[str]]:
    if "://" in log:
        return read_mlflow(log), []
    path = Path(log)
    if not path.exists():
        raise UnusableLogError(f"{log}: no such file or folder.")
    units = _units(path)
    if not units:
        raise UnusableLogError(
            f"{log} holds no log that can be read: no metrics.csv, no event file of TensorBoard, no database of MLflow."
        )
    runs: list[Run] = []
    problems: list[str] = []
    for files in units:
        with collected(problems):
            runs += _read_files(files)
    return runs, problems


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Note that a log cannot be used, and go on."""
    try:
        yield
    except UnusableLogError as error:
        problems.append(str(error))


def _units(path: Path) -> list[list[Path]]:
    """The files of each run: one CSV file or database, or the event files of one folder."""
    files = [path] if path.is_file() else sorted(child for child in path.rglob("*") if child.is_file())
    events: dict[Path, list[Path]] = {}
    units = []
    for file in files:
        if EVENTS in file.name:
            events.setdefault(file.parent, []).append(file)
        elif file.suffix in DATABASES or (file.suffix == ".csv" and (file is path or file.name == "metrics.csv")):
            units.append([file])
    stores = [[store] for store in sorted({file.parents[1] for file in files if _is_experiment(file)})]
    return units + list(events.values()) + stores


def _is_experiment(file: Path) -> bool:
    """Whether this is what an MLflow store of files keeps of an experiment."""
    return file.name == "meta.yaml" and b"artifact_location" in file.read_bytes()[:4096]


def _read_files(files: list[Path]) -> list[Run]:
    first = files[0]
    if first.is_dir() or first.suffix in DATABASES:
        return read_mlflow(str(first.absolute()) if first.is_dir() else f"sqlite:///{first.absolute()}")
    if EVENTS in first.name:
        metrics, notes = read_events(files)
    else:
        metrics, notes = read_csv(first)
    journal, more = read_journal(first.parent / JOURNAL)
    return [Run(str(first.parent.absolute()), str(first.parent), metrics, journal, (*notes, *more))]


def read_journal(path: Path) -> tuple[tuple[Mapping[str, Any], ...], list[str]]:
    """The guard's entries for bad steps, and a note if lines cannot be read."""
    if not path.is_file():
        return (), []
    entries, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
        else:
            broken += bool(line.strip())
    return tuple(entries), [f"{broken} lines of {path.name} cannot be read and are left out."] if broken else []


def _without_doubles(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Each run once, if several loggers wrote it."""
    kept: list[Run] = []
    notes = []
    for run in runs:
        place, double = next(((place, other) for place, other in enumerate(kept) if _is_same(run, other)), (0, None))
        if double is None:
            kept.append(run)
        else:
            kept[place] = replace(double, bad_steps=double.bad_steps or run.bad_steps)  # the journal lies beside one of them
            notes.append(f"{run.source} is the same run as {double.source}, of another logger, and is shown once.")
    return kept, notes


def _is_same(run: Run, other: Run) -> bool:
    pairs = [(run.metrics[key], other.metrics.get(key)) for key in run.metrics if key.startswith(TOTAL_NORM)]
    return all(
        theirs is not None
        and len(ours) > 1
        and np.array_equal(ours.steps, theirs.steps)
        and np.allclose(ours.values, theirs.values, rtol=1e-6, equal_nan=True)  # event files hold float32
        for ours, theirs in pairs
    )


def _named(runs: list[Run]) -> list[Run]:
    """With the shortest ends of their paths that differ; MLflow's own names get numbers if they do not."""
    parts = [Path(run.name).parts for run in runs]
    names = ["/".join(part[-1:]) for part in parts]
    depth = 1
    while len(set(names)) < len(names) and depth < max(len(part) for part in parts):
        depth += 1
        names = [
            "/".join(part[-depth:]) if names.count(name) > 1 else name for name, part in zip(names, parts, strict=True)
        ]  # fmt: skip
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return [replace(run, name=name) for run, name in zip(runs, unique, strict=True)]
