"""A bad step in a folder: what is needed to run it again, in formats that cannot run code.

``bundle.json`` says where, when and what, with the sizes and hashes of the other files; ``batches.pt`` holds the micro-batches of
the window with the random numbers' states before each; ``weights.pt`` and ``optimizers.pt``, if asked for, the weights and the
optimizers' states before the step; ``config.yaml`` the configuration of the run, if it came from LightningCLI. Tensors are read by
``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
KINDS = ("nonfinite", "spike")
FACTS = "bundle.json"
BATCHES = "batches.pt"
WEIGHTS = "weights.pt"
OPTIMIZERS = "optimizers.pt"
CONFIG = "config.yaml"

_UNFINISHED = ".unfinished-"
_STALE_S = 3600.0
_NDARRAY = "clip_callbacks.ndarray"
_TOLD = 6


class UnusableBundleError(ValueError):
    """A bundle that cannot be read; the message says why, in one line."""


@dataclass(frozen=True)
class Bundle:
    """A bundle as it lies in its folder.

    Args:
        path: The folder.
        facts: What ``bundle.json`` says.
    """

    path: Path
    facts: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Bundle:
        """Read ``bundle.json``, and see that the other files are those that it tells of.

        Raises:
            UnusableBundleError: If it is no bundle, of another format, truncated, or not as it was written.
        """
        try:
            facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            inside = sorted(found.parent.name for found in path.glob(f"*/{FACTS}"))
            hint = f", which holds {len(inside)} of them: name one, such as {path / inside[0]}" if inside else ""
            raise UnusableBundleError(f"`bundle` must be a folder with a {FACTS}, got {path}{hint}.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UnusableBundleError(f"{path / FACTS} cannot be read: {error}") from None
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            got = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
            raise UnusableBundleError(f"{path / FACTS} must have the format {FORMAT}, got {got!r}.")
        _check(path, facts)
        return cls(path, facts)

    @property
    def notes(self) -> list[str]:
        """What stands in the way of a replay, in words."""
        notes = [f"its {name} could not be written: {why}" for name, why in self.facts["missing"].items()]
        classes = classes_in(self.path / BATCHES)
        if classes:
            notes += [f"its batches hold objects of {', '.join(classes)}: a replay needs --trust for each"]
        if self.facts["batches"].get("changed_in_place"):
            notes += ["the batch was changed in place after it began: it may not be what training_step got"]
        return notes

    @property
    def place(self) -> dict[str, Any]:
        """Step, epoch, batch and rank of the bad step; with several optimizers, which."""
        keys = ("step", "epoch", "batch", "rank", "optimizer")
        return {key: self.facts["report"][key] for key in keys if key in self.facts["report"]}

    def micro_batches(self, trust: Sequence[type] = ()) -> list[dict[str, Any]]:
        """The micro-batches of the window, in order: ``batch``, ``batch_idx``, ``loss`` (0-dim) and ``rng`` (states before it).

        Args:
            trust: Classes that may be unpickled: whoever wrote the bundle then chooses what their constructors get.

        Raises:
            UnusableBundleError: If it holds none, or objects of classes that are not trusted.
        """
        if BATCHES not in self.facts["files"]:
            raise UnusableBundleError(f"{self.path} holds no batches: {self.facts['missing'].get(BATCHES, 'none were kept')}.")
        with torch.serialization.safe_globals(list(trust)):
            rows = self._load(BATCHES)
        if not isinstance(rows, list) or not all(map(_is_micro_batch, rows)):
            raise UnusableBundleError(
                f"{self.path / BATCHES} must hold a list of micro-batches with batch, batch_idx, loss and rng, got "
                f"{_shape_of(rows)}."
            )
        try:
            return [row | {"batch": _decoded(row["batch"]), "rng": _decoded(row["rng"])} for row in rows]
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:  # of arrays that are none
            raise UnusableBundleError(f"{self.path / BATCHES} cannot be read: {type(error).__name__}: {error}") from None

    def weights(self) -> dict[str, Any] | None:
        """The ``state_dict`` of the module before the step, under "module"; None if it is not in the bundle."""
        if WEIGHTS not in self.facts["files"]:
            return None
        weights = self._load(WEIGHTS)
        if not isinstance(weights, dict) or not isinstance(weights.get("module"), dict):
            raise UnusableBundleError(
                f"{self.path / WEIGHTS} must hold the module's state_dict under `module`, got {_shape_of(weights)}."
            )
        return weights

    def optimizers(self) -> list[dict[str, Any]]:
        """The ``state_dict`` of each optimizer before the step; none if they are not in the bundle."""
        states = self._load(OPTIMIZERS) if OPTIMIZERS in self.facts["files"] else []
        if not isinstance(states, list) or not all(isinstance(state, dict) for state in states):
            raise UnusableBundleError(f"{self.path / OPTIMIZERS} must hold a list of state_dicts, got {_shape_of(states)}.")
        return states

    def _load(self, name: str) -> Any:
        try:
            return torch.load(self.path / name, map_location="cpu", weights_only=True)
        except Exception as error:
            if classes := classes_in(self.path / name):
                raise UnusableBundleError(
                    f"{self.path / name} holds objects that could run code, of {', '.join(classes)}. If you trust whoever wrote "
                    f"the bundle, name them: {' '.join(f'--trust {name}' for name in classes)}"
                ) from None
            raise UnusableBundleError(
                f"{self.path / name} cannot be read as torch.save writes it: {type(error).__name__}: {_first_line(error)}"
            ) from None


def _is_micro_batch(row: Any) -> bool:
    if not isinstance(row, dict) or "batch" not in row or not isinstance(row.get("rng"), dict):
        return False
    loss, batch_idx = row.get("loss"), row.get("batch_idx")
    has_loss = loss is None or (isinstance(loss, Tensor) and loss.numel() == 1)
    return has_loss and isinstance(batch_idx, int) and batch_idx >= 0


def _shape_of(content: Any) -> str:
    """What it is instead, as briefly as can be."""
    if isinstance(content, dict):
        return f"a dict with {', '.join(map(str, list(content)[:_TOLD])) or 'nothing'}"
    if isinstance(content, list):
        return f"a list of {', '.join(sorted({type(entry).__name__ for entry in content})) or 'nothing'}"
    return f"a {type(content).__name__}"


def _check(path: Path, facts: dict[str, Any]) -> None:
    """See that all files are there as they were written, and that nothing is missing that readers rely on."""
    for key in ("report", "versions", "module", "trainer", "weights", "batches", "files", "missing"):
        if not isinstance(facts.get(key), dict):
            raise UnusableBundleError(f"{path / FACTS} must tell of `{key}`, got {facts.get(key)!r}.")
    if facts.get("kind") not in KINDS:
        raise UnusableBundleError(f"{path / FACTS} must tell of a `kind` among {', '.join(KINDS)}, got {facts.get('kind')!r}.")
    for name, known in facts["files"].items():
        file = path / name
        if file.parent != path or not isinstance(known, dict):  # a stranger's bundle may not point elsewhere
            raise UnusableBundleError(f"{path / FACTS} must name files of its own folder, got {name!r}.")
        if not file.is_file():
            raise UnusableBundleError(f"{file} is missing.")
        size = file.stat().st_size
        if size != known.get("bytes"):
            raise UnusableBundleError(f"{file} must have {known.get('bytes')} bytes, got {size}: it is truncated or changed.")
        if _hash(file) != known.get("sha256"):
            raise UnusableBundleError(f"{file} is not as it was written: its hash is another one.")


class BundleFolder:
    """Where bundles go, written whole or not at all, up to a number and a size.

    Args:
        path: The folder.
        max_bundles: How many it may hold.
        max_bytes: How much they may take together.
    """

    def __init__(self, path: Path, max_bundles: int, max_bytes: float) -> None:
        """Touch nothing yet."""
        self.path = path
        self._max_bundles = max_bundles
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
        if len(bundles) >= self._max_bundles:
            return f"{self.path} holds {len(bundles)} bundles (max_bundles={self._max_bundles})"
        size = sum(_size(bundle) for bundle in bundles)
        if size + more > self._max_bytes:
            return f"{self.path} holds {_told(size)}, a further bundle takes {_told(more)} (max_bundle_bytes={self._max_bytes:g})"
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
            files = {file.name: {"bytes": file.stat().st_size, "sha256": _hash(file)} for file in sorted(half.iterdir())}
            told = {"format": FORMAT, **facts, "files": files, "missing": {**(missing or {}), **unwritten}}
            (half / FACTS).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
            if obstacle := self.fullness(_size(half)):  # no more can be told of it beforehand than what its tensors take
                raise OSError(obstacle)
            return Bundle(self._rename(half, name), told)
        except BaseException as error:
            shutil.rmtree(half, ignore_errors=True)
            if isinstance(error, RuntimeError):  # what torch makes of a full disk, which it mentions as the context
                context = error.__context__
                raise OSError(str(context) if isinstance(context, OSError) else _first_line(error)) from error
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
        return _first_line(error)
    return None


def classes_in(file: Path) -> list[str]:
    """Names of the classes in a file of tensors that ``weights_only=True`` refuses.

    Args:
        file: As ``torch.save`` writes it; of any other there are none.
    """
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # not such a file at all
        return []


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def encoded(value: Any) -> Any:
    """A batch without graphs, devices, and the rest of storages that its tensors are views of; arrays of NumPy as tensors.

    Mappings become dictionaries, so that batches of text libraries need no class of theirs. Other objects stay as they are.
    """
    if type(value) is Tensor:
        return _compact(value)
    if isinstance(value, Mapping):
        return {key: encoded(entry) for key, entry in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(encoded(entry) for entry in value)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map(encoded, value))
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype.kind in "biufc":
        return {_NDARRAY: torch.from_numpy(numpy.array(value)), "scalar": isinstance(value, numpy.generic)}
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if _NDARRAY in value:
            array = value[_NDARRAY].numpy()
            return array[()] if value["scalar"] else array
        return {key: _decoded(entry) for key, entry in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(_decoded(entry) for entry in value)
    return value


def _compact(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.layout is torch.strided and not tensor.is_nested and tensor.untyped_storage().nbytes() > tensor.nbytes:
        return tensor.clone()
    return tensor


def bytes_of(value: Any) -> int:
    """How much the tensors in something will take on the disk."""
    return sum(_nbytes(tensor) for tensor in _tensors(value))


def _nbytes(tensor: Tensor) -> int:
    if tensor.layout is torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    return tensor.nbytes


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)


def _size(folder: Path) -> int:
    size = 0
    with suppress(OSError):  # somebody is clearing it away
        for file in folder.iterdir():
            size += file.lstat().st_size
    return size


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _told(size: float) -> str:
    return f"{size / 1e6:.1f} MB"
