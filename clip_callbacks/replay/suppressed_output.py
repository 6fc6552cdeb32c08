"""Output that a replay keeps from the terminal: prints of the user's code, messages of Lightning, and warnings."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def suppress_output() -> Iterator[list[warnings.WarningMessage]]:
    """Send prints to stderr, record warnings instead of showing them, and let Lightning log errors only.

    Yields:
        The warnings; a list that grows.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(record=True) as recorded:
            warnings.simplefilter("always")
            yield recorded
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
