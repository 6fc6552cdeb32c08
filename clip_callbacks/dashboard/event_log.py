"""Reads TensorBoard's event files."""

from __future__ import annotations

import gc
import mmap
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from clip_callbacks.dashboard.progress import progress_bar
from clip_callbacks.dashboard.runs import Series, UnusableLogError

LENGTH = struct.Struct("<Q")
BEFORE, AFTER = 12, 4
"""Bytes of a record before its content (its length and that one's checksum) and after it (its checksum)."""
STRIDE = 1 << 22
"""Bytes after which the progress bar is told."""
Points = dict[str, tuple["array[int]", "array[float]"]]
"""For each tag the steps and values."""


def read_events(paths: Sequence[Path]) -> tuple[dict[str, Series], list[str]]:
    """Scalars and notes of one run's event files, all points of them.

    The records are taken apart here and their contents by TensorBoard's own message classes: its Python reader reckons a
    checksum in Python for every value, and its fast one drops a broken end without a word.

    Raises:
        UnusableLogError: If they are no event files, or empty.
    """
    points: Points = {}
    with _without_garbage_collection():  # millions of messages come and go, none of them in a cycle
        notes = [note for path in sorted(paths) if (note := _read_file(path, points))]  # by their names, which begin with the time
    if not points:
        raise UnusableLogError(f"{paths[0].parent} holds no scalars: {' '.join(notes) or 'nothing was logged.'}")
    return {tag: Series.of(np.frombuffer(steps, np.int64), np.frombuffer(values)) for tag, (steps, values) in points.items()}, notes


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Broken(Exception):  # noqa: N818 (no error: the end of what can be read)
    """How a file ends that does not end as it should."""


def _read_file(path: Path, points: Points) -> str | None:
    """Take in the scalars of a file; a note if its end is broken, as after a crash, or while the run goes on."""
    from tensorboard.util.tensor_util import make_ndarray

    try:
        for event in _events(path):
            step = event.step
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    number = value.simple_value
                elif value.HasField("tensor") and value.metadata.plugin_data.plugin_name == "scalars":
                    number = float(make_ndarray(value.tensor))
                else:
                    continue
                tag = value.tag
                if tag not in points:
                    points[tag] = array("q"), array("d")
                steps, values = points[tag]
                steps.append(step)
                values.append(number)
    except _Broken as broken:
        return f"{path.name} is {broken}."
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}."
    return None


def _events(path: Path) -> Iterator[Any]:
    """The events of a file, one after another.

    Raises:
        _Broken: Where they end too early.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    parse, size, at = Event.FromString, path.stat().st_size, 0
    if not size:
        return
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        progress_bar(path.parent.name, size, "B") as bar,
    ):
        while at < size:
            start = at + BEFORE
            end = start + LENGTH.unpack_from(data, at)[0] if start <= size else size
            try:
                event = parse(data[start:end]) if end + AFTER <= size else None
            except DecodeError:
                event = None
            if event is None and not at:
                raise _Broken("not one of TensorBoard's event files")
            if event is None:
                where = "cut off in its last record" if end + AFTER > size else "damaged"
                raise _Broken(f"{where}: it was read up to there")
            yield event
            at = end + AFTER
            if at - bar.n > STRIDE or at == size:
                bar.update(at - bar.n)
