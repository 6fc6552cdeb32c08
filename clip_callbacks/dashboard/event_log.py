"""Reads TensorBoard's event files."""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clip_callbacks.dashboard.runs import Series, UnusableLogError

LENGTH = struct.Struct("<Q")
BEFORE, AFTER = 12, 4
"""Bytes of a record before its content (its length and that one's checksum) and after it (its checksum)."""


def read_events(paths: Sequence[Path]) -> tuple[dict[str, Series], list[str]]:
    """Scalars and notes of one run's event files, all points of them.

    The records are taken apart here and their contents by TensorBoard's own message classes: its Python reader reckons a
    checksum in Python for every value, and its fast one drops a broken end without a word.

    Raises:
        UnusableLogError: If they are no event files, or empty.
    """
    scalars: dict[str, tuple[array[int], array[float]]] = {}
    notes: list[str] = []
    for path in sorted(paths):
        for step, tag, value in _scalars(path, notes):
            steps, values = scalars.setdefault(tag, (array("q"), array("d")))
            steps.append(step)
            values.append(value)
    if not scalars:
        broken = f" ({' '.join(notes)})" if notes else ""
        raise UnusableLogError(f"{paths[0].parent} holds no scalars: nothing was logged{broken}.")
    return {
        tag: Series.of(np.frombuffer(steps, np.int64), np.frombuffer(values)) for tag, (steps, values) in scalars.items()
    }, notes


def _scalars(path: Path, notes: list[str]) -> Iterator[tuple[int, str, float]]:
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    first = True
    for content in _records(path, notes):
        try:
            event = Event.FromString(content)
        except DecodeError:
            if first:
                raise UnusableLogError(f"{path} is not one of TensorBoard's event files.") from None
            notes.append(f"{path.name} is damaged: it was read up to there.")
            return
        first = False
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                yield event.step, value.tag, value.simple_value
            elif kind == "tensor" and value.metadata.plugin_data.plugin_name == "scalars":
                from tensorboard.util.tensor_util import make_ndarray

                yield event.step, value.tag, float(make_ndarray(value.tensor))


def _records(path: Path, notes: list[str]) -> Iterator[bytes]:
    """The contents of the records; a note if the last one is cut off, as after a crash, or while the run goes on."""
    size = path.stat().st_size
    if not size:
        return
    options = {"unit": "B", "unit_scale": True, "delay": 1.0, "leave": False, "disable": None}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, tqdm(
        total=size, desc=path.parent.name, **options
    ) as bar:  # fmt: skip
        at = 0
        while at < size:
            start = at + BEFORE
            end = start + LENGTH.unpack_from(data, at)[0] if start <= size else size + 1
            if end + AFTER > size:
                if not at:
                    raise UnusableLogError(f"{path} is not one of TensorBoard's event files, or cut off in its first record.")
                notes.append(f"{path.name} is cut off in its last record: it was read up to there.")
                return
            yield data[start:end]
            if end - bar.n > 1 << 20:
                bar.update(end - bar.n)
            at = end + AFTER
