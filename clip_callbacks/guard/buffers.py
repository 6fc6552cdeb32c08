"""Buffers of one optimizer's window, restored after a skipped step and after a bad forward pass without a step."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from clip_callbacks.guard.resource import Resource
from clip_callbacks.trainer.buffer_copies import BufferCopies
from clip_callbacks.trainer.buffer_tracker import BufferTracker
from clip_callbacks.trainer.optimizer_context import OptimizerContext


class Buffers(Resource):
    """Common base of the resources of buffers, in automatic and in manual optimization.

    Args:
        written: Record of the buffers that forward passes change.
        window: Copies of the buffers from the beginning of the window.
        batch: Copies of the buffers from the beginning of the batch.
    """

    def __init__(self, written: BufferTracker, window: BufferCopies, batch: BufferCopies) -> None:
        self._written = written
        self._window = window
        self._batch = batch

    def goes_on(self, contexts: Sequence[OptimizerContext]) -> bool:
        """Return whether this resource serves the optimizers with other parameters too, so that an open window keeps its copies."""
        return True

    def find_changes(self) -> None:
        """Find the buffers that a window, which may be skipped, has changed. Contents are compared in the first windows only."""
        # To compare contents reads every entry, and the host waits for the result; versions and identities cost neither.
        if self._written.compares_every_window:
            self._written.compare_contents()
        else:
            self._written.find_changed()

    def restore(self, *copies: BufferCopies) -> None:
        """Restore buffers, and warn of those that cannot be restored exactly."""
        # On a bad step one more read is affordable. It finds writes through `.data`, which no version counter shows.
        at_first = self._written.compare_contents()
        lost = [name for each in copies for name in each.restore()]
        if at_first:
            rank_zero_warn(
                f"The buffers {', '.join(at_first)} are not finite and were written through `.data`, which no version counter "
                "shows: they are restored to their values from the start of the fit. From now on they are restored as all others.",
                category=RuntimeWarning,
            )
        if made := self._written.reset_new_statistics():
            rank_zero_warn(
                f"The buffers {', '.join(made)} are not finite and were made in a batch that is skipped, after it had begun: "
                "there are no earlier values. Batch statistics are reset, others stay. Make modules before a batch, for example in "
                "on_train_epoch_start.",
                category=RuntimeWarning,
            )
        if lost:
            rank_zero_warn(
                f"The buffers {', '.join(lost)} have changed for the first time, in a step that is skipped, and cannot be "
                "restored: no copy of their earlier values was kept. From now on they are restored as all others.",
                category=RuntimeWarning,
            )

    @override
    def restore_pass(self, *, is_bad: bool) -> list[str]:
        return self._restore_if_bad(self._batch, is_bad=is_bad)

    @override
    def restore_window(self, *, is_bad: bool) -> list[str]:
        return self._restore_if_bad(self._window, is_bad=is_bad)

    def _restore_if_bad(self, copies: BufferCopies, *, is_bad: bool) -> list[str]:
        self._written.find_changed()
        # Finite changes stay: SWA's last epoch takes batch statistics anew by forward passes without a step.
        bad = copies.newly_nonfinite()
        if bad or is_bad:
            self.restore(copies)
        return bad

    @override
    def hand_over(self) -> None:
        """Keep the hooks: buffers belong to the module and not to optimizers, and :meth:`goes_on` decides what follows."""

    @override
    def detach(self) -> None:
        self._written.detach()

    @override
    def before(self) -> dict[int, Tensor]:
        return self._window.copies()

    @override
    def suspects(self, *, no_good_step: bool) -> list[tuple[str, Tensor]]:
        return self._window.suspects(include_initially_nonfinite=no_good_step)
