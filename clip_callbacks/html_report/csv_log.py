"""Read the ``metrics.csv`` of Lightning's CSVLogger, and other CSV files with a column for the step."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from clip_callbacks.core.wording import plural
from clip_callbacks.html_report.progress import progress_bar
from clip_callbacks.html_report.runs import UnusableLogError
from clip_callbacks.html_report.series import LAST_STEP, Series, Steps, Values

if TYPE_CHECKING:
    from typing_extensions import Buffer

STEP_COLUMNS = ("step", "global_step", "trainer/global_step", "_step", "iteration", "iter")
"""Names of the column of steps, upper or lower case; the first that is found counts."""
CHUNK_ROWS = 200_000
"""The number of rows that are parsed at once, which bounds memory."""
BLOCK_BYTES = 1 << 16
"""Bytes that are read at once in search of the last finished line."""

Columns = dict[str, list[tuple[Steps, Values]]]
"""Chunks of steps and values of each metric; metrics that were logged together share the arrays of their steps."""


def read_csv(path: Path) -> tuple[dict[str, Series], list[str]]:
    """Read the metrics of a CSV file with a column for the step, and return them with notes.

    An empty cell is a metric that was not logged; "nan" and "inf" are values. A file whose columns change in mid-run, by rows of
    another length or by another header, is read header by header. Rows that fit no header, rows without a step, and a last line
    without its end are left out and counted.

    Raises:
        UnusableLogError: If the file is empty, cannot be read, or has no column for the step.
    """
    try:
        try:
            content = _read_fast(path)
        except (pd.errors.ParserError, _HeaderChanged):
            content = _read_by_header(path)
        is_cut = _finished_bytes(path) < path.stat().st_size
    except pd.errors.EmptyDataError:
        raise UnusableLogError(f"{path} is empty: nothing was logged.") from None
    except (OSError, UnicodeError, csv.Error) as error:
        raise UnusableLogError(f"{path} cannot be read: {error}.") from None
    if not content.columns and is_cut:
        raise UnusableLogError(f"{path} holds one line, which has no end and may be half written. End it with a line break.")
    if not content.columns:
        raise UnusableLogError(f"{path} holds a header but no values: nothing was logged.")
    return concatenated(content.columns), content.notes(path.name, is_cut=is_cut)


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


@dataclass
class _Content:
    """What was read from a file, and what was left out.

    Args:
        columns: Chunks of each metric.
        headers: Number of headers.
        non_numeric: Number of cells that are not numbers.
        misfits: Number of rows that fit no header.
        stepless: Number of rows without a step.
    """

    columns: Columns = field(default_factory=dict)
    headers: int = 1
    non_numeric: int = 0
    misfits: int = 0
    stepless: int = 0

    def append(self, table: pd.DataFrame, step: str, steps: pd.Series[Any]) -> None:
        """Append the logged cells of a chunk, NaN and inf included.

        Args:
            table: Rows of the file.
            step: Name of the column of steps.
            steps: That column as numbers.
        """
        has_step, shared = steps.abs() < LAST_STEP, dict[bytes, Steps]()
        others = table.columns.drop(step)
        self.stepless += int((table.loc[~has_step, others].notna()).any(axis="columns").sum())
        for key in others:
            is_logged = (table[key].notna() & has_step).to_numpy()
            if not is_logged.any():
                continue
            logged = table[key][is_logged]
            if not pd.api.types.is_numeric_dtype(logged):
                words, logged = logged.astype(str).str.strip().str.lower(), pd.to_numeric(logged, errors="coerce")
                self.non_numeric += int((logged.isna() & ~words.isin(["nan", "+nan", "-nan"])).sum())
            rows = np.packbits(is_logged).tobytes()
            if rows not in shared:
                shared[rows] = steps[is_logged].to_numpy(dtype=np.int64)
            self.columns.setdefault(str(key), []).append((shared[rows], logged.to_numpy(dtype=np.float64, na_value=np.nan)))

    def notes(self, name: str, *, is_cut: bool) -> list[str]:
        """Say what was left out.

        Args:
            name: Name of the file.
            is_cut: If True, its last line has no end.
        """
        fit = plural(self.misfits, f"row of {name} does not fit its header and is", f"rows of {name} do not fit its header and are")
        have = plural(self.stepless, f"row of {name} has no step and is", f"rows of {name} have no step and are")
        cells = plural(self.non_numeric, f"cell of {name} is not a number and is", f"cells of {name} are not numbers and are")
        said = {
            f"The columns of {name} change in mid-run: it was read in {self.headers} parts.": self.headers > 1,
            f"{self.misfits} {fit} left out.": self.misfits,
            f"{self.stepless} {have} left out.": self.stepless,
            f"{self.non_numeric} {cells} read as NaN.": self.non_numeric,
            f"The last line of {name} has no end, as if it were still being written, and is left out.": is_cut,
        }
        return [note for note, holds in said.items() if holds]


class _FinishedLines(io.RawIOBase):
    """A file up to the end of its last finished line: of a line that is still being written, a number may lack digits."""

    def __init__(self, path: Path) -> None:
        self._left = _finished_bytes(path)
        self._file = path.open("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        count = self._file.readinto(memoryview(buffer)[: self._left]) or 0
        self._left -= count
        return count

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def _finished_bytes(path: Path) -> int:
    """Return the number of bytes up to the end of the last finished line; all of a file of one line, which is a header."""
    with path.open("rb") as file:
        size = end = file.seek(0, io.SEEK_END)
        while end:
            begin = max(0, end - BLOCK_BYTES)
            file.seek(begin)
            if (place := max(file.read(end - begin).rfind(mark) for mark in (b"\n", b"\r"))) >= 0:
                return begin + place + 1
            end = begin
    return size


def _read_fast(path: Path) -> _Content:
    """Read a file with one header."""
    content = _Content()
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""], "index_col": False, "low_memory": False}
    with io.BufferedReader(_FinishedLines(path)) as file, progress_bar(path.parent.name, path.stat().st_size, "B") as bar:
        for table in pd.read_csv(file, chunksize=CHUNK_ROWS, encoding_errors="replace", **options):
            step = step_column(table.columns)
            if step is None or not pd.api.types.is_numeric_dtype(table[step]):
                raise _HeaderChanged
            content.append(table, step, table[step])
            bar.update(file.tell() - bar.n)
    return content


def _read_by_header(path: Path) -> _Content:
    """Read a file whose columns change."""
    content = _Content(headers=0)
    for step, header, rows, misfits in _segments(path):
        content.headers, content.misfits = content.headers + 1, content.misfits + misfits
        table = pd.DataFrame(rows, columns=header, dtype=object).replace("", np.nan)
        content.append(table, step, pd.to_numeric(table[step], errors="coerce"))
    if not content.headers:
        with path.open(encoding="utf-8", errors="replace") as file:
            first = file.readline().strip()[:60]
        raise UnusableLogError(
            f"{path} must have a column {STEP_COLUMNS[0]!r}, as a CSVLogger writes it; it begins with {first!r}."
        )
    return content


def _segments(path: Path) -> Iterator[tuple[str, list[str], list[list[str]], int]]:
    """Yield for each header: its column of steps, the header, the rows that fit it, and the number of rows so far that fit none."""
    step: str | None = None
    header: list[str] = []
    rows: list[list[str]] = []
    bad_rows = 0
    with io.TextIOWrapper(io.BufferedReader(_FinishedLines(path)), "utf-8-sig", "replace", newline="") as file:
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
