"""What a terminal would obey instead of showing it, such as escape sequences in the names of a stranger's bundle."""

from __future__ import annotations


def escaped(line: str) -> str:
    r"""A line as it may be printed: what is no letter, mark or blank, line breaks included, as Python writes it.

    Args:
        line: Of whatever origin.

    Example:
        >>> print(escaped("erased" + chr(27) + "[2J"))
        erased\x1b[2J
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in line)
