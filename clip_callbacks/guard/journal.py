"""The journal of bad steps: a line of JSON for each, and a bundle if the options ask for it."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from clip_callbacks.bundles.folder import BundleFolder
from clip_callbacks.core.metric_names import JOURNAL
from clip_callbacks.guard.capture import BundleWriter, StateBefore
from clip_callbacks.guard.options import Bundles
from clip_callbacks.trainer.step_context import KeptBatch, StepContext

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def check_folder(bundles: Bundles | None) -> None:
    """Check before the training that bundles can be written, if there are to be any.

    Raises:
        ValueError: If the folder cannot be written to.
    """
    if bundles is None:
        return
    try:
        _folder_of(bundles).prepare()
    except OSError as error:
        raise ValueError(f"`bundles` must be a folder that can be written to, got {bundles.folder}: {error}") from error


class Journal:
    """Writes the bad steps of a fit to disk. If that fails, there is one warning, and training continues.

    Args:
        bundles: Options of bundles; None writes the journal only.
    """

    def __init__(self, bundles: Bundles | None) -> None:
        self._options = bundles
        self._bundles: BundleWriter | None = None
        self._path: Path | None = None

    def start_fit(self, trainer: Trainer, before: StateBefore) -> None:
        """Find the log directory, and prepare for bundles unless their folder is full.

        Args:
            trainer: The Trainer.
            before: Returns tensors as they were before a step of an optimizer, by the ``id`` of the live ones.
        """
        logs = trainer.log_dir if trainer.loggers else None  # log_dir is a broadcast, so that every rank must read it
        # one file for all ranks, written by one of them, so that no lines mix
        if logs and trainer.is_global_zero:
            self._path = Path(logs) / JOURNAL
        if self._options is None:
            return
        folder = _folder_of(self._options)
        if full := folder.fullness():
            rank_zero_warn(f"{full}: no more will be written. Clear the folder, or choose another one.", stacklevel=2)
        else:
            self._bundles = BundleWriter(folder, self._options.weights, trainer.lightning_module, before)

    def detach(self) -> None:
        """Hold the module and its batches no longer."""
        self._bundles = None

    def keep(self, batch: Any, batch_idx: int) -> KeptBatch | None:
        """Return a reference to a batch for a bundle; None if no bundles are written."""
        if self._bundles:
            return self._bundles.keep(batch, batch_idx)
        return None

    def record(self, step: StepContext, facts: dict[str, Any], *, is_window: bool = True, may_be_source: bool = True) -> str:
        """Write a line of the journal, and a bundle if the options ask for it.

        Args:
            step: The step.
            facts: Facts about the step, for JSON.
            is_window: If False, the facts are about one micro-batch and not about a whole window.
            may_be_source: If False, the step did not become bad on this rank, and no bundle is written here.

        Returns:
            Lines about the bundle for a message, each after a line break; empty without a bundle.
        """
        lines = ""
        # The bundle first: the line of the journal names it.
        if self._bundles and may_be_source:
            try:
                bundle = self._bundles.write(step, facts, is_window=is_window)
            except Exception as error:  # of any kind: a failing bundle must not end the training
                self._bundles = None
                message = f"The bundle of {step} cannot be written ({error}): training continues without further bundles."
                warnings.warn(message, stacklevel=2)  # from any rank: only one may fail
            else:
                facts["bundle"] = str(bundle.path)
                lines = _lines_about(bundle.path, bundle.notes)
        self.note(facts)
        return lines

    def note(self, facts: Mapping[str, Any]) -> None:
        """Write a line of the journal; only the first rank does."""
        if not self._path:
            return
        try:
            # Loggers make their directory when they first write, which may be later. The file is closed after each line, so that
            # the last one is on disk if the run is killed.
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")
        except OSError as error:  # only one rank writes: an error there would leave the others waiting
            rank_zero_warn(f"{self._path} cannot be written ({error}): bad steps are reported as warnings only.", stacklevel=2)
            self._path = None


def _folder_of(bundles: Bundles) -> BundleFolder:
    return BundleFolder(Path(bundles.folder), bundles.max_count, bundles.max_bytes)


def _lines_about(bundle: Path, notes: list[str]) -> str:
    command = f"clip-callbacks replay {bundle} --config YOURS.yaml"
    # replay runs a script up to its LightningCLI only; other scripts need none, but a YAML file that names the model's class
    if sys.argv[0].endswith(".py") and {"lightning.pytorch.cli", "pytorch_lightning.cli"} & sys.modules.keys():
        command += f" --script {sys.argv[0]}"
    return "\n".join([f"\nBundle: {bundle}", f"  Run it again: {command}", *(f"  {note}" for note in notes)])
