"""What a replay cannot be made of."""

from __future__ import annotations

import traceback
from pathlib import Path

import lightning
import torch

LONG = 400
"""So much of an error's message is told."""
_OURS = Path(__file__).parents[1]
_FOREIGN = tuple(str(Path(path).resolve()) for path in (torch.__path__[0], lightning.__path__[0], _OURS))


class UnusableReplayError(ValueError):
    """A configuration, script, checkpoint or module that the bundle cannot be replayed with; the message says why, in one line.

    Args:
        message: Why.
        frames: Where in the user's code, as a traceback prints it.
    """

    def __init__(self, message: str, frames: str = "") -> None:
        super().__init__(message)
        self.frames = frames

    @classmethod
    def of(cls, what: str, error: BaseException) -> UnusableReplayError:
        """From an error that code of the user's has raised.

        Args:
            what: What raised it.
            error: The error.
        """
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        said = next(iter(str(error).strip().splitlines()), "no message")
        if len(said) > LONG:
            said = f"{said[:LONG]} …"
        return cls(f"{what} raised {type(error).__name__}: {said}{where}", "".join(traceback.format_list(frames)))


def is_users(file: str) -> bool:
    """Whether a file of a traceback is the user's: of neither torch nor Lightning nor this package."""
    return not file.startswith("<") and not str(Path(file).resolve()).startswith(_FOREIGN)
