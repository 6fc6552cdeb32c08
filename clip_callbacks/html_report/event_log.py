"""Reads TensorBoard's event files."""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_callbacks.html_report.progress import progress_bar
from clip_callbacks.html_report.runs import UnusableLogError
from clip_callbacks.html_report.series import Series

RECORD_LENGTH = struct.Struct("<Q")
HEADER_BYTES, FOOTER_BYTES = 12, 4
"""Bytes of a record before its content (its length and that one's checksum) and after it (its checksum)."""
TIME_TAG, STEP_TAG, SIMPLE_VALUE_TAG = b"\x09", b"\x10", b"\x15"
"""What stands before an event's time (8 bytes), its step (a varint) and a simple_value (a float)."""
STEP_TAG_OFFSET, VALUE_BYTES, FLOAT32 = 9, 4, struct.Struct("<f")
FIRST_NEGATIVE_VARINT = 1 << 63
"""From here on a varint is a number below 0."""
NOT_AN_EVENT_FILE = "not one of TensorBoard's event files"
PROGRESS_BYTES = 1 << 22
"""Bytes after which the progress bar is told."""
Points = dict[str, tuple["array[int]", "array[float]"]]
"""For each tag the steps and values."""


def read_events(paths: Sequence[Path]) -> tuple[dict[str, Series], list[str]]:
    """Scalars and notes of one run's event files, all points of them.

    The records are taken apart here and their contents by TensorBoard's own message classes, but for those that differ from one it
    has parsed in time, step and value alone. TensorBoard's Python reader takes five times as long, since it reckons a checksum
    in Python for every value; its fast one drops a broken end without a word.

    Raises:
        UnusableLogError: If they are no event files, or empty.
    """
    points: Points = {}
    notes = [note for path in sorted(paths) if (note := _read_file(path, points))]  # by their names, which begin with the time
    if not points:
        raise UnusableLogError(f"{paths[0].parent} holds no scalars: {' '.join(notes) or 'nothing was logged.'}")
    return {tag: Series.of(np.frombuffer(steps, np.int64), np.frombuffer(values)) for tag, (steps, values) in points.items()}, notes


class _IncompleteFile(Exception):  # noqa: N818 (no error: the end of what can be read)
    """How a file ends that does not end as it should."""


def _read_file(path: Path, points: Points) -> str | None:
    """Take in the scalars of a file; a note if its end is broken, as after a crash, or while the run goes on."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    known: dict[bytes, tuple[array[int], array[float]]] = {}
    first = True
    try:
        for content in _records(path):
            step, after_step = _parse_step(content)
            if (points_of_tag := known.get(content[after_step:-VALUE_BYTES])) is not None:
                points_of_tag[0].append(step)
                points_of_tag[1].append(FLOAT32.unpack(content[-VALUE_BYTES:])[0])
                continue
            event = Event.FromString(content)
            _append_scalars(event, points)
            if _is_single_scalar(event, content, after_step):
                known[content[after_step:-VALUE_BYTES]] = points[event.summary.value[0].tag]
            first = False
    except DecodeError:
        return f"{path.name} is {NOT_AN_EVENT_FILE if first else 'damaged: it was read up to there'}."
    except _IncompleteFile as broken:
        return f"{path.name} is {broken}."
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}."
    return None


def _append_scalars(event: Any, points: Points) -> None:
    """Keep the scalars of an event, in either of the forms in which TensorBoard's writers put them."""
    from tensorboard.util.tensor_util import make_ndarray

    for value in event.summary.value:
        if value.HasField("simple_value"):
            number = value.simple_value
        elif value.HasField("tensor") and value.metadata.plugin_data.plugin_name == "scalars":
            number = float(make_ndarray(value.tensor))
        else:
            continue
        steps, values = points.setdefault(value.tag, (array("q"), array("d")))
        steps.append(event.step)
        values.append(number)


def _parse_step(content: bytes) -> tuple[int, int]:
    """The step of a record that has its time and its step ahead, as all writers put them, and where what follows begins.

    Of any other record, of step 0, which is not written, and of steps below it nothing is said: ``(0, 0)``.
    """
    if content[:1] != TIME_TAG or content[STEP_TAG_OFFSET : STEP_TAG_OFFSET + 1] != STEP_TAG:
        return 0, 0
    step, shift, at = 0, 0, STEP_TAG_OFFSET + 1
    while at < len(content):
        byte = content[at]
        step |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:  # noqa: PLR2004 (the last one of a varint)
            return (step, at) if step < FIRST_NEGATIVE_VARINT else (0, 0)
        shift += 7
    return 0, 0


def _is_single_scalar(event: Any, content: bytes, after_step: int) -> bool:
    """Whether an event is one scalar whose value is the end of its record.

    Then records that are the same but for time, step and value, byte by byte, are the same but for these, and need not be parsed.
    """
    if not after_step or len(event.summary.value) != 1 or content[-VALUE_BYTES - 1 : -VALUE_BYTES] != SIMPLE_VALUE_TAG:
        return False
    (value,) = event.summary.value
    return bool(value.HasField("simple_value")) and FLOAT32.pack(value.simple_value) == content[-VALUE_BYTES:]


def _records(path: Path) -> Iterator[bytes]:
    """The contents of the records of a file, one after another.

    Raises:
        _IncompleteFile: Where they end too early.
    """
    size, at = path.stat().st_size, 0
    if not size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, progress_bar(
        path.parent.name, size, "B"
    ) as bar:  # fmt: skip
        while at < size:
            start = at + HEADER_BYTES
            end = start + RECORD_LENGTH.unpack_from(data, at)[0] if start <= size else size
            if end + FOOTER_BYTES > size:
                raise _IncompleteFile("cut off in its last record: it was read up to there" if at else NOT_AN_EVENT_FILE)
            yield data[start:end]
            at = end + FOOTER_BYTES
            if at - bar.n > PROGRESS_BYTES or at == size:
                bar.update(at - bar.n)
