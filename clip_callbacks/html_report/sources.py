"""Find the logs in the files, folders and addresses that the user named, read them, and give the runs distinct names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_callbacks.core.metric_names import BAD_TENSOR_KEYS, JOURNAL
from clip_callbacks.core.wording import plural
from clip_callbacks.html_report.csv_log import read_csv
from clip_callbacks.html_report.event_log import read_events
from clip_callbacks.html_report.mlflow_log import is_database, read_mlflow
from clip_callbacks.html_report.norm_metrics import missing_norm_message
from clip_callbacks.html_report.runs import JOURNAL_ALONE, Run, UnusableLogError
from clip_callbacks.html_report.series import Series
from clip_callbacks.html_report.trainer_state import STATE, read_states, run_folder

EVENT_FILE_INFIX = "tfevents"
DATABASE_SUFFIXES = (".db", ".sqlite", ".sqlite3")
JSON_SUFFIX = ".json"


def read_runs(logs: Sequence[str], norms: Sequence[str] = ()) -> tuple[list[Run], list[str]]:
    """Read all runs with a norm of all gradients from the named logs.

    Args:
        logs: Files (``metrics.csv`` and other CSV files with a column for the step, TensorBoard's event files, MLflow's sqlite
            database, ``trainer_state.json`` of transformers, the guard's journal), folders that hold such files at any depth, or
            addresses of MLflow's stores.
        norms: Metrics that are norms of all gradients; if empty, they are found by their names.

    Returns:
        The runs, and notes on what was left out.

    Raises:
        UnusableLogError: If a log does not exist, or no run has a norm of all gradients.
    """
    runs: list[Run] = []
    problems: list[str] = []
    seen: set[str] = set()
    for log in logs:
        found, problem = _read(log, seen, norms)
        runs += found
        problems += problem
    usable, notes = [], []
    for run in runs:
        read = run.with_norms(norms)
        if read.optimizer_logs:
            usable.append(read)
        else:
            problems.append(missing_norm_message(run.source, run.metrics, norms))
    if not usable:
        more = ""
        if len(problems) > 1:
            more = f" (and {len(problems) - 1} more {plural(len(problems) - 1, 'log', 'logs')} that cannot be used)"
        raise UnusableLogError(f"{problems[0]}{more}")
    kept, doubles = _without_duplicates(usable)
    notes += [f"Left out: {problem}" for problem in problems] + doubles
    return _with_short_names(kept), notes


def _read(log: str, seen: set[str], norms: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Read the runs of one argument, except for files in ``seen``; return them with messages about unusable logs."""
    if not log:
        raise UnusableLogError("LOGS must be files, folders or addresses, got an empty text.")
    if "://" in log:
        if log in seen:
            return [], []
        seen.add(log)
        return read_mlflow(log, norms), []
    path = Path(log)
    if not path.exists():
        raise UnusableLogError(f"{log}: no such file or folder.")
    file_groups = _files_by_log(path)
    if not file_groups:
        raise UnusableLogError(
            f"{log} holds no log that can be read: no metrics.csv, event file of TensorBoard, database of MLflow or {STATE}."
        )
    runs: list[Run] = []
    problems: list[str] = []
    for files in file_groups:
        if str(files[0].resolve()) in seen:
            continue
        seen.update(str(file.resolve()) for file in files)
        try:
            found, unusable = _read_files(files, path, norms)
        except (UnusableLogError, OSError) as error:
            problems.append(str(error))
        else:
            runs += found
            problems += unusable
    return runs, problems


def _files_by_log(path: Path) -> list[list[Path]]:
    """Group files by log: one CSV file or database, the event files of one folder, or the states of a run's checkpoints.

    A journal of bad steps with no log in its folder or below is one too: its run ended before anything was logged.
    """
    files = [path]
    if not path.is_file():
        files = sorted(child for child in path.rglob("*") if child.is_file())
    together: dict[tuple[Path, str], list[Path]] = {}
    units = []
    for file in files:
        if EVENT_FILE_INFIX in file.name:
            together.setdefault((file.parent, EVENT_FILE_INFIX), []).append(file)
        elif file.name == STATE or (file.suffix == JSON_SUFFIX and file is path):
            together.setdefault((run_folder(file, path), STATE), []).append(file)
        elif (file.suffix in DATABASE_SUFFIXES and (file is path or is_database(file))) or (
            file.suffix == ".csv" and (file is path or file.name == "metrics.csv")
        ):
            units.append([file])
    stores = [[store] for store in sorted({file.parents[1] for file in files if _is_experiment(file)})]
    groups = units + list(together.values()) + stores
    beside_logs = {folder for group in groups for folder in (group[0], *group[0].parents)}
    return groups + [[file] for file in files if file.name == JOURNAL and file.parent not in beside_logs]


def _is_experiment(file: Path) -> bool:
    """Return whether a file is the metadata of an experiment in MLflow's store of files."""
    if file.name != "meta.yaml":
        return False
    try:
        return b"artifact_location" in file.read_bytes()[:4096]
    except OSError:
        return False


def _read_files(files: list[Path], path: Path, norms: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Read the runs of one log below a path that the user named; return them with messages about unusable files."""
    first = files[0]
    if first.is_dir():
        return read_mlflow(str(first.absolute()), norms), []
    if first.suffix in DATABASE_SUFFIXES:
        return read_mlflow(f"sqlite:///{first.absolute()}", norms), []
    if first.suffix == JSON_SUFFIX:
        return read_states(files, run_folder(first, path))
    journal, notes = read_journal(first.parent / JOURNAL)
    try:
        kind, (metrics, more) = _read_metrics(files)
    except UnusableLogError as error:
        if not journal:
            raise
        kind, metrics, more = JOURNAL_ALONE, {}, [str(error)]
    source = first if len(files) == 1 else first.parent
    run = Run.of(str(first.parent.absolute()), str(source), metrics, kind, [*more, *notes])
    return [replace(run, bad_steps=journal)], []


def _read_metrics(files: list[Path]) -> tuple[str, tuple[dict[str, Series], list[str]]]:
    """Read the metrics of a log in files of its own; return its kind, and the metrics with notes."""
    if files[0].name == JOURNAL:
        return JOURNAL_ALONE, ({}, [])
    if EVENT_FILE_INFIX in files[0].name:
        return "TensorBoard", read_events(files)
    return "CSV", read_csv(files[0])


def read_journal(path: Path) -> tuple[tuple[Mapping[str, Any], ...], list[str]]:
    """Read the guard's journal of bad steps; return its entries, and a note if lines cannot be read."""
    if not path.is_file():
        return (), []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return (), [f"{path.name} cannot be read: {error.strerror}."]
    entries = [_entry(line) for line in lines if line.strip()]
    notes = []
    if broken := entries.count(None):
        left_out = plural(broken, f"line of {path.name} cannot be read and is", f"lines of {path.name} cannot be read and are")
        notes.append(f"{broken} {left_out} left out.")
    return tuple(entry for entry in entries if entry is not None), notes


def _entry(line: str) -> Mapping[str, Any] | None:
    """Parse one line of the journal; None if the guard did not write it."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return None
    named = [entry.get(key) or [] for key in BAD_TENSOR_KEYS]
    if not all(isinstance(each, list) and all(isinstance(item, dict) for item in each) for each in named):
        return None
    logged = entry.get("logged_step")
    if isinstance(logged, int) and logged != entry["step"]:
        # the page goes by the loggers' steps; with several optimizers in a batch, `trainer.global_step` runs ahead of them
        return entry | {"step": logged, "global_step": entry["step"]}
    return entry


def _without_duplicates(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Keep only the longest log of a run that several loggers wrote; return the runs, and a note for each log left out."""
    kept: list[Run] = []
    notes = []
    for run in runs:
        like = (place for place, other in enumerate(kept) if run.kind != other.kind and run.is_same_run_as(other))
        place = next(like, None)
        if place is None:
            kept.append(run)
            continue
        longer, other = sorted((kept[place], run), key=lambda log: -len(log.optimizer_logs[0].logged_norm))
        kept[place] = replace(longer, bad_steps=longer.bad_steps or other.bad_steps)  # the journal is beside only one of the logs
        notes.append(f"{other.source} is the same run as {longer.source} ({longer.kind}), which is shown.")
    return kept, notes


def _with_short_names(runs: list[Run]) -> list[Run]:
    """Name each run by the shortest end of its path that is unique; equal names get numbers."""
    parts = {run.name: Path(run.name).parts for run in runs}
    names = {name: str(Path(*part[-1:])) for name, part in parts.items()}
    for depth in range(2, 1 + max(map(len, parts.values()))):
        count = Counter(names.values())
        names |= {name: str(Path(*parts[name][-depth:])) for name, short in names.items() if count[short] > 1}
    seen: Counter[str] = Counter()
    unique = []
    for run in runs:
        name = short = names[run.name]
        seen[short] += 1
        if seen[short] > 1:
            name = f"{short} ({seen[short]})"
        unique.append(replace(run, name=name))
    return unique
