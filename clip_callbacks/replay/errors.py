"""The error of a replay that cannot be run, and the lines of the user's code that caused it."""

from __future__ import annotations

import traceback
from pathlib import Path

import lightning
import torch

MAX_MESSAGE_LENGTH = 400
"""Number of characters after which the message of a foreign error is cut off."""
_LIBRARIES = tuple(str(Path(path).resolve()) for path in (torch.__path__[0], lightning.__path__[0], Path(__file__).parents[1]))


class UnusableReplayError(ValueError):
    """A configuration, script, checkpoint or module with which the bundle cannot be replayed.

    Args:
        message: The reason, in one line.
        frames: Lines of the user's code that were running, in the form of a traceback.
    """

    def __init__(self, message: str, frames: str = "") -> None:
        super().__init__(message)
        self.frames = frames

    @classmethod
    def from_user_code(cls, source: str, error: BaseException) -> UnusableReplayError:
        """Make an error of one that the user's code raised.

        Args:
            source: Name of the code that raised it.
            error: The original error.
        """
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_user_code(frame.filename)]
        reason = next(iter(str(error).strip().splitlines()), "no message")
        if len(reason) > MAX_MESSAGE_LENGTH:
            reason = f"{reason[:MAX_MESSAGE_LENGTH]} …"
        message = f"{source} raised {type(error).__name__}: {reason}"
        if frames:
            message += f" ({frames[-1].filename}, line {frames[-1].lineno})"
        return cls(message, "".join(traceback.format_list(frames)))


def is_user_code(file: str) -> bool:
    """Return whether a file of a traceback belongs to the user, and not to torch, Lightning or this package."""
    return not file.startswith("<") and not str(Path(file).resolve()).startswith(_LIBRARIES)
