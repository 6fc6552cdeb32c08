"""The folder that bundles go into: whole or not at all, up to a number and a size."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from clip_callbacks.bundles.bundle import FACTS, FORMAT, Bundle, first_line, hash_of

_UNFINISHED = ".unfinished-"
_STALE_S = 3600.0


class BundleFolder:
    """Where bundles go, written whole or not at all, up to a number and a size.

    Args:
        path: The folder.
        max_count: How many it may hold.
        max_bytes: How much they may take together.
    """

    def __init__(self, path: Path, max_count: int, max_bytes: float) -> None:
        """Touch nothing yet."""
        self.path = path
        self._max_count = max_count
        self._max_bytes = max_bytes

    def prepare(self) -> None:
        """Make the folder, see that it can be written to, and clear away what killed runs have left half-written.

        Raises:
            OSError: If it cannot.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.path) as file:
            file.write(b"?")
            file.flush()
        for half in self.path.glob(f"{_UNFINISHED}*"):
            with suppress(OSError):
                if time.time() - half.stat().st_mtime > _STALE_S:
                    shutil.rmtree(half)

    def fullness(self, more: int = 0) -> str | None:
        """What stands in the way of a further bundle, if anything does.

        Args:
            more: How many bytes it will take.
        """
        bundles = [found.parent for found in self.path.glob(f"[!.]*/{FACTS}")]  # but unfinished ones
        if len(bundles) >= self._max_count:
            return f"{self.path} holds {len(bundles)} bundles (max_count={self._max_count})"
        size = sum(_size(bundle) for bundle in bundles)
        if size + more > self._max_bytes:
            return f"{self.path} holds {_told(size)}, a further bundle takes {_told(more)} (max_bytes={self._max_bytes:g})"
        return None

    def write(
        self,
        name: str,
        facts: Mapping[str, Any],
        parts: Mapping[str, Any],
        texts: Mapping[str, str],
        missing: Mapping[str, str] | None = None,
    ) -> Bundle:
        """Write a bundle into a hidden folder and give that its name when it is complete.

        A part that cannot be pickled is left out, and the bundle says why.

        Args:
            name: Of the new folder; a number is put behind it if there is one of that name.
            facts: For ``bundle.json``.
            parts: What goes into files of tensors, by name.
            texts: What goes into text files, by name.
            missing: Why files are not there, by name.

        Raises:
            OSError: Whatever went wrong, as a full disk, or more bytes than are allowed; nothing of the bundle is left.
        """
        half = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.path))
        try:
            half.chmod(0o755)
            unwritten = {file: why for file, part in parts.items() if (why := _save(part, half / file))}
            for file, text in texts.items():
                (half / file).write_text(text, encoding="utf-8")
            files = {file.name: {"bytes": file.stat().st_size, "sha256": hash_of(file)} for file in sorted(half.iterdir())}
            told = {"format": FORMAT, **facts, "files": files, "missing": {**(missing or {}), **unwritten}}
            (half / FACTS).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
            if obstacle := self.fullness(_size(half)):  # no more can be told of it beforehand than what its tensors take
                raise OSError(obstacle)
            return Bundle(self._rename(half, name), told)
        except BaseException as error:
            shutil.rmtree(half, ignore_errors=True)
            if isinstance(error, RuntimeError):  # what torch makes of a full disk, which it mentions as the context
                context = error.__context__
                raise OSError(str(context) if isinstance(context, OSError) else first_line(error)) from error
            raise

    def _rename(self, half: Path, name: str) -> Path:
        number = 1
        while True:
            path = self.path / (name if number == 1 else f"{name}_{number}")
            if not path.exists():
                try:
                    return half.rename(path)
                except OSError:
                    if not path.exists():  # or another process was faster
                        raise
            number += 1


def _save(part: Any, file: Path) -> str | None:
    """Write a file of tensors, or say why that cannot be."""
    try:
        with file.open("wb") as stream:  # so that a full disk is an OSError that says so
            torch.save(part, stream)
    except OSError:
        raise
    except Exception as error:  # whatever pickling meets
        file.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # what torch makes of a full disk
            raise
        return first_line(error)
    return None


def _size(folder: Path) -> int:
    size = 0
    with suppress(OSError):  # somebody is clearing it away
        for file in folder.iterdir():
            size += file.lstat().st_size
    return size


def _told(size: float) -> str:
    return f"{size / 1e6:.1f} MB"
