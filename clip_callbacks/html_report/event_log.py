"""Read the event files of TensorBoard."""

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
"""Bytes of a record before its content (length and checksum of the length) and after it (checksum of the content)."""
TIME_TAG, STEP_TAG, SIMPLE_VALUE_TAG = b"\x09", b"\x10", b"\x15"
"""Protobuf tags before the time (8 bytes), the step (a varint) and the simple_value (a float32) of an event."""
STEP_TAG_OFFSET, VALUE_BYTES, FLOAT32 = 9, 4, struct.Struct("<f")
FIRST_NEGATIVE_VARINT = 1 << 63
"""Varints from here on are negative numbers."""
NOT_AN_EVENT_FILE = "not an event file of TensorBoard"
PROGRESS_BYTES = 1 << 22
"""Bytes between two updates of the progress bar."""
Points = dict[str, tuple["array[int]", "array[float]"]]
"""Steps and values of each tag."""


def read_events(paths: Sequence[Path]) -> tuple[dict[str, Series], list[str]]:
    """Read all scalars of the event files of one run, and return them with notes.

    Records are separated here, and their contents are parsed by TensorBoard's message classes; a record that differs from a parsed
    one only in time, step and value is read without parsing. TensorBoard's own Python reader takes five times as long, because it
    computes a checksum in Python for every value, and its fast reader drops an incomplete end silently.

    Raises:
        UnusableLogError: If the files hold no scalars.
    """
    points: Points = {}
    notes = [note for path in sorted(paths) if (note := _read_file(path, points))]  # file names begin with the time of writing
    if not points:
        raise UnusableLogError(f"{paths[0].parent} holds no scalars: {' '.join(notes) or 'nothing was logged.'}")
    return {tag: Series.of(np.frombuffer(steps, np.int64), np.frombuffer(values)) for tag, (steps, values) in points.items()}, notes


class _IncompleteFile(Exception):  # noqa: N818 (not an error: the readable part ends here)
    """The file ends within a record; the message completes the sentence "FILE is"."""


def _read_file(path: Path, points: Points) -> str | None:
    """Append the scalars of a file; return a note if it ends within a record, as after a crash or during the run."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    known: dict[bytes, tuple[array[int], array[float]]] = {}
    damage = NOT_AN_EVENT_FILE
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
            damage = "damaged: it was read up to there"
    except DecodeError:
        return f"{path.name} is {damage}."
    except _IncompleteFile as broken:
        return f"{path.name} is {broken}."
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}."
    return None


def _append_scalars(event: Any, points: Points) -> None:
    """Append the scalars of an event, in either of the two forms that TensorBoard's writers use."""
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
    """Return the step of a record that begins with its time and step, as all writers put them, and the offset after the step.

    Returns ``(0, 0)`` for other records, for step 0, which is not written, and for negative steps.
    """
    if content[:1] != TIME_TAG or content[STEP_TAG_OFFSET : STEP_TAG_OFFSET + 1] != STEP_TAG:
        return 0, 0
    step, shift, at = 0, 0, STEP_TAG_OFFSET + 1
    while at < len(content):
        byte = content[at]
        step |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:  # noqa: PLR2004 (the last byte of a varint)
            if step < FIRST_NEGATIVE_VARINT:
                return step, at
            return 0, 0
        shift += 7
    return 0, 0


def _is_single_scalar(event: Any, content: bytes, after_step: int) -> bool:
    """Return whether an event is a single scalar whose value is at the end of its record.

    Another record with the same bytes between step and value then has the same tag, and need not be parsed.
    """
    if not after_step or len(event.summary.value) != 1 or content[-VALUE_BYTES - 1 : -VALUE_BYTES] != SIMPLE_VALUE_TAG:
        return False
    (value,) = event.summary.value
    return bool(value.HasField("simple_value")) and FLOAT32.pack(value.simple_value) == content[-VALUE_BYTES:]


def _records(path: Path) -> Iterator[bytes]:
    """Yield the contents of the records of a file.

    Raises:
        _IncompleteFile: If the file ends within a record.
    """
    size, at = path.stat().st_size, 0
    if not size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, progress_bar(
        path.parent.name, size, "B"
    ) as bar:  # fmt: skip
        while at < size:
            start = at + HEADER_BYTES
            end = size
            if start <= size:
                end = start + RECORD_LENGTH.unpack_from(data, at)[0]
            if end + FOOTER_BYTES > size:
                if not at:
                    raise _IncompleteFile(NOT_AN_EVENT_FILE)
                raise _IncompleteFile("incomplete: it ends within a record and was read up to there")
            yield data[start:end]
            at = end + FOOTER_BYTES
            if at - bar.n > PROGRESS_BYTES or at == size:
                bar.update(at - bar.n)
