"""What is left of bad steps when the run is over: a line of the journal for each, and a bundle, if that is wanted."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from clip_callbacks.bundles.folder import BundleFolder
from clip_callbacks.core.step_report import JOURNAL
from clip_callbacks.guard.capture import Bundles, Weights
from clip_callbacks.guard.step_context import Incident
from clip_callbacks.trainer.optimizer_context import KeptBatch

if TYPE_CHECKING:
    from clip_callbacks.guard.restore import Rewind


class Evidence:
    """Writes down bad steps; what cannot be written costs one warning, and training goes on.

    Args:
        bundle_dir: Where bundles go; None writes none.
        weights: What of the weights goes into them.
        max_bundles: How many the folder may hold.
        max_bundle_bytes: How much they may take together.

    Raises:
        ValueError: If one of these is out of its range.
    """

    def __init__(self, bundle_dir: str | Path | None, weights: Weights, max_bundles: int, max_bundle_bytes: float) -> None:
        if weights not in get_args(Weights):
            raise ValueError(f"`weights` must be one of {', '.join(get_args(Weights))}, got {weights!r}.")
        if not isinstance(max_bundles, int) or max_bundles < 1:
            raise ValueError(f"`max_bundles` must be a whole number of at least 1, got {max_bundles!r}.")
        if not max_bundle_bytes > 0:
            raise ValueError(f"`max_bundle_bytes` must be above 0, got {max_bundle_bytes!r}.")
        self._weights: Weights = weights
        where = None if bundle_dir is None else Path(bundle_dir).expanduser().absolute()  # wherever the process goes later
        self._folder = None if where is None else BundleFolder(where, max_bundles, max_bundle_bytes)
        self._bundles: Bundles | None = None
        self._journal: Path | None = None

    @property
    def holds_weights(self) -> bool:
        """Whether all weights are to be written."""
        return self._folder is not None and self._weights == "full"

    def prepare(self) -> None:
        """See before anything is trained that bundles can be written.

        Raises:
            ValueError: If they cannot.
        """
        if self._folder:
            try:
                self._folder.prepare()
            except OSError as error:
                raise ValueError(
                    f"`bundle_dir` must be a folder that can be written to, got {self._folder.path}: {error}"
                ) from error

    def open(self, trainer: Trainer) -> None:
        """Find the log directory, for a journal at the first bad step; be ready for bundles, unless their folder is full."""
        logs = trainer.log_dir if trainer.loggers else None
        self._journal = Path(logs) / JOURNAL if logs and trainer.is_global_zero else None
        if self._folder and (full := self._folder.fullness()):
            rank_zero_warn(f"{full}: no more will be written. Clear the folder, or name another.", stacklevel=2)
        elif self._folder:
            self._bundles = Bundles(self._folder, self._weights, trainer.lightning_module)

    def close(self) -> None:
        """Let go of the module and its batches."""
        self._bundles = None

    def keep(self, batch: Any, batch_idx: int) -> KeptBatch | None:
        """What a bundle will need of a batch, by reference."""
        return self._bundles.keep(batch, batch_idx) if self._bundles else None

    def record(
        self, incident: Incident, facts: dict[str, Any], rewind: Rewind | None, *, is_window: bool = True, is_guilty: bool = True
    ) -> str:
        """Write a line of the journal, and a bundle, if that is wanted.

        Args:
            incident: Where and when.
            facts: What is known of the step.
            rewind: What knows the batch statistics before it.
            is_window: Whether it is about a whole window, or one micro-batch of it.
            is_guilty: Whether it may be this rank's fault.

        Returns:
            Lines for a message that tell of the bundle, each behind a line break; none if there is no bundle.
        """
        told = self._write_bundle(incident, facts, rewind, is_window=is_window) if self._bundles and is_guilty else ""
        self.note(facts)
        return told

    def _write_bundle(self, incident: Incident, facts: dict[str, Any], rewind: Rewind | None, *, is_window: bool) -> str:
        assert self._bundles is not None
        try:
            bundle = self._bundles.write(incident, facts, rewind, is_window=is_window)
        except Exception as error:  # whatever it was: the training must not end for it
            self._bundles = None
            message = f"The bundle of {incident} cannot be written ({error}): training goes on, and no more bundles will be."
            warnings.warn(message, stacklevel=2)  # by the rank it happens to
            return ""
        facts["bundle"] = str(bundle.path)
        script = f" --script {sys.argv[0]}" if sys.argv[0].endswith(".py") else ""
        again = f"clip-callbacks replay {bundle.path} --config YOURS.yaml{script}"
        return "\n".join([f"\nBundle: {bundle.path}", f"  Run it again: {again}", *(f"  {note}" for note in bundle.notes)])

    def note(self, facts: dict[str, Any]) -> None:
        """Write a line of the journal, on the first rank."""
        if not self._journal:
            return
        try:
            self._journal.parent.mkdir(parents=True, exist_ok=True)
            with self._journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")
        except OSError as error:  # one rank writes: if it stopped, the others would wait for it
            rank_zero_warn(f"{self._journal} cannot be written ({error}): bad steps are reported as warnings only.", stacklevel=2)
            self._journal = None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without what belongs to one Trainer's fit."""
        return self.__dict__ | {"_bundles": None, "_journal": None}
