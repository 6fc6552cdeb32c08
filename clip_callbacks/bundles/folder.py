"""The folder of bundles, which limits their number and size, and holds complete bundles only."""

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
"""Age in seconds above which an unfinished bundle is left over from a process that was killed."""


class BundleFolder:
    """A folder of bundles, with limits on their number and size.

    Args:
        path: The folder.
        max_count: Number of bundles that the folder may hold.
        max_bytes: Size of all bundles together, in bytes.
    """

    def __init__(self, path: Path, max_count: int, max_bytes: float) -> None:
        """Set the limits; the folder is not touched."""
        self.path = path
        self._max_count = max_count
        self._max_bytes = max_bytes

    def prepare(self) -> None:
        """Make the folder, check that it can be written to, and delete unfinished bundles of runs that were killed.

        Raises:
            OSError: If the folder cannot be made or written to.
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
        """Return the reason why the folder takes no further bundle; None if it does.

        Args:
            more: Size of the further bundle, in bytes.
        """
        bundles = [found.parent for found in self.path.glob(f"[!.]*/{FACTS}")]  # names of unfinished ones begin with a dot
        if len(bundles) >= self._max_count:
            return f"{self.path} holds {len(bundles)} bundles (max_count={self._max_count})"
        size = sum(_size(bundle) for bundle in bundles)
        if size + more > self._max_bytes:
            sizes = f"{size / 1e6:.1f} MB, a further bundle takes {more / 1e6:.1f} MB"
            return f"{self.path} holds {sizes} (max_bytes={self._max_bytes:g})"
        return None

    def write(
        self,
        name: str,
        facts: Mapping[str, Any],
        parts: Mapping[str, Any],
        texts: Mapping[str, str],
        missing: Mapping[str, str] | None = None,
    ) -> Bundle:
        """Write a bundle into a hidden folder, which gets the name of the bundle when it is complete.

        A part that cannot be pickled is left out, and ``bundle.json`` gives the reason.

        Args:
            name: Name of the bundle's folder; if it exists, a number is appended.
            facts: Contents of ``bundle.json``.
            parts: Contents of the files of tensors, by name of the file.
            texts: Contents of the text files, by name of the file.
            missing: Reasons why files are missing, by name of the file.

        Returns:
            The bundle.

        Raises:
            OSError: If the disk or the folder is full, or the files cannot be written; nothing of the bundle remains.
        """
        half = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.path))
        try:
            half.chmod(0o755)
            unwritten = {file: why for file, part in parts.items() if (why := _save(part, half / file))}
            for file, text in texts.items():
                (half / file).write_text(text, encoding="utf-8")
            files = {file.name: {"bytes": file.stat().st_size, "sha256": hash_of(file)} for file in sorted(half.iterdir())}
            contents = {"format": FORMAT, **facts, "files": files, "missing": {**(missing or {}), **unwritten}}
            (half / FACTS).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
            if reason := self.fullness(_size(half)):  # only now its whole size is known
                raise OSError(reason)
            return Bundle(self._rename(half, name), contents)
        except BaseException as error:
            shutil.rmtree(half, ignore_errors=True)
            if isinstance(error, RuntimeError):  # torch raises it on a full disk, with the OSError as its context
                context = error.__context__
                raise OSError(str(context) if isinstance(context, OSError) else first_line(error)) from error
            raise

    def _rename(self, half: Path, name: str) -> Path:
        path, number = self.path / name, 1
        while True:
            if not path.exists():
                try:
                    return half.rename(path)
                except OSError:
                    if not path.exists():  # if it exists now, another process was faster
                        raise
            number += 1
            path = self.path / f"{name}_{number}"


def _save(part: Any, file: Path) -> str | None:
    """Write a file of tensors; return the reason if the part cannot be pickled."""
    try:
        with file.open("wb") as stream:  # a full disk then raises an OSError that names it
            torch.save(part, stream)
    except OSError:
        raise
    except Exception as error:  # objects may raise anything when they are pickled
        file.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # the disk is full
            raise
        return first_line(error)
    return None


def _size(folder: Path) -> int:
    size = 0
    with suppress(OSError):  # another process may delete the folder
        for file in folder.iterdir():
            size += file.lstat().st_size
    return size
