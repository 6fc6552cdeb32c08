"""What autograd's anomaly detection says, and the line of the user's code that it means."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from clip_callbacks.replay.errors import is_users

_FUNCTION = re.compile(r"Function '(\w+)' returned nan values")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)(?:\n\s+(.+))?')


@dataclass(frozen=True)
class Anomaly:
    """A backward function that has returned NaN.

    Args:
        function: Its name, such as "SqrtBackward0".
        file: Where its forward was called; None if that is in nobody's code.
        line: In that file.
        code: The line itself.
    """

    function: str
    file: str | None = None
    line: int | None = None
    code: str | None = None

    @classmethod
    def of(cls, error: BaseException | None, said: list[str]) -> Anomaly | None:
        """From the error that ended the backward pass; None if it is another one.

        Args:
            error: As raised.
            said: The warnings of that pass: torch puts the forward's traceback there.
        """
        found = _FUNCTION.search(str(error))
        if not found:
            return None
        traceback = next((text for text in reversed(said) if "Traceback of forward call" in text), "")
        frames = [match.groups() for match in _FRAME.finditer(traceback) if is_users(match[1])]
        if not frames:
            return cls(found[1])
        file, line, _, code = frames[-1]
        return cls(found[1], file, int(line), code)

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """One line."""
        where = f", from {self.file}, line {self.line}: {self.code or ''}".rstrip(": ") if self.file else ""
        return f"{self.function} returned NaN{where}"
