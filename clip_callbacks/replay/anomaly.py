"""The backward function that autograd's anomaly detection names, and the line of the user's code that called it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from clip_callbacks.replay.errors import is_user_code

_FUNCTION = re.compile(r"Function '(\w+)' returned nan values")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)(?:\n\s+(.+))?')


@dataclass(frozen=True)
class Anomaly:
    """A backward function that returned NaN.

    Args:
        function: Name of the function, such as "SqrtBackward0".
        file: File of the user's that called its forward; None if the call is in a library.
        line: Number of the line in the file.
        code: Text of the line.
    """

    function: str
    file: str | None = None
    line: int | None = None
    code: str | None = None

    @classmethod
    def of(cls, error: BaseException | None, warnings: list[str]) -> Anomaly | None:
        """Read the anomaly from the error that ended the backward pass; None if that is another error.

        Args:
            error: The error that was raised.
            warnings: Messages of the warnings during the pass, among which torch puts the traceback of the forward call.
        """
        found = _FUNCTION.search(str(error))
        if not found:
            return None
        traceback = next((text for text in reversed(warnings) if "Traceback of forward call" in text), "")
        frames = [match.groups() for match in _FRAME.finditer(traceback) if is_user_code(match[1])]
        if not frames:
            return cls(found[1])
        file, line, _, code = frames[-1]
        return cls(found[1], file, int(line), code)

    def __str__(self) -> str:
        """Return one line."""
        if not self.file:
            return f"{self.function} returned NaN"
        return f"{self.function} returned NaN; its forward call is in {self.file}, line {self.line}: {self.code or ''}".rstrip(": ")
