"""Text that is safe to print: a terminal would execute escape sequences, which names in an untrusted bundle may contain."""

from __future__ import annotations


def escaped(line: str) -> str:
    r"""Return a line in which Python's escape codes replace all characters that are not printable, also line breaks.

    Args:
        line: Text from any source.

    Example:
        >>> print(escaped("erased" + chr(27) + "[2J"))
        erased\x1b[2J
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in line)
