"""A bundle: a folder with everything that running a bad step again needs, in formats that cannot run code.

``bundle.json`` describes the step, the module and the Trainer, and lists the other files with their sizes and hashes.
``batches.pt`` holds the micro-batches of the window, and the states of the random number generators before each. ``weights.pt``
and ``optimizers.pt``, which are optional, hold the weights and the states of the optimizers before the step. ``config.yaml`` is
the configuration of the run, if LightningCLI made one. Files of tensors are read by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_callbacks.bundles.encoding import decoded

FORMAT = 1
KINDS = ("nonfinite", "spike")
FACTS = "bundle.json"
BATCHES = "batches.pt"
WEIGHTS = "weights.pt"
OPTIMIZERS = "optimizers.pt"
CONFIG = "config.yaml"

MAX_FACTS_BYTES = 64_000_000
"""Size of ``bundle.json`` above which it is refused unread, in bytes."""
MAX_KEYS = 6
"""Number of keys of a dictionary that an error names."""


class UnusableBundleError(ValueError):
    """A bundle that cannot be read; the message gives the reason in one line."""


@dataclass(frozen=True)
class Bundle:
    """A bundle.

    Args:
        path: The folder.
        facts: Contents of ``bundle.json``.
    """

    path: Path
    facts: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Bundle:
        """Read ``bundle.json``, and check the sizes and hashes of the other files.

        Raises:
            UnusableBundleError: If the folder is not a bundle, has another format, or was truncated or changed.
        """
        file = path / FACTS
        try:
            if file.stat().st_size > MAX_FACTS_BYTES or not file.is_file():
                raise UnusableBundleError(f"{file} must be a regular file of at most {MAX_FACTS_BYTES // 10**6} MB.")
            facts = json.loads(file.read_text(encoding="utf-8"))
        except UnusableBundleError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            inside = sorted(found.parent.name for found in path.glob(f"*/{FACTS}"))
            hint = ""
            if inside:
                hint = f", which holds {len(inside)} bundle{'s' * (len(inside) > 1)}: name one, such as {path / inside[0]}"
            raise UnusableBundleError(f"`bundle` must be a folder with a {FACTS}, got {path}{hint}.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UnusableBundleError(f"{file} cannot be read: {error}") from None
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            got = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
            raise UnusableBundleError(
                f"{file} must have the format {FORMAT}, got {got!r}; use the version of clip_callbacks that wrote the bundle."
            )
        _check(path, facts)
        return cls(path, facts)

    @property
    def deviations(self) -> list[str]:
        """Remarks on what a replay cannot repeat exactly."""
        notes = [f"{name} could not be written: {why}" for name, why in self.facts["missing"].items()]
        if self.facts["batches"].get("changed_in_place"):
            notes.append("the step changed its batch in place: the bundle may not hold what training_step got")
        return notes

    @property
    def notes(self) -> list[str]:
        """Remarks on what a replay cannot repeat exactly, or needs."""
        if classes := classes_in(self.path / BATCHES):
            return [*self.deviations, f"its batches hold objects of {', '.join(classes)}: a replay needs --trust for each"]
        return self.deviations

    @property
    def place(self) -> dict[str, Any]:
        """Step, epoch, batch and rank of the bad step, and with several optimizers the name of the optimizer."""
        keys = ("step", "epoch", "batch", "rank", "optimizer")
        return {key: self.facts["report"][key] for key in keys if key in self.facts["report"]}

    def micro_batches(self, trust: Sequence[type] = ()) -> list[dict[str, Any]]:
        """Return the micro-batches of the window, in order.

        Args:
            trust: Classes that may be unpickled; the author of the bundle then chooses the arguments of their constructors.

        Returns:
            Dictionaries with ``batch``, ``batch_idx``, ``loss`` (0-dim) and ``rng`` (states of the generators before the batch).

        Raises:
            UnusableBundleError: If there are none, or they hold objects of classes that are not trusted.
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
            return [row | {"batch": decoded(row["batch"]), "rng": decoded(row["rng"])} for row in rows]
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:  # arrays of the wrong type, or values nested too deep
            raise UnusableBundleError(f"{self.path / BATCHES} cannot be read: {type(error).__name__}: {error}") from None

    def weights(self) -> dict[str, Any] | None:
        """Return a dictionary with the module's ``state_dict`` before the step as "module"; None if the bundle has no weights."""
        if WEIGHTS not in self.facts["files"]:
            return None
        weights = self._load(WEIGHTS)
        if not isinstance(weights, dict) or not isinstance(weights.get("module"), dict):
            raise UnusableBundleError(
                f"{self.path / WEIGHTS} must hold the module's state_dict under `module`, got {_shape_of(weights)}."
            )
        return weights

    def optimizers(self) -> list[dict[str, Any]]:
        """Return the ``state_dict`` of each optimizer before the step; an empty list if the bundle has none."""
        if OPTIMIZERS not in self.facts["files"]:
            return []
        states = self._load(OPTIMIZERS)
        if not isinstance(states, list) or not all(isinstance(state, dict) for state in states):
            raise UnusableBundleError(f"{self.path / OPTIMIZERS} must hold a list of state_dicts, got {_shape_of(states)}.")
        return states

    def _load(self, name: str) -> Any:
        try:
            _check_size(self.path / name)
            return torch.load(self.path / name, map_location="cpu", weights_only=True)
        except UnusableBundleError:
            raise
        except Exception as error:
            if classes := classes_in(self.path / name):
                raise UnusableBundleError(
                    f"{self.path / name} holds objects that could run code, of {', '.join(classes)}. If you trust the author of "
                    f"the bundle, allow these classes: {' '.join(f'--trust {name}' for name in classes)}"
                ) from None
            raise UnusableBundleError(
                f"{self.path / name} cannot be read as torch.save writes it: {type(error).__name__}: {first_line(error)}"
            ) from None


