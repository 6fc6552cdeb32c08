"""What is left of bad steps when the run is over: a line of the journal for each, and a bundle, if that is wanted."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from clip_callbacks.bundles.folder import BundleFolder
from clip_callbacks.core.metric_names import JOURNAL
from clip_callbacks.guard.capture import BundleWriter
from clip_callbacks.guard.options import GuardOptions
from clip_callbacks.trainer.step_context import KeptBatch, StepContext

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def folder_of(options: GuardOptions) -> BundleFolder | None:
    """The folder that bundles go to, if they are wanted."""
    if options.bundles is None:
        return None
    return BundleFolder(Path(options.bundles.folder), options.bundles.max_count, options.bundles.max_bytes)


def check_folder(options: GuardOptions) -> None:
    """See before anything is trained that bundles can be written.

    Raises:
        ValueError: If they cannot.
    """
    if folder := folder_of(options):
        try:
            folder.prepare()
        except OSError as error:
            raise ValueError(f"`bundles` must be a folder that can be written to, got {folder.path}: {error}") from error


class Journal:
    """Writes down the bad steps of a fit; what cannot be written costs one warning, and training goes on.

    Args:
        options: What the guard was told.
    """

    def __init__(self, options: GuardOptions) -> None:
        self._options = options
        self._bundles: BundleWriter | None = None
        self._path: Path | None = None

    def start_fit(self, trainer: Trainer) -> None:
        """Find the log directory, for the first bad step; be ready for bundles, unless their folder is full."""
        logs = trainer.log_dir if trainer.loggers else None  # a broadcast: all ranks ask
        if logs and trainer.is_global_zero:
            self._path = Path(logs) / JOURNAL
        folder, bundles = folder_of(self._options), self._options.bundles
        if folder is None or bundles is None:
            return
        if full := folder.fullness():
            rank_zero_warn(f"{full}: no more will be written. Clear the folder, or name another.", stacklevel=2)
        else:
            self._bundles = BundleWriter(folder, bundles.weights, trainer.lightning_module)

    def detach(self) -> None:
        """Let go of the module and its batches."""
        self._bundles = None

    def keep(self, batch: Any, batch_idx: int) -> KeptBatch | None:
        """What a bundle will need of a batch, by reference."""
        if self._bundles:
            return self._bundles.keep(batch, batch_idx)
        return None

    def record(
        self,
        step: StepContext,
        facts: dict[str, Any],
        before: Mapping[int, Tensor],
        *,
        is_window: bool = True,
        is_guilty: bool = True,
    ) -> str:
        """Write a line of the journal, and a bundle, if that is wanted.

        Args:
            step: The step.
            facts: What is known of it.
            before: Tensors as they were before it, by the ``id`` of the live ones.
            is_window: Whether it is about a whole window, or one micro-batch of it.
            is_guilty: Whether it may be this rank's fault.

        Returns:
            Lines for a message that tell of the bundle, each behind a line break; none if there is no bundle.
        """
        lines = ""
        if self._bundles and is_guilty:
            try:
                bundle = self._bundles.write(step, facts, before, is_window=is_window)
            except Exception as error:  # whatever it was: the training must not end for it
                self._bundles = None
                message = f"The bundle of {step} cannot be written ({error}): training goes on, and no more bundles will be."
                warnings.warn(message, stacklevel=2)  # by the rank it happens to
            else:
                facts["bundle"] = str(bundle.path)
                lines = _lines_about(bundle.path, bundle.notes)
        self.note(facts)
        return lines

    def note(self, facts: Mapping[str, Any]) -> None:
        """Write a line of the journal, on the first rank."""
        if not self._path:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")
        except OSError as error:  # one rank writes: if it stopped, the others would wait for it
            rank_zero_warn(f"{self._path} cannot be written ({error}): bad steps are reported as warnings only.", stacklevel=2)
            self._path = None


def _lines_about(bundle: Path, notes: list[str]) -> str:
    again = f"clip-callbacks replay {bundle} --config YOURS.yaml"
    if sys.argv[0].endswith(".py"):
        again += f" --script {sys.argv[0]}"
    return "\n".join([f"\nBundle: {bundle}", f"  Run it again: {again}", *(f"  {note}" for note in notes)])
