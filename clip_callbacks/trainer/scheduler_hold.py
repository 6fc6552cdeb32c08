"""Learning-rate schedules that stand still for a skipped step."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.types import LRSchedulerConfig


class SchedulerHold:
    """Step-interval schedules that advance as if skipped batches had not been drawn; plateau schedules are left to Lightning.

    Lightning asks each schedule's interval and frequency after the batch, and counts batches, skipped ones too. For one batch they
    are set to what makes it do the right thing, then put back.

    Args:
        is_on: Whether anything is held at all.
    """

    def __init__(self, is_on: bool) -> None:
        self._is_on = is_on
        self._altered: list[tuple[LRSchedulerConfig, str, int]] = []
        self._plateaus: list[tuple[LRSchedulerConfig, int]] = []
        self._epoch = -1
        self._skipped_batches = self._window_start = self._seen = 0
        self._is_counted = False

    def settle(self, trainer: Trainer, *, skipped: bool) -> None:
        """Decide for each schedule whether it is to advance after this batch; LBFGS asks several times, and may change its mind."""
        self.release()
        self._begin(trainer.current_epoch, trainer.fit_loop.batch_idx + 1)
        if skipped and not self._is_counted:
            self._skipped_batches += self._seen - self._window_start
            self._is_counted = True
        if not self._is_on or not self._skipped_batches:
            return
        for config in trainer.lr_scheduler_configs:
            if config.interval == "step" and not config.reduce_on_plateau:
                self._altered.append((config, config.interval, config.frequency))
                is_due = not skipped and (self._seen - self._skipped_batches) % config.frequency == 0
                # Lightning asks whether the frequency divides its own number of the batch, which counts skipped ones too:
                # 1 divides every number, and for an interval of this name it never asks.
                if is_due:
                    config.frequency = 1
                else:
                    config.interval = "held"

    def holds(self, trainer: Trainer) -> bool:
        """Whether there is any schedule that a skipped step would hold."""
        return self._is_on and any(
            config.interval == "step" and not config.reduce_on_plateau for config in trainer.lr_scheduler_configs
        )

    @property
    def mark(self) -> int:
        """How many batches of the epoch the schedules had counted when the window began that a step has just been settled for."""
        return self._window_start - self._skipped_batches

    def mark_in(self, epoch: int) -> int:
        """How many batches of an epoch the schedules have counted, in mid-window without those of the window."""
        if epoch != self._epoch:
            return 0
        return self._seen - self._skipped_batches

    def go_back(self, trainer: Trainer, mark: int) -> None:
        """Hold every step-interval schedule for this batch, and count on from an earlier mark; it has been settled as skipped.

        Plateau schedules too: the batch's loss is one of weights that are gone.
        """
        self.release()
        self.release_plateaus()
        self._skipped_batches = self._seen - mark
        for config in [config for config in trainer.lr_scheduler_configs if config.interval == "step"]:
            if config.reduce_on_plateau:
                self._plateaus.append((config, config.frequency))
                config.frequency = sys.maxsize
            else:
                self._altered.append((config, config.interval, config.frequency))
                config.interval = "held"

    def _begin(self, epoch: int, batches: int) -> None:
        """Take note of the batches of the epoch seen so far; those since the last step are the window."""
        if epoch != self._epoch:
            self._epoch, self._skipped_batches, self._seen = epoch, 0, 0
        if batches != self._seen:
            self._window_start, self._seen, self._is_counted = self._seen, batches, False

    def state(self) -> tuple[int, int, int]:
        """Where the epoch stands, for a checkpoint inside it."""
        return self._epoch, self._skipped_batches, self._seen

    def load_state(self, state: tuple[int, int, int]) -> None:
        """Go on from what :meth:`state` returned."""
        self._epoch, self._skipped_batches, self._seen = map(int, state)

    def release(self) -> None:
        """Put intervals and frequencies back."""
        for config, interval, frequency in self._altered:
            config.interval, config.frequency = interval, frequency
        self._altered.clear()

    def release_plateaus(self) -> None:
        """Put frequencies of plateau schedules back: Lightning asks for them after the batch's last hook."""
        for config, frequency in self._plateaus:
            config.frequency = frequency
        self._plateaus.clear()