def _check_size(file: Path) -> None:
    """Reject compressed archives: ``torch.save`` never compresses, so a compressed file could be a decompression bomb."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise UnusableBundleError(f"{file} must not be compressed, because torch.save never compresses.")


def _is_micro_batch(row: Any) -> bool:
    if not isinstance(row, dict) or "batch" not in row or not isinstance(row.get("rng"), dict):
        return False
    loss, batch_idx = row.get("loss"), row.get("batch_idx")
    has_loss = loss is None or (isinstance(loss, Tensor) and loss.numel() == 1)
    return has_loss and isinstance(batch_idx, int) and batch_idx >= 0


def _shape_of(content: Any) -> str:
    """Return a short description of contents for an error."""
    if isinstance(content, dict):
        return f"a dict with {', '.join(map(str, list(content)[:MAX_KEYS])) or 'nothing'}"
    if isinstance(content, list):
        return f"a list of {', '.join(sorted({type(entry).__name__ for entry in content})) or 'nothing'}"
    return f"a {type(content).__name__}"


def _check(path: Path, facts: dict[str, Any]) -> None:
    """Check that ``bundle.json`` has the sections that readers rely on, and that all files are as they were written."""
    for key in ("report", "versions", "module", "trainer", "weights", "batches", "files", "missing"):
        if not isinstance(facts.get(key), dict):
            raise UnusableBundleError(f"{path / FACTS} must hold an object `{key}`, got {facts.get(key)!r}.")
    if facts.get("kind") not in KINDS:
        raise UnusableBundleError(f"{path / FACTS} must hold a `kind` among {', '.join(KINDS)}, got {facts.get('kind')!r}.")
    for name, known in facts["files"].items():
        file = path / name
        if file.parent != path or not isinstance(known, dict):  # an untrusted bundle must not point elsewhere
            raise UnusableBundleError(f"{path / FACTS} must name files in its own folder only, got {name!r}.")
        try:
            is_there = file.is_file() and not file.is_symlink()
        except OSError:  # the name is too long
            is_there = False
        if not is_there:
            raise UnusableBundleError(f"{file} must be a regular file, got a link, a folder or nothing; copy the bundle again.")
        size = file.stat().st_size
        if size != known.get("bytes"):
            raise UnusableBundleError(
                f"{file} must have {known.get('bytes')} bytes, got {size}: it is truncated or changed; copy the bundle again."
            )
        if hash_of(file) != known.get("sha256"):
            raise UnusableBundleError(
                f"{file} must have the SHA-256 hash that {FACTS} records, got another one: it was changed; copy the bundle again."
            )


def classes_in(file: Path) -> list[str]:
    """Return the names of the classes in a file that ``torch.load(weights_only=True)`` refuses to unpickle.

    Args:
        file: A file by ``torch.save``; the list is empty for any other file.
    """
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # not a file by torch.save
        return []


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def hash_of(file: Path) -> str:
    """Return the SHA-256 hash of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
