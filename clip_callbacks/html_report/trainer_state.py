"""Read ``trainer_state.json``, which the Trainer of Hugging Face transformers writes into a run's folder and checkpoints."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_callbacks.html_report.progress import progress_bar
from clip_callbacks.html_report.runs import TRANSFORMERS, Run, UnusableLogError
from clip_callbacks.html_report.series import LAST_STEP, Series

STATE = "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
STEP_KEY, SUMMARY_KEY = "step", "train_runtime"
"""The key of the step of an entry, and a key that only the last entry has, which summarizes the training."""


def run_folder(file: Path, top: Path) -> Path:
    """Return the folder of the run that a state belongs to: the folder above a checkpoint, unless the checkpoint was named.

    Args:
        file: A ``trainer_state.json``.
        top: File or folder that the user named.
    """
    if CHECKPOINT.search(file.parent.name) and top not in {file, file.parent}:
        return file.parents[1]
    return file.parent


def read_states(files: Sequence[Path], folder: Path) -> tuple[list[Run], list[str]]:
    """Read the runs of a folder, and return them with messages about unusable files.

    Each state holds everything that was logged before it. Of states that continue each other only the longest is read. A state that
    the longest does not continue, as of an earlier run in the same folder, is a run of its own.

    Args:
        files: The ``trainer_state.json`` of the folder and of its checkpoints.
        folder: The folder of the run.

    Raises:
        UnusableLogError: If no file can be read.
    """
    states: list[tuple[Path, dict[str, Series], list[str]]] = []
    problems: list[str] = []
    with progress_bar(folder.name, len(files), "state") as bar:
        for file in files:
            try:
                states.append((file, *_read(file)))
            except (UnusableLogError, OSError) as error:
                problems.append(str(error))
            bar.update()
    if not states:
        raise UnusableLogError(problems[0])
    states.sort(key=lambda state: (-_last_step(state[1]), CHECKPOINT.search(state[0].parent.name) is not None))
    kept: list[tuple[Path, dict[str, Series], list[str]]] = []
    for state in states:
        if not any(_is_part(state[1], metrics) for _, metrics, _ in kept):
            kept.append(state)
    if not kept[0][1]:
        raise UnusableLogError(f"{kept[0][0]} holds an empty log_history: nothing was logged.")
    chosen: list[str] = []
    if len(states) > len(kept):
        read = " and ".join("the folder's own" if file.parent == folder else f"that of {file.parent.name}" for file, _, _ in kept)
        chosen = [f"Of {len(states)} {STATE} files {read} was read: it holds everything that the others hold."]
    runs = [Run.of(str(folder.absolute()), str(file), metrics, TRANSFORMERS, [*notes, *chosen]) for file, metrics, notes in kept]
    return runs, problems


def _is_part(metrics: dict[str, Series], whole: dict[str, Series]) -> bool:
    """Return whether another state continues this one: it holds all metrics of this one, and more points of them."""
    return all(
        key in whole and len(series) <= len(whole[key]) and series.agrees_with(whole[key]) for key, series in metrics.items()
    )


def _last_step(metrics: dict[str, Series]) -> int:
    return max((int(series.steps[-1]) for series in metrics.values()), default=-1)


def _read(path: Path) -> tuple[dict[str, Series], list[str]]:
    """Read the metrics of one file, and return them with notes.

    The file may hold ``NaN`` and ``Infinity``, which are not JSON but which Python reads.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise UnusableLogError(f"{path} must be JSON, as the Trainer of transformers writes it: {error}.") from None
    log = None
    if isinstance(state, dict):
        log = state.get("log_history")
    if not isinstance(log, list):
        raise UnusableLogError(f"{path} must have a list 'log_history', as the Trainer of transformers writes it.")
    points: dict[str, tuple[list[int], list[float]]] = {}
    misfits = 0
    for entry in log:
        step = _number(entry.get(STEP_KEY)) if isinstance(entry, dict) else None
        if step is None or not abs(step) < LAST_STEP:
            misfits += 1
        elif SUMMARY_KEY not in entry:
            _take(entry, int(step), points)
    notes = []
    if misfits:
        notes.append(f"{misfits} entries of {path.name} have no step and are left out.")
    return {key: Series.of(steps, values) for key, (steps, values) in points.items()}, notes


def _take(entry: dict[str, Any], step: int, points: dict[str, tuple[list[int], list[float]]]) -> None:
    for key, value in entry.items():
        if key != STEP_KEY and (number := _number(value)) is not None:
            steps, values = points.setdefault(key, ([], []))
            steps.append(step)
            values.append(number)


def _number(value: object) -> float | None:
    """Convert a JSON number, or text that is one, to float; null, which strict JSON writes for NaN, to NaN; all else to None."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
