"""Buffers of one optimizer's window, put back for a skipped step, and for a bad forward pass without a step."""

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
    """What the resources of buffers have in common, in automatic and in manual optimization.

    Args:
        written: Which buffers change.
        window: The buffers as they were when the window began.
        batch: The buffers as they were when the batch began.
    """

    def __init__(self, written: BufferTracker, window: BufferCopies, batch: BufferCopies) -> None:
        self._written = written
        self._window = window
        self._batch = batch

    def goes_on(self, contexts: Sequence[OptimizerContext]) -> bool:
        """Whether it serves the same optimizers with other parameters as well, so that a window under way keeps its copies."""
        return True

    def look_unless_old(self) -> None:
        """Find what has changed in a window that may be skipped: contents are read in the first windows only."""
        if self._written.compares_every_window:
            self._written.compare_contents()
        else:
            self._written.find_changed()

    def put_back(self, *copies: BufferCopies) -> None:
        """Put buffers back, and say of which that cannot be done right."""
        at_first = self._written.compare_contents()
        lost = [name for each in copies for name in each.restore()]
        if at_first:
            rank_zero_warn(
                f"The buffers {', '.join(at_first)} are not finite and were written through `.data`, which no version counter "
                "shows: they are put back to what they were when the fit began. From now on they are put back as all others.",
                category=RuntimeWarning,
            )
        if made := self._written.reset_new_statistics():
            rank_zero_warn(
                f"The buffers {', '.join(made)} are not finite and were made in a batch that is skipped, after it had begun: "
                "nobody knows what they were. Batch statistics begin anew, others stay. Make modules before a batch, as in "
                "on_train_epoch_start.",
                category=RuntimeWarning,
            )
        if lost:
            rank_zero_warn(
                f"The buffers {', '.join(lost)} have changed for the first time, in a step that is skipped, and cannot be put "
                "back: no copy was kept of what they were. From now on they are put back as all others.",
                category=RuntimeWarning,
            )

    @override
    def undo_pass(self, *, is_bad: bool) -> list[str]:
        return self._undo(self._batch, is_bad=is_bad)

    @override
    def undo_window(self, *, is_bad: bool) -> list[str]:
        return self._undo(self._window, is_bad=is_bad)

    def _undo(self, copies: BufferCopies, *, is_bad: bool) -> list[str]:
        self._written.find_changed()
        bad = copies.newly_nonfinite()
        if bad or is_bad:
            self.put_back(copies)
        return bad

    @override
    def hand_over(self) -> None:
        """Leave the hooks where they are: buffers are the module's and not the optimizers', and :meth:`goes_on` tells the rest."""

    @override
    def detach(self) -> None:
        self._written.detach()

    @override
    def before(self) -> dict[int, Tensor]:
        return self._window.copies()

    @override
    def suspects(self, *, none_was_good: bool) -> list[tuple[str, Tensor]]:
        return self._window.suspects(include_initially_nonfinite=none_was_good)
