"""Step-interval learning-rate schedules, held for skipped steps.

Trap: after each batch Lightning steps a schedule if ``(batch_idx + 1) % frequency == 0``
(``training_epoch_loop._update_learning_rates``), whether or not the optimizer step was skipped (Lightning issues 5558, 18828 and
21339). It reads ``interval`` and ``frequency`` of the schedule's configuration to decide. For one batch these are set to values
that lead to the right decision, and then restored.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.types import LRSchedulerConfig


class SchedulerHold:
    """Makes step-interval schedules advance as if the batches of skipped steps did not exist.

    Plateau schedules are left to Lightning, except at a rollback.

    Args:
        is_on: If True, schedules are held.

    Attributes:
        skipped_batches: The number of batches of the epoch whose steps were skipped.
    """

    def __init__(self, is_on: bool) -> None:
        self._is_on = is_on
        self._altered: list[tuple[LRSchedulerConfig, str, int]] = []
        self._plateaus: list[tuple[LRSchedulerConfig, int]] = []
        self._epoch = -1
        # batches of the epoch: skipped, seen before the window of the last step, seen
        self.skipped_batches = self._window_start = self._seen = 0
        self._is_counted = False

    def decide(self, trainer: Trainer, *, skipped: bool) -> None:
        """Decide for each schedule whether it advances after this batch; of several calls in a batch the last one counts.

        Args:
            trainer: The Trainer.
            skipped: True if the step of this batch is skipped. LBFGS may call with False first and then with True.
        """
        if self._altered:
            self.release()
        loop = trainer.fit_loop
        # what `trainer.current_epoch` and `loop.batch_idx + 1` read, in three calls
        self._count(loop.epoch_progress.current.completed, loop.epoch_loop.batch_progress.current.ready)
        if skipped and not self._is_counted:
            self.skipped_batches += self._seen - self._window_start
            self._is_counted = True
        if not self._is_on or not self.skipped_batches:
            return
        for config in trainer.lr_scheduler_configs:
            if config.interval == "step" and not config.reduce_on_plateau:
                self._altered.append((config, config.interval, config.frequency))
                is_due = not skipped and (self._seen - self.skipped_batches) % config.frequency == 0
                # every batch number is divisible by 1, and no update asks for an interval named "held"
                if is_due:
                    config.frequency = 1
                else:
                    config.interval = "held"

    def holds(self, trainer: Trainer) -> bool:
        """Return whether there is a schedule that a skipped step holds."""
        return self._is_on and any(
            config.interval == "step" and not config.reduce_on_plateau for config in trainer.lr_scheduler_configs
        )

    @property
    def batches_before_window(self) -> int:
        """Batches of the epoch that schedules had counted when the window of the last step began."""
        return self._window_start - self.skipped_batches

    def batches_counted_in(self, epoch: int) -> int:
        """Return the number of batches of an epoch that schedules have counted, without a window that is still open."""
        if epoch != self._epoch:
            return 0
        return self._seen - self.skipped_batches

    def hold_for_rollback(self, trainer: Trainer, batches: int) -> None:
        """Hold all step-interval schedules for this batch, whose step is skipped, and set the count for a rollback.

        Plateau schedules are held too: the loss of the batch was computed with weights that are replaced.

        Args:
            trainer: The Trainer.
            batches: The number of counted batches of the epoch to continue from.
        """
        self.release()
        self.release_plateaus()
        self.skipped_batches = self._seen - batches
        for config in [config for config in trainer.lr_scheduler_configs if config.interval == "step"]:
            if config.reduce_on_plateau:
                self._plateaus.append((config, config.frequency))
                config.frequency = sys.maxsize
            else:
                self._altered.append((config, config.interval, config.frequency))
                config.interval = "held"

    def _count(self, epoch: int, batches: int) -> None:
        """Count the batches seen so far in the epoch; those since the last step are its window."""
        if epoch != self._epoch:
            self._epoch, self.skipped_batches, self._seen = epoch, 0, 0
        if batches != self._seen:
            self._window_start, self._seen, self._is_counted = self._seen, batches, False

    def state(self) -> tuple[int, int, int]:
        """Return the epoch, and its skipped and seen batches, for a checkpoint in mid-epoch."""
        return self._epoch, self.skipped_batches, self._seen

    def load_state(self, state: tuple[int, int, int]) -> None:
        """Continue from a return value of :meth:`state`."""
        self._epoch, self.skipped_batches, self._seen = map(int, state)

    def release(self) -> None:
        """Restore intervals and frequencies of schedules."""
        for config, interval, frequency in self._altered:
            config.interval, config.frequency = interval, frequency
        self._altered.clear()

    def release_plateaus(self) -> None:
        """Restore frequencies of plateau schedules. Lightning reads these after the last hook of the batch, so not before."""
        for config, frequency in self._plateaus:
            config.frequency = frequency
        self._plateaus.clear()
