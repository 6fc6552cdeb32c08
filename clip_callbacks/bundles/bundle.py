"""A bad step in a folder: what is needed to run it again, in formats that cannot run code.

``bundle.json`` says where, when and what, with the sizes and hashes of the other files; ``batches.pt`` holds the micro-batches of
the window with the random numbers' states before each; ``weights.pt`` and ``optimizers.pt``, if asked for, the weights and the
optimizers' states before the step; ``config.yaml`` the configuration of the run, if it came from LightningCLI. Tensors are read by
``torch.load(weights_only=True)``.
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

_FACTS_BYTES = 64_000_000
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
            if (path / FACTS).stat().st_size > _FACTS_BYTES or ((path / FACTS).exists() and not (path / FACTS).is_file()):
                raise UnusableBundleError(f"{path / FACTS} must be a file of up to {_FACTS_BYTES // 10**6} MB.")
            facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        except UnusableBundleError:
            raise
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
            return [row | {"batch": decoded(row["batch"]), "rng": decoded(row["rng"])} for row in rows]
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:  # of arrays that are none, or nested too deep
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
            _check_size(self.path / name)
            return torch.load(self.path / name, map_location="cpu", weights_only=True)
        except UnusableBundleError:
            raise
        except Exception as error:
            if classes := classes_in(self.path / name):
                raise UnusableBundleError(
                    f"{self.path / name} holds objects that could run code, of {', '.join(classes)}. If you trust whoever wrote "
                    f"the bundle, name them: {' '.join(f'--trust {name}' for name in classes)}"
                ) from None
            raise UnusableBundleError(
                f"{self.path / name} cannot be read as torch.save writes it: {type(error).__name__}: {first_line(error)}"
            ) from None


def _check_size(file: Path) -> None:
    """See that reading takes about as much memory as the file takes room: torch compresses nothing, and who does may mean harm."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise UnusableBundleError(f"{file} must not be compressed.")


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
        try:
            is_there = file.is_file() and not file.is_symlink()
        except OSError:  # a name that is too long
            is_there = False
        if not is_there:
            raise UnusableBundleError(f"{file} is missing, or no file.")
        size = file.stat().st_size
        if size != known.get("bytes"):
            raise UnusableBundleError(f"{file} must have {known.get('bytes')} bytes, got {size}: it is truncated or changed.")
        if hash_of(file) != known.get("sha256"):
            raise UnusableBundleError(f"{file} is not as it was written: its hash is another one.")


def classes_in(file: Path) -> list[str]:
    """Names of the classes in a file of tensors that ``weights_only=True`` refuses.

    Args:
        file: As ``torch.save`` writes it; of any other there are none.
    """
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # not such a file at all
        return []


def first_line(error: Exception) -> str:
    """Of what it says."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def hash_of(file: Path) -> str:
    """Of a file, by SHA-256."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
