"""Reads what Lightning's CSVLogger wrote, and any other table of metrics with a column for the step."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clip_callbacks.html_report.progress import progress_bar
from clip_callbacks.html_report.runs import UnusableLogError
from clip_callbacks.html_report.series import LAST_STEP, Series, Steps, Values

STEP_COLUMNS = ("step", "global_step", "trainer/global_step", "_step", "iteration", "iter")
"""What a column of steps is called, in letters of any size; of several the first counts."""
CHUNK_ROWS = 200_000
"""Rows that are in memory as a table at once."""

Columns = dict[str, list[tuple[Steps, Values]]]
"""For each metric the steps and values of one chunk after another; metrics that were logged together share their steps."""


def read_csv(path: Path) -> tuple[dict[str, Series], list[str]]:
    """Metrics and notes of a ``metrics.csv``, or of another table with a column for the step.

    An empty cell is a metric that was not logged; "nan" and "inf" are values. A file whose columns changed in mid-run, by rows of
    another length or by another header, is read header by header; rows that fit none are left out and counted.

    Raises:
        UnusableLogError: If it is no such file, or an empty one.
    """
    notes: list[str] = []
    try:
        columns, non_numeric = _read_fast(path)
    except (pd.errors.ParserError, _HeaderChanged):
        columns, non_numeric, notes = _read_by_header(path)
    except pd.errors.EmptyDataError:
        raise UnusableLogError(f"{path} is empty: nothing was logged.") from None
    except (OSError, UnicodeError, csv.Error) as error:
        raise UnusableLogError(f"{path} cannot be read: {error}.") from None
    if non_numeric:
        notes.append(f"{non_numeric} cells of {path.name} are no numbers and count as NaN.")
    if not columns:
        raise UnusableLogError(f"{path} holds a header and no values: nothing was logged.")
    return concatenated(columns), notes


def step_column(columns: Iterable[object]) -> str | None:
    """The column of steps; None if there is none."""
    called = {str(column).strip().lower(): str(column) for column in columns}
    return next((called[name] for name in STEP_COLUMNS if name in called), None)


def concatenated(columns: Columns) -> dict[str, Series]:
    """Metrics from their chunks, which are let go of on the way."""
    metrics: dict[str, Series] = {}
    shared: dict[tuple[int, ...], Steps] = {}
    kept = [part for chunks in columns.values() for part, _ in chunks]  # so that no two of them have had the same id
    for key in list(columns):
        chunks = columns.pop(key)
        parts = tuple(id(part) for part, _ in chunks)
        if parts not in shared:
            shared[parts] = np.concatenate([part for part, _ in chunks])
        metrics[key] = Series.of(shared[parts], np.concatenate([values for _, values in chunks]))
    kept.clear()
    return metrics


class _HeaderChanged(Exception):  # noqa: N818 (no error: a way to read)
    """The columns change in the middle of the file."""


def _read_fast(path: Path) -> tuple[Columns, int]:
    columns: Columns = {}
    non_numeric = 0
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""], "index_col": False, "low_memory": False}
    with path.open("rb") as file, progress_bar(path.parent.name, path.stat().st_size, "B") as bar:
        for table in pd.read_csv(file, chunksize=CHUNK_ROWS, encoding_errors="replace", **options):
            step = step_column(table.columns)
            if step is None or not pd.api.types.is_numeric_dtype(table[step]):
                raise _HeaderChanged
            non_numeric += _append_chunk(columns, table, step, table[step])
            bar.update(file.tell() - bar.n)
    return columns, non_numeric


def _append_chunk(columns: Columns, table: pd.DataFrame, step: str, steps: pd.Series[Any]) -> int:
    """Keep what the columns of a chunk have, NaN and infinities included; how many cells hold other text."""
    has_step, shared, non_numeric = steps.abs() < LAST_STEP, dict[bytes, Steps](), 0
    for key in table.columns.drop(step):
        is_logged = (table[key].notna() & has_step).to_numpy()
        if not is_logged.any():
            continue
        logged = table[key][is_logged]
        if not pd.api.types.is_numeric_dtype(logged):
            words, logged = logged.astype(str).str.strip().str.lower(), pd.to_numeric(logged, errors="coerce")
            non_numeric += int((logged.isna() & ~words.isin(["nan", "+nan", "-nan"])).sum())
        rows = np.packbits(is_logged).tobytes()
        if rows not in shared:
            shared[rows] = steps[is_logged].to_numpy(dtype=np.int64)
        columns.setdefault(str(key), []).append((shared[rows], logged.to_numpy(dtype=np.float64, na_value=np.nan)))
    return non_numeric


def _read_by_header(path: Path) -> tuple[Columns, int, list[str]]:
    columns: Columns = {}
    headers, bad_rows, non_numeric = 0, 0, 0
    for step, header, rows, bad_row_count in _segments(path):
        headers, bad_rows = headers + 1, bad_rows + bad_row_count
        table = pd.DataFrame(rows, columns=header, dtype=object).replace("", np.nan)
        non_numeric += _append_chunk(columns, table, step, pd.to_numeric(table[step], errors="coerce"))
    if not headers:
        with path.open(encoding="utf-8", errors="replace") as file:
            first = file.readline().strip()[:60]
        raise UnusableLogError(f"{path} has no column {STEP_COLUMNS[0]!r}, as what a CSVLogger writes: it begins with {first!r}.")
    notes = [f"The columns of {path.name} change in mid-run: it was read in {headers} parts."] if headers > 1 else []
    if bad_rows:
        notes.append(f"{bad_rows} rows of {path.name} do not fit its header and are left out.")
    return columns, non_numeric, notes


def _segments(path: Path) -> Iterator[tuple[str, list[str], list[list[str]], int]]:
    """Each header, its column of steps first, with the rows under it that fit it, and how many do not."""
    step: str | None = None
    header: list[str] = []
    rows: list[list[str]] = []
    bad_rows = 0
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        for row in csv.reader(line.replace("\0", "") for line in file):
            found = step_column(row) if step is None else step
            if found in row and len(set(row)) == len(row):
                if step:
                    yield step, header, rows, bad_rows
                step, header, rows, bad_rows = found, row, [], 0
            elif step and row:
                if len(row) == len(header):
                    rows.append(row)
                else:
                    bad_rows += 1
    if step:
        yield step, header, rows, bad_rows
