"""Read the ``metrics.csv`` of Lightning's CSVLogger, and other CSV files with a column for the step."""

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
"""Names of the column of steps, upper or lower case; the first that is found counts."""
CHUNK_ROWS = 200_000
"""The number of rows that are parsed at once, which bounds memory."""

Columns = dict[str, list[tuple[Steps, Values]]]
"""Chunks of steps and values of each metric; metrics that were logged together share the arrays of their steps."""


def read_csv(path: Path) -> tuple[dict[str, Series], list[str]]:
    """Read the metrics of a CSV file with a column for the step, and return them with notes.

    An empty cell is a metric that was not logged; "nan" and "inf" are values. A file whose columns change in mid-run, by rows of
    another length or by another header, is read header by header; rows that fit no header are left out and counted.

    Raises:
        UnusableLogError: If the file is empty, cannot be read, or has no column for the step.
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
        notes.append(f"{non_numeric} cells of {path.name} are not numbers and are read as NaN.")
    if not columns:
        raise UnusableLogError(f"{path} holds a header but no values: nothing was logged.")
    return concatenated(columns), notes


def step_column(columns: Iterable[object]) -> str | None:
    """Return the name of the column of steps; None if there is none."""
    called = {str(column).strip().lower(): str(column) for column in columns}
    return next((called[name] for name in STEP_COLUMNS if name in called), None)


def concatenated(columns: Columns) -> dict[str, Series]:
    """Join the chunks of each metric, removing them from ``columns`` on the way to save memory."""
    metrics: dict[str, Series] = {}
    shared: dict[tuple[int, ...], Steps] = {}
    kept = [part for chunks in columns.values() for part, _ in chunks]  # keeps all arrays alive, so that their ids stay unique
    for key in list(columns):
        chunks = columns.pop(key)
        parts = tuple(id(part) for part, _ in chunks)
        if parts not in shared:
            shared[parts] = np.concatenate([part for part, _ in chunks])
        metrics[key] = Series.of(shared[parts], np.concatenate([values for _, values in chunks]))
    kept.clear()
    return metrics


class _HeaderChanged(Exception):  # noqa: N818 (not an error: the file is then read another way)
    """The columns of the file change in mid-run, or it has no numeric column of steps."""


def _read_fast(path: Path) -> tuple[Columns, int]:
    """Read a file with one header; return its columns and the number of cells that are not numbers."""
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
    """Append the logged cells of a chunk, NaN and inf included; return the number of cells that are not numbers."""
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
    """Read a file whose columns change; return its columns, the number of cells that are not numbers, and notes."""
    columns: Columns = {}
    headers, bad_rows, non_numeric = 0, 0, 0
    for step, header, rows, bad_row_count in _segments(path):
        headers, bad_rows = headers + 1, bad_rows + bad_row_count
        table = pd.DataFrame(rows, columns=header, dtype=object).replace("", np.nan)
        non_numeric += _append_chunk(columns, table, step, pd.to_numeric(table[step], errors="coerce"))
    if not headers:
        with path.open(encoding="utf-8", errors="replace") as file:
            first = file.readline().strip()[:60]
        raise UnusableLogError(
            f"{path} must have a column {STEP_COLUMNS[0]!r}, as a CSVLogger writes it; it begins with {first!r}."
        )
    notes = []
    if headers > 1:
        notes.append(f"The columns of {path.name} change in mid-run: it was read in {headers} parts.")
    if bad_rows:
        notes.append(f"{bad_rows} rows of {path.name} do not fit its header and are left out.")
    return columns, non_numeric, notes


def _segments(path: Path) -> Iterator[tuple[str, list[str], list[list[str]], int]]:
    """Yield for each header: its column of steps, the header, the rows that fit it, and the number of rows so far that fit none."""
    step: str | None = None
    header: list[str] = []
    rows: list[list[str]] = []
    bad_rows = 0
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        for row in csv.reader(line.replace("\0", "") for line in file):
            found = step or step_column(row)
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
